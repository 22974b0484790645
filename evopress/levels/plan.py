"""What a level database will hold, and what building what is missing of it takes: from shapes and files, without a forward."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evopress.compress.compressor import Compressor, Working, sweep_bytes
from evopress.compress.hessian import multiplies_exactly
from evopress.currencies import SPARSITY
from evopress.errors import EvoPressError
from evopress.levels.hessians import HessianStore
from evopress.levels.journal import JOURNAL, read_journal
from evopress.levels.passage import held_on_host, stay_on_device
from evopress.levels.store import DamagedDatabaseError, block_file, damage_in, entries_of, fingerprint, read_manifest
from evopress.models.blocks import BlockModel
from evopress.progress import in_bytes
from evopress.ranks import SHARES, batch_within_share, largest_shard, launched, processes
from evopress.resources import Needs
from evopress.units import Level, Space, Unit

CORRECTED_FORWARDS = 6
"""More forwards of a block where weights are corrected: to each of some four inputs and no further, in two models; one to go on."""


@dataclass(frozen=True, kw_only=True)
class WalkSettings:
    """How levels are made, block by block; nothing here changes them beyond rounding except what `recipe` says."""

    root: Path
    """A database lies in <root>/<model>/<method>-<fingerprint>, refined levels in <root>/<method>-<fingerprint>."""
    recipe: dict[str, Any]
    """Everything that decides the content: model and data digests, compressor settings, propagated level."""
    correction: float = 0.0
    """Share of what inputs have lost behind compressed blocks that new weights make good; `recipe` says it too."""
    batch_tokens: int = 4096
    """Tokens per forward of one block."""
    activations: str = "memory"
    """Where calibration activations live between blocks: "memory" (of the host) or "disk"."""


@dataclass(frozen=True, kw_only=True)
class BuildSettings(WalkSettings):
    """How a database is built."""

    method: str
    model_name: str
    propagate: str | None
    """Key of the level through which activations leave a block ("4"); None: dense."""
    hessians: HessianStore | None = None
    """Where dense activations' Hessians are kept for further databases; used where activations leave blocks dense."""
    lock_timeout: float = 24 * 3600.0
    """Seconds to wait for another process that builds the same database."""

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.recipe)

    @property
    def corrects(self) -> bool:
        """Tell whether weights make good what their inputs have lost; dense activations have lost nothing."""
        return self.correction > 0 and self.propagate is not None

    def leaves_by(self, unit: Unit) -> Level | None:
        """Return a unit's level through which activations leave its block; None: its dense weight."""
        return next((level for level in unit.levels if level.key == self.propagate), None)

    @property
    def folder(self) -> Path:
        return self.root / self.model_name / f"{self.method}-{self.fingerprint}"


def plan_space(blocks: BlockModel, compressor: Compressor, *, method: str) -> Space:
    """List all units with their levels from shapes alone; no forward pass.

    Raises: EvoPressError if the compressor's settings fit no unit, with the unit's name.
    """
    units = []
    for index in blocks.parts:
        for name, slot in blocks.slots(index).items():
            rows, columns = slot.weight.shape
            try:
                levels = compressor.levels((rows, columns), unit=name)
            except EvoPressError as error:
                raise EvoPressError(f"{name}: {error}") from None
            units.append(Unit(name=name, block=index, kind=slot.kind, size=rows * columns, levels=levels))
    return Space(method=method, units=tuple(units))


def database_bytes(space: Space) -> int:
    """Bytes that a space's levels take on disk, all of them stored (file headers aside)."""
    return sum(level.stored_bits for unit in space.units for level in unit.levels) // 8


@dataclass(frozen=True)
class BuildNeeds:
    """What building a level database, or the rest of one, takes."""

    units: tuple[Unit, ...]
    """Those that are missing."""
    all_blocks: int
    """Of the model."""
    walked: int = 0
    """Blocks that activations enter."""
    forwards: int = 0
    """Passes of the whole text through one block."""
    tokens: int = 0
    """Of the text, that go through blocks; of several processes those of one."""
    compressing: float = 0.0
    """Share of a block's compression that one process does."""
    disk_bytes: int = 0
    hessian_bytes: int = 0
    """Of the disk, what Hessians take that are kept for later levels."""
    memory_bytes: int = 0
    """Of the host, beside the model."""
    device_bytes: int = 0
    """Of the compute device, beside the model; 0 where that is the host."""
    damage: DamagedDatabaseError | None = None
    """Of the manifest that is there."""

    @property
    def num_blocks(self) -> int:
        """Blocks to build."""
        return len({unit.block for unit in self.units if not unit.is_outside})

    @property
    def what(self) -> str:
        """Say what is to build: "2 of 30 blocks, head, embedding"."""
        return ", ".join([f"{self.num_blocks} of {self.all_blocks} blocks", *(unit.kind for unit in self.units if unit.is_outside)])

    def in_folder(self, folder: Path) -> Needs:
        """Return it as what a run's stage takes, whose files are in a folder."""
        fewer = (
            "method.num_levels"
            if any(level.source == SPARSITY for unit in self.units for level in unit.levels)
            else "method.levels"
        )
        kept = f", keep no Hessians ({in_bytes(self.hessian_bytes)}; level_db.keep_hessians=false)" if self.hessian_bytes else ""
        return Needs(
            "database",
            f"{self.what} to build",
            disk={folder: self.disk_bytes},
            memory=self.memory_bytes,
            device=self.device_bytes,
            name="building the level database",
            less_memory="use fewer calibration tokens (data.calibration_tokens) or level_db.activations=disk",
            less_disk=f"store fewer levels ({fewer}){kept} or use another level_db.root",
        )


