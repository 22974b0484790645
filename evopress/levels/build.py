"""Build a level database in one walk over the blocks, or go on where an earlier build stopped.

Calibration activations enter block i; one Hessian per distinct input is accumulated; all levels of all units on that input are made
and written; the activations leave through the block, dense or at the level named by `propagate`. Only one block and its inputs are
on the device at a time.

Shapes: N sequences of L tokens, d hidden size, C input columns of a linear.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from evopress.compress.compressor import Compressed, Compressor
from evopress.compress.hessian import HessianSum
from evopress.errors import EvoPressError
from evopress.files import explained, is_sealed, make_folder, seal, sync_folder, temporary_beside, write_atomically
from evopress.json_files import load_bytes, parse_json, shown
from evopress.levels.entries import check_file, check_units
from evopress.levels.hessians import BlockHessians, HessianStore
from evopress.levels.locking import alone_in
from evopress.levels.store import (
    MANIFEST,
    SCHEMA,
    DamagedDatabaseError,
    LevelDatabase,
    block_file,
    check_block,
    entries_of,
    fingerprint,
    read_manifest,
    write_block,
    write_manifest,
)
from evopress.models.blocks import BlockModel
from evopress.progress import track
from evopress.units import Space, Unit

logger = logging.getLogger(__name__)
_JOURNAL = "journal.jsonl"


@dataclass(frozen=True)
class BuildSettings:
    """How a database is built; nothing here changes its content beyond rounding except what `recipe` says."""

    root: Path
    """Databases lie in <root>/<model>/<method>-<fingerprint>."""
    method: str
    model_name: str
    recipe: dict[str, Any]
    """Everything that decides the content: model and data digests, compressor settings, propagated level."""
    propagate: str | None
    """Key of the level through which activations leave a block ("4"); None: dense."""
    batch_tokens: int = 4096
    """Tokens per forward of one block."""
    activations: str = "memory"
    """Where calibration activations live between blocks: "memory" (of the host) or "disk"."""
    hessians: HessianStore | None = None
    """Where dense activations' Hessians are kept for further databases; used where activations leave blocks dense."""
    lock_timeout: float = 24 * 3600.0
    """Seconds to wait for another process that builds the same database."""

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.recipe)

    @property
    def folder(self) -> Path:
        return self.root / self.model_name / f"{self.method}-{self.fingerprint}"


def plan_space(blocks: BlockModel, compressor: Compressor, *, method: str) -> Space:
    """List all units with their levels from shapes alone; no forward pass.

    Raises: EvoPressError if the compressor's settings fit no unit, with the unit's name.
    """
    units = []
    for index in range(len(blocks.blocks)):
        for name, linear in blocks.linears(index).items():
            rows, columns = linear.weight.shape
            try:
                levels = compressor.levels((rows, columns), unit=name)
            except EvoPressError as error:
                raise EvoPressError(f"{name}: {error}") from None
            units.append(Unit(name=name, block=index, kind=name.rsplit(".", 1)[-1], size=rows * columns, levels=levels))
    return Space(method=method, units=tuple(units))


def database_bytes(space: Space) -> int:
    """Bytes that a space's levels take on disk, all of them stored (file headers aside)."""
    return sum(level.stored_bits for unit in space.units for level in unit.levels) // 8