def planned(
    settings: BuildSettings, blocks: BlockModel, tokens: Tensor, compressor: Compressor, *, seen: bool = False
) -> tuple[Space, BuildNeeds]:
    """Return the space of a database and what `ensure_database` would need for what is missing of it now; changes nothing.

    Files are looked for, not read: one that is damaged shows later.

    Args: seen: by then all Hessians will be there, of dense activations.

    Raises: EvoPressError if the compressor's settings fit no unit, with the unit's name.
    """
    space = plan_space(blocks, compressor, method=settings.method)
    damage = None
    try:
        found = set(entries_of(read_manifest(settings.folder)))
    except DamagedDatabaseError as error:
        damage = damage_in(settings.folder, error)
        found = {entry["block"] for entry in read_journal(settings.folder / JOURNAL)}
    whole = {i for i in found if (settings.folder / block_file(i)).is_file()}
    return space, replace(needs_of(settings, space, whole, blocks, tokens, compressor, seen=seen), damage=damage)


def needs_of(
    settings: BuildSettings,
    space: Space,
    entries: Collection[int],
    blocks: BlockModel,
    tokens: Tensor,
    compressor: Compressor,
    *,
    seen: bool = False,
) -> BuildNeeds:
    """Add up what the blocks without an entry need; see `planned`."""
    missing = tuple(unit for unit in space.units if unit.block not in entries)
    disk = database_bytes(Space(space.method, missing))
    store = settings.hessians if settings.propagate is None else None
    unseen = {
        unit.block
        for unit in missing
        if sees_activations(blocks, unit.block) and not seen and (store is None or not store.has_record(unit.block))
    }
    hessians = sum(_hessian_bytes(blocks, index) for index in unseen) if store is not None else 0
    if not missing:
        return BuildNeeds(units=(), all_blocks=len(blocks.blocks))
    mine = largest_shard(len(tokens)) * tokens.shape[1]
    per_token = blocks.hidden_size * blocks.dtype.itemsize * (2 if settings.corrects else 1) if unseen else 0
    buffer = mine * per_token
    parts = [[unit for unit in missing if unit.block == index] for index in sorted({unit.block for unit in missing})]
    batch = batch_of(tokens, settings.batch_tokens)
    text: dict[str, Any] = {"batch": batch, "length": tokens.shape[1], "corrects": settings.corrects, "settled": settings.leaves_by}
    device = max(part_bytes(blocks, units, compressor, **text) for units in parts)
    host = max(database_bytes(Space(settings.method, tuple(units))) for units in parts)  # packed, as they are written
    on_host, in_memory = blocks.device.type == "cpu", settings.activations == "memory"
    beside = in_memory and stay_on_device(buffer, blocks.device)
    walked = min(max(unseen, default=-1) + 1, len(blocks.blocks))
    left = blocks.head_part in unseen  # the last block, whose output is needed
    return BuildNeeds(
        units=missing,
        all_blocks=len(blocks.blocks),
        walked=walked,
        forwards=(walked if settings.propagate is None else 2 * walked - bool(walked and not left))
        + (CORRECTED_FORWARDS * walked if settings.corrects else 0),
        tokens=mine,
        compressing=compressing_share(blocks, parts[0], corrects=settings.corrects),
        disk_bytes=disk + hessians + (0 if in_memory else tokens.numel() * per_token),
        hessian_bytes=hessians,
        memory_bytes=(held_on_host(buffer, blocks.device) if in_memory and not beside else 0) + (device if on_host else host),
        device_bytes=0 if on_host else device + (buffer if beside else 0),
    )


def _hessian_bytes(blocks: BlockModel, index: int) -> int:
    """Bytes of a block's Hessians, at most: which linears share an input shows only in a forward."""
    return sum(4 * slot.weight.shape[1] ** 2 for slot in blocks.slots(index).values())