def ensure_database(
    settings: BuildSettings, blocks: BlockModel, tokens: Tensor, compressor: Compressor
) -> tuple[LevelDatabase, bool]:
    """Open the database that the settings name, building it or what is missing or damaged of it first.

    Args:
        blocks: the dense model; given back as it was.
        tokens: calibration token ids int64 [N, L].

    Returns: the database, and whether it was there complete.
    Raises: EvoPressError if it cannot be built: no room, no access, singular or non-finite Hessians, a lock that is never freed.
    """
    folder = settings.folder
    space = plan_space(blocks, compressor, method=settings.method)
    for unit in space.units:
        keys = [level.key for level in unit.levels]
        if settings.propagate is not None and settings.propagate not in keys:
            raise EvoPressError(f"activations cannot leave through level {settings.propagate!r}: {unit.name} has {', '.join(keys)}")
    database = _opened(folder)  # a manifest is written last, so a whole database needs no lock, and no right to write
    if database is not None:
        _remove_journal(folder)
        return database, True
    make_folder(folder)
    with alone_in(folder, timeout=settings.lock_timeout, waiting=f"waiting for another run that builds {folder}"):
        database = _opened(folder, warn=True)  # another run may have built it meanwhile
        if database is not None:
            return database, True
        _check_names_are_free(folder, len(blocks.blocks))
        entries = _finished_blocks(folder, len(blocks.blocks))
        _preflight(settings, space, entries, blocks, tokens)
        _build(settings, blocks, tokens, compressor, space, entries)
        return LevelDatabase.open(folder), False


def _opened(folder: Path, *, warn: bool = False) -> LevelDatabase | None:
    """Open a database if it is there and whole."""
    try:
        return LevelDatabase.open(folder)
    except DamagedDatabaseError as error:
        if warn and os.path.lexists(folder / MANIFEST):
            logger.warning("%s; what is damaged is built again", error)
        return None


def _remove_journal(folder: Path) -> None:
    """Remove what a build leaves behind that is killed right after it has written the manifest."""
    if (folder / _JOURNAL).exists():
        with suppress(OSError, EvoPressError), alone_in(folder, timeout=0.0):  # whoever else holds the lock may be building
            (folder / _JOURNAL).unlink(missing_ok=True)


def _check_names_are_free(folder: Path, num_blocks: int) -> None:
    """Raise EvoPressError if a folder lies where a file of the database belongs: it is not ours to remove."""
    for name in (MANIFEST, _JOURNAL, *(block_file(index) for index in range(num_blocks))):
        if (folder / name).is_dir() and not (folder / name).is_symlink():
            raise EvoPressError(f"{folder / name} is a folder, expected a file of the level database: move it away and start again")


def _finished_blocks(folder: Path, num_blocks: int) -> dict[int, dict[str, Any]]:
    """Return the entries of the blocks whose files are there and whole, from the manifest or else the journal."""
    try:
        candidates = list(entries_of(read_manifest(folder)).values())
    except DamagedDatabaseError:
        candidates = list(_read_journal(folder / _JOURNAL))
    entries = {}
    for entry in candidates:
        try:
            if 0 <= entry["block"] < num_blocks:
                check_block(folder, entry)
                entries[entry["block"]] = entry
        except DamagedDatabaseError as error:
            logger.warning("%s; the block is built again", error)
            entries.pop(entry["block"], None)
    return entries


def _read_journal(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        return
    for number, line in enumerate(load_bytes(path, what="journal").splitlines(), start=1):
        try:
            entry = parse_json(line, f"line {number} of {path}")
            check_file(entry)
            check_units(entry.get("units"), of_blocks=[entry["block"]])
            if type(entry.get("schema")) is not int or entry["schema"] != SCHEMA:
                raise ValueError(f"it has schema {shown(entry.get('schema'))}, expected {SCHEMA}")
            if not is_sealed(entry) or entry.get("database") != path.parent.name:
                raise ValueError("its content does not match its digest, or it is of another database")
        except (EvoPressError, ValueError) as error:
            logger.info(
                "line %d of %s is cut off, damaged or of another version; its block is built again: %s", number, path, error
            )
            continue
        yield entry


@dataclass(frozen=True)
class BuildNeeds:
    """What building a level database, or the rest of one, takes."""

    units: tuple[Unit, ...]
    """Those that are missing."""
    walked: int
    """Blocks that activations enter."""
    forwards: int
    """Passes of the whole text through one block."""
    disk_bytes: int
    memory_bytes: int
    """Of the host, beside the model."""
    device_bytes: int
    """Of the compute device, beside the model; 0 where that is the host."""

    @property
    def num_blocks(self) -> int:
        """Blocks to build."""
        return len({unit.block for unit in self.units})


def planned(settings: BuildSettings, blocks: BlockModel, tokens: Tensor, compressor: Compressor) -> tuple[Space, BuildNeeds]:
    """Return the space of a database and what `ensure_database` would need for what is missing of it now; changes nothing.

    Files are looked for, not read: one that is damaged shows later.

    Raises: EvoPressError if the compressor's settings fit no unit, with the unit's name.
    """
    space = plan_space(blocks, compressor, method=settings.method)
    try:
        found = set(entries_of(read_manifest(settings.folder)))
    except DamagedDatabaseError:
        found = {entry["block"] for entry in _read_journal(settings.folder / _JOURNAL)}
    return space, _needs(settings, space, {i for i in found if (settings.folder / block_file(i)).is_file()}, blocks, tokens)


def _needs(settings: BuildSettings, space: Space, entries: Collection[int], blocks: BlockModel, tokens: Tensor) -> BuildNeeds:
    """Add up what the blocks without an entry need."""
    missing = tuple(unit for unit in space.units if unit.block not in entries)
    disk = database_bytes(Space(space.method, missing))
    store = settings.hessians if settings.propagate is None else None
    unseen = {unit.block for unit in missing if store is None or not store.has_record(unit.block)}
    if store is not None:
        disk += sum(_hessian_bytes(blocks, index) for index in unseen)
    if not missing:
        return BuildNeeds(units=(), walked=0, forwards=0, disk_bytes=0, memory_bytes=0, device_bytes=0)
    buffer = tokens.numel() * blocks.hidden_size * blocks.dtype.itemsize if unseen else 0
    widest = max(module.in_features for module in blocks.linears(0).values())
    sweeps, on_host = 6 * widest * widest * 4 + 2**28, blocks.device.type == "cpu"
    in_memory = settings.activations == "memory"
    walked = max(unseen, default=-1) + 1
    return BuildNeeds(
        units=missing,
        walked=walked,
        forwards=walked if settings.propagate is None else 2 * walked - bool(walked),
        disk_bytes=disk + (0 if in_memory else buffer),
        memory_bytes=(buffer if in_memory else 0) + (sweeps if on_host else 2**28),
        device_bytes=0 if on_host else sweeps,
    )


def check_room(settings: BuildSettings, needs: BuildNeeds) -> None:
    """Raise EvoPressError unless the disk and the host's memory have room for a build."""
    folder = next(path for path in (settings.folder, *settings.folder.parents) if path.exists())
    free, available = shutil.disk_usage(folder).free, psutil.virtual_memory().available
    if needs.disk_bytes * 1.02 > free:
        raise EvoPressError(
            f"building the level database needs {needs.disk_bytes / 1e9:.2f} GB but {settings.folder} has {free / 1e9:.2f} GB "
            "free: free some space, store fewer levels (method.levels) or use another level_db.root"
        )
    if needs.memory_bytes > available:
        raise EvoPressError(
            f"building the level database needs about {needs.memory_bytes / 1e9:.2f} GB of memory but {available / 1e9:.2f} GB are "
            "available: use fewer calibration tokens (data.calibration_tokens) or level_db.activations=disk"
        )


def _preflight(settings: BuildSettings, space: Space, entries: Mapping[int, Any], blocks: BlockModel, tokens: Tensor) -> None:
    """Compare what the build needs with what there is, before the first forward pass."""
    needs = _needs(settings, space, entries, blocks, tokens)
    logger.info(
        "level database: %d blocks to build, %d units, %d levels, %.2f GB on disk, about %.2f GB of memory, %d calibration tokens",
        needs.num_blocks,
        len(needs.units),
        sum(len(unit.levels) for unit in needs.units),
        needs.disk_bytes / 1e9,
        needs.memory_bytes / 1e9,
        tokens.numel(),
    )
    check_room(settings, needs)


def _build(
    settings: BuildSettings,
    blocks: BlockModel,
    tokens: Tensor,
    compressor: Compressor,
    space: Space,
    entries: dict[int, dict[str, Any]],
) -> None:
    """Walk over the blocks up to the last missing one; then write the manifest."""
    folder = settings.folder
    _rewrite_journal(folder / _JOURNAL, entries)  # before the manifest goes: one of them always names what is finished
    (folder / MANIFEST).unlink(missing_ok=True)
    sync_folder(folder)
    missing = [index for index in range(len(blocks.blocks)) if index not in entries]
    store = settings.hessians if settings.propagate is None else None
    unseen = [index for index in missing if store is None or index not in store]
    walked = range(unseen[-1] + 1 if unseen else 0)  # blocks that activations must pass or enter
    units = {unit.name: unit for unit in space.units}
    batch = max(settings.batch_tokens // tokens.shape[1], 1)
    with _activations(folder, settings.activations, blocks, tokens, batch) if unseen else nullcontext(torch.empty(0)) as buffer:
        for index in track(sorted({*missing, *walked}), "building the level database"):
            with blocks.on_device(index):
                if index in missing:
                    kept = store.read(index) if store is not None and index not in unseen else None
                    advanced = kept is None and settings.propagate is None and index + 1 in walked
                    hessians = kept or collect_hessians(blocks, index, buffer, batch, advance=advanced)
                    if store is not None and kept is None:
                        store.write(index, hessians)
                    compressed = _compress_block(blocks, index, hessians, compressor)
                    entries[index] = write_block(folder, index, compressed, units)
                    _append(folder / _JOURNAL, entries[index])
                    decoded = _at_level(compressed, units, settings.propagate)
                else:
                    advanced = False
                    decoded = _stored_level(folder, entries[index], settings.propagate)
                if index + 1 in walked and not advanced:
                    _propagate(blocks, index, buffer, batch, decoded)
    write_manifest(
        folder,
        method=settings.method,
        fingerprint=settings.fingerprint,
        recipe=settings.recipe,
        entries=[entries[index] for index in range(len(blocks.blocks))],
    )
    (folder / _JOURNAL).unlink(missing_ok=True)


def _hessian_bytes(blocks: BlockModel, index: int) -> int:
    """Bytes of a block's Hessians, at most: which linears share an input shows only in a forward."""
    return sum(4 * linear.in_features**2 for linear in blocks.linears(index).values())


def complete_hessians(
    store: HessianStore, blocks: BlockModel, tokens: Tensor, *, batch_tokens: int = 4096, activations: str = "memory"
) -> None:
    """Compute what is missing or damaged of a store, in one walk over the blocks up to the last such one.

    Args:
        blocks: the dense model; given back as it was.
        tokens: calibration token ids int64 [N, L], those that the store is of.
        activations: where they live between blocks: "memory" (of the host) or "disk".
    """
    missing = [index for index in range(len(blocks.blocks)) if index not in store]
    if not missing:
        return
    make_folder(store.folder)
    batch = max(batch_tokens // tokens.shape[1], 1)
    with _activations(store.folder, activations, blocks, tokens, batch) as buffer:
        for index in track(range(missing[-1] + 1), "computing Hessians"):
            with blocks.on_device(index):
                if index in missing:
                    store.write(index, collect_hessians(blocks, index, buffer, batch, advance=index < missing[-1]))
                else:
                    _propagate(blocks, index, buffer, batch, {})


def _append(path: Path, entry: dict[str, Any]) -> None:
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(_journal_line(path, entry))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise explained(error, path) from error


def _rewrite_journal(path: Path, entries: Mapping[int, dict[str, Any]]) -> None:
    """Let the journal name just the blocks that are whole."""
    text = "".join(_journal_line(path, entries[index]) for index in sorted(entries))
    write_atomically(path, lambda temporary: _write_text(temporary, text))


def _journal_line(path: Path, entry: Mapping[str, Any]) -> str:
    """Return a line that holds for one database alone, and shows any change of it."""
    return json.dumps(seal({"schema": SCHEMA, "database": path.parent.name, **entry})) + "\n"


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


@contextmanager
def _activations(folder: Path, where: str, blocks: BlockModel, tokens: Tensor, batch: int) -> Iterator[Tensor]:
    """Hold the hidden states that enter the current block, [N, L, d], in host memory or in a file."""
    shape = (*tokens.shape, blocks.hidden_size)
    if where == "disk":
        count = tokens.numel() * blocks.hidden_size
        buffer = _mapped(temporary_beside(folder / "activations"), count, blocks.dtype).reshape(shape)
    else:
        buffer = torch.empty(shape, dtype=blocks.dtype)
    finite = []
    for start in range(0, len(tokens), batch):
        embedded = blocks.embed(tokens[start : start + batch])
        finite.append(torch.isfinite(embedded).all())
        buffer[start : start + batch] = embedded.to(buffer.device)
    if (broken := _first_not_finite(finite, batch, len(tokens))) is not None:
        raise EvoPressError(f"the embedding is not finite, first on {broken}: {blocks.advice}")
    yield buffer


def _mapped(path: Path, count: int, dtype: torch.dtype) -> Tensor:
    """Return a flat tensor in a file that is gone when the tensor is, or the process, however that ends.

    Raises: EvoPressError if the disk has no room. It is taken here: a mapped file that finds none later ends the process.
    """
    try:
        with path.open("xb") as file:
            _take_room(file.fileno(), count * dtype.itemsize)
        return torch.from_file(str(path), shared=True, size=count, dtype=dtype)
    except OSError as error:
        raise explained(error, path) from error
    except RuntimeError as error:  # torch's own, on opening or mapping
        raise EvoPressError(f"{path} cannot be mapped ({str(error).splitlines()[0]}): use level_db.activations=memory") from error
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _take_room(descriptor: int, size: int) -> None:
    """Fill a new file with zeros that have their place on the disk."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except (AttributeError, OSError) as error:  # not every system has it, nor every file system
        if isinstance(error, OSError) and error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise
        zeros = bytes(2**20)
        for start in range(0, size, len(zeros)):
            os.write(descriptor, zeros[: size - start])


def _compress_block(blocks: BlockModel, index: int, hessians: BlockHessians, compressor: Compressor) -> dict[str, list[Compressed]]:
    """Compress all units of a block to all their levels, those that share an input together."""
    linears = blocks.linears(index)
    compressed: dict[str, list[Compressed]] = {}
    for owner, H in hessians.hessians.items():
        weights = {name: linears[name].weight.detach() for name in linears if hessians.owners[name] == owner}
        try:
            results = compressor.compress(weights, H.to(blocks.device))
        except EvoPressError as error:
            raise type(error)(f"{', '.join(weights)}: {error}") from None
        compressed |= {name: list(levels) for name, levels in results.items()}
    return {name: compressed[name] for name in linears}


def collect_hessians(blocks: BlockModel, index: int, buffer: Tensor, batch: int, *, advance: bool = False) -> BlockHessians:
    """Run block `index` over activations [N, L, d] and sum one Hessian per distinct input, not per linear.

    Linears that are handed the same tensor (q, k and v; gate and up) share the first one's Hessian.

    Args: advance: replace the activations by what the dense block makes of them, in the same forward.

    Raises: EvoPressError if an activation is not finite, with the unit's name and the first sequences.
    """
    blocks.prepare(buffer.shape[1])  # not under the hooks
    linears = blocks.linears(index)
    owners: dict[str, str] = {}
    sums: dict[str, HessianSum] = {}
    alive: list[tuple[str, Tensor]] = []  # inputs of this forward, held so that no address is used twice

    def caught(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            owner = next((o for o, seen in alive if seen.data_ptr() == x.data_ptr() and seen.shape == x.shape), name)
            assert owners.setdefault(name, owner) == owner, f"{name} shares its input with {owner} in one batch only"
            if owner == name:
                alive.append((name, x))
                # OPT hands its MLP [b·l, d]; n counts sequences, so give them back their axis.
                X = x.reshape(len(current), -1, x.shape[-1])
                sums.setdefault(name, HessianSum(x.shape[-1], device=x.device)).add(X)

        return hook

    handles = [module.register_forward_pre_hook(caught(name)) for name, module in linears.items()]
    finite: list[Tensor] = []  # what is not finite inside a block is not so where it ends; read once, so that no batch waits for it
    try:
        for start in range(0, len(buffer), batch):
            current = buffer[start : start + batch].to(blocks.device)
            output = blocks.run(index, current)
            finite.append(torch.isfinite(output).all())
            if advance:
                buffer[start : start + batch] = output.to(buffer.device)
            alive.clear()
    finally:
        for handle in handles:
            handle.remove()
    idle = [name for name in linears if name not in owners]
    if idle:
        raise EvoPressError(
            f"{idle[0]} was never called in its block's forward: its family's adapter names a module that is not used"
        )
    if (where := _first_not_finite(finite, batch, len(buffer))) is not None:
        broken = next((name for name, linear in linears.items() if not bool(torch.isfinite(linear.weight).all())), None)
        unit = next((owner for owner, total in sums.items() if not total.finite), None)
        what = f"the input activations of {unit} are" if unit else f"the output of {blocks.block_name(index)} is"
        what = what if broken is None else f"the weight of {broken} is"
        raise EvoPressError(f"{what} not finite, first on {where}: {blocks.advice}")
    hessians = {}
    for owner, total in sums.items():
        try:
            hessians[owner] = total.result()
        except EvoPressError as error:
            raise type(error)(f"{', '.join(name for name in linears if owners[name] == owner)}: {error}") from None
    return BlockHessians(owners, hessians)


def _first_not_finite(finite: list[Tensor], batch: int, count: int) -> str | None:
    """Name the first batch of sequences that is not finite, given a flag, bool [], for each of them; None if all are."""
    flags = torch.stack(finite).tolist() if finite else []
    if all(flags):
        return None
    first = flags.index(False) * batch
    return f"calibration sequences {first} to {min(first + batch, count) - 1}"


def _at_level(compressed: Mapping[str, list[Compressed]], units: Mapping[str, Unit], key: str | None) -> dict[str, Tensor]:
    """Decode the units at the level with this key; none of them if the key is None."""
    if key is None:
        return {}
    return {
        name: next(r for level, r in zip(units[name].levels, results, strict=True) if level.key == key).payload.decode()
        for name, results in compressed.items()
    }


def _stored_level(folder: Path, entry: dict[str, Any], key: str | None) -> dict[str, Tensor]:
    """Decode a finished block's units at the level with this key from its file."""
    if key is None:
        return {}
    database = LevelDatabase(folder, {"method": "", "units": entry["units"], "files": [entry]})
    return {
        unit.name: database.read(i, next(j for j, level in enumerate(unit.levels) if level.key == key)).decode()
        for i, unit in enumerate(database.space.units)
    }


def _propagate(blocks: BlockModel, index: int, buffer: Tensor, batch: int, decoded: Mapping[str, Tensor]) -> None:
    """Replace activations [N, L, d] by what block `index` makes of them, with these weights in place of the dense ones."""
    linears = blocks.linears(index)
    dense = {name: linears[name].weight.data for name in decoded}
    try:
        for name, weight in decoded.items():
            linears[name].weight.data = weight.to(blocks.device)
        finite = []
        for start in range(0, len(buffer), batch):
            output = blocks.run(index, buffer[start : start + batch].to(blocks.device))
            finite.append(torch.isfinite(output).all())
            buffer[start : start + batch] = output.to(buffer.device)
    finally:
        for name, weight in dense.items():
            linears[name].weight.data = weight
    if (where := _first_not_finite(finite, batch, len(buffer))) is not None:
        compressed = ", at the level that activations leave through," if decoded else ""
        raise EvoPressError(
            f"the output of {blocks.block_name(index)}{compressed} is not finite, first on {where}: {blocks.advice}"
        )