def batch_of(tokens: Tensor, batch_tokens: int) -> int:
    """Return the tokens of a forward over calibration text."""
    return min(batch_within_share(len(tokens), max(batch_tokens // tokens.shape[1], 1)), len(tokens)) * tokens.shape[1]


def _inputs(blocks: BlockModel, units: Sequence[Unit]) -> tuple[dict[str, tuple[int, int]], dict[tuple[str, int, bool], list[str]]]:
    """Return the shapes of a part's weights, and which of its units share an input: those of one module, but for its last one."""
    shapes = {n: (int(slot.weight.shape[0]), int(slot.weight.shape[1])) for n, slot in blocks.slots(units[0].block).items()}
    of = {unit.name for unit in units}
    names = [name for name in shapes if name in of]
    lasts = {name.rpartition(".")[0]: name for name in names}
    inputs: dict[tuple[str, int, bool], list[str]] = {}
    for name in names:
        outer = name.rpartition(".")[0]
        inputs.setdefault((outer, shapes[name][1], lasts[outer] == name), []).append(name)
    return shapes, inputs


def compressing_share(blocks: BlockModel, units: Sequence[Unit], *, corrects: bool) -> float:
    """Return the share of a part's compression that the busiest process does: of its inputs, or of the weights of each."""
    _, inputs = _inputs(blocks, units)
    if corrects:
        return sum(largest_shard(len(names), 1) for names in inputs.values()) / len(units)
    return largest_shard(len(inputs), 1) / len(inputs)


def part_bytes(
    blocks: BlockModel,
    units: Sequence[Unit],
    compressor: Compressor,
    *,
    batch: int,
    length: int,
    corrects: bool,
    settled: Callable[[Unit], Level | None],
) -> int:
    """Return the bytes that compressing units of a part takes at its peak where it is computed, beside the activations.

    First text goes through the block, then come its inputs one after the other. What was made for one is packed, and what stays is
    the level that later units meet, and on the host what is written. What shares an input beyond a module shows only in a forward.

    Args:
        batch: tokens of a forward.
        length: of a sequence.
        corrects: weights make good what their inputs have lost.
        settled: the level at which later units meet one; None: they meet its weight.
    """
    index, on_host = units[0].block, blocks.device.type == "cpu"
    of = {unit.name: unit for unit in units}
    shapes, inputs = _inputs(blocks, units)
    hessians = sum(4 * columns**2 for _, columns, _ in inputs) if sees_activations(blocks, index) else 0
    summed = sums_at_once() * hessians
    working: Working = getattr(compressor, "working", Working())
    held, peak, most_lost = 0, 0, 0
    for (_, columns, last), those in inputs.items():
        group = [shapes[name] for name in those]
        most, result = working.bytes(group, [of[name].levels for name in those], room=sweep_bytes(blocks.device))
        there = hessians
        if corrects:  # H and D of this input alone, and E where a block adds the output (`compress/asymmetric.py`)
            weights = columns * sum(rows for rows, _ in group)
            there = max(hessians, 8 * columns**2 + 4 * weights * (last and index < len(blocks.blocks)))
            most_lost = max(most_lost, there + held)
            most += blocks.dtype.itemsize * weights
        levels = [(level, of[name].size) for name in those for level in of[name].levels]
        packing = 5 * max(of[name].size for name in those) + on_host * sum(working.packed(level, size) for level, size in levels)
        peak = max(peak, there + held + max(most, result + packing))
        held += on_host * sum(level.stored_bits // 8 for level, _ in levels)
        held += sum(working.unpacked(level, of[name].size) for name in those if (level := settled(of[name])) is not None)
        if not corrects and processes() == 1:  # it is given up; of several processes each gives up those of its share
            hessians -= 4 * columns**2 * sees_activations(blocks, index)
    placed = blocks.dtype.itemsize * sum(unit.size for unit in units if settled(unit) is not None)
    peak = max(peak, held + placed)
    if index < len(blocks.blocks):
        hidden, widest, itemsize = blocks.hidden_size, blocks.widest, blocks.dtype.itemsize
        exact = multiplies_exactly(torch.empty(0, dtype=blocks.dtype, device=blocks.device)) or itemsize == 4
        forward, multiplied = blocks.forward_bytes(batch, length), batch * (widest + 2 * hidden) * itemsize
        multiplied += 0 if exact else 4 * batch * widest  # the widest input, in float32
        if corrects:  # what the dense model has at that input waits for what the compressed one has, and is multiplied with it
            forward += batch * (widest + 2 * hidden) * itemsize
            multiplied += batch * 2 * widest * itemsize + (0 if exact else 4 * batch * widest)
        inputs_held = 3 * batch * hidden * itemsize
        peak = max(peak, max(most_lost, summed, placed) + inputs_held + max(forward, multiplied))
        peak += blocks.carried_bytes(index)
    return peak


def sums_at_once() -> int:
    """Return how many sums of a block's Hessians a process holds at most: one, or a branch of the tree of its shares."""
    return (SHARES // processes()).bit_length() if launched() else 1


def sees_activations(blocks: BlockModel, index: int) -> bool:
    """Tell whether a part's levels go by activations that enter it: a block's and the head's do, an untied embedding's do not."""
    return index < len(blocks.blocks) or index == blocks.head_part
