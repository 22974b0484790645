"""Build a level database in one walk over the blocks, or go on where an earlier build stopped.

Calibration activations enter block i, the first from the dense embedding; one Hessian per distinct input is accumulated; all levels
of all units on that input are made and written; the activations leave through the block, dense or at the level that `propagate`
names. Where weights are corrected for what these have lost, the dense model's walk beside. Only one block and its inputs are on the
device at a time. Head and embedding, where they are units, come last (outside.py).

Shapes: N sequences of L tokens, d hidden size, C input columns of a linear.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evopress.compress.compressor import Compressed, Compressor
from evopress.errors import EvoPressError
from evopress.files import make_folder, sync_folder
from evopress.levels.calibration import activations_of, propagate, room_for_walks
from evopress.levels.compressing import Walking, compress_units, hessians_of, named
from evopress.levels.hessians import BlockHessians
from evopress.levels.journal import JOURNAL, append, read_journal, rewrite_journal
from evopress.levels.locking import alone_in
from evopress.levels.outside import compress_embedding
from evopress.levels.passage import give_back_pinned
from evopress.levels.plan import BuildSettings, needs_of, plan_space, sees_activations
from evopress.levels.store import (
    MANIFEST,
    DamagedDatabaseError,
    Encoded,
    LevelDatabase,
    block_file,
    check_block,
    damage_in,
    encoded,
    entries_of,
    read_manifest,
    told_of,
    write_block,
    write_manifest,
)
from evopress.models.blocks import BlockModel
from evopress.progress import in_bytes, track
from evopress.ranks import batch_within_share, collective, map_shards, on_all_ranks, on_rank_zero, shares
from evopress.resources import check_room, rooms
from evopress.units import Space, Unit

logger = logging.getLogger(__name__)


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
            raise EvoPressError(
                f"method.propagate_bits={settings.propagate} is no level of {unit.name}: choose one of {', '.join(keys)}, or null"
            )
    try:
        database = LevelDatabase.open(folder)  # a manifest is written last, so a whole one needs no lock, and no right to write
        _remove_journal(folder)
        return database, True
    except DamagedDatabaseError as error:
        damage = damage_in(folder, error)
    with told_of(damage):
        make_folder(folder)
    with alone_in(folder, timeout=settings.lock_timeout, waiting=f"waiting for another run that builds {folder}"):
        if (built := opened_whole(folder)) is not None:  # another run may have built it meanwhile
            return built, True
        _check_names_are_free(folder, len(blocks.parts))
        entries = _finished_blocks(folder, len(blocks.parts))
        _preflight(settings, space, entries, blocks, tokens, compressor)
        _build(settings, blocks, tokens, compressor, entries)
        return LevelDatabase.open(folder), False


def opened_whole(folder: Path) -> LevelDatabase | None:
    """Open a database if it is there and whole; say what is damaged."""
    try:
        return LevelDatabase.open(folder)
    except DamagedDatabaseError as error:
        if damage_in(folder, error):
            logger.warning("%s; what is damaged is built again", error)
        return None


def _remove_journal(folder: Path) -> None:
    """Remove what a build leaves behind that is killed right after it has written the manifest."""
    if (folder / JOURNAL).exists():
        with suppress(OSError, EvoPressError), alone_in(folder, timeout=0.0):  # whoever else holds the lock may be building
            (folder / JOURNAL).unlink(missing_ok=True)


def _check_names_are_free(folder: Path, num_parts: int) -> None:
    """Raise EvoPressError if a folder lies where a file of the database belongs: it is not ours to remove."""
    for name in (MANIFEST, JOURNAL, *(block_file(index) for index in range(num_parts))):
        if (folder / name).is_dir() and not (folder / name).is_symlink():
            raise EvoPressError(f"{folder / name} is a folder, expected a file of the level database: move it away and start again")


def _finished_blocks(folder: Path, num_parts: int) -> dict[int, dict[str, Any]]:
    """Return the entries of the blocks whose files are there and whole, from the manifest or else the journal."""
    try:
        candidates = list(entries_of(read_manifest(folder)).values())
    except DamagedDatabaseError:
        candidates = list(read_journal(folder / JOURNAL))
    entries = {}
    for entry in candidates:
        try:
            if 0 <= entry["block"] < num_parts:
                check_block(folder, entry)
                entries[entry["block"]] = entry
        except DamagedDatabaseError as error:
            logger.warning("%s; the block is built again", error)
            entries.pop(entry["block"], None)
    return entries


def _preflight(
    settings: BuildSettings, space: Space, entries: Mapping[int, Any], blocks: BlockModel, tokens: Tensor, compressor: Compressor
) -> None:
    """Compare what the build needs with what there is, before the first forward pass."""
    needs = needs_of(settings, space, entries, blocks, tokens, compressor)
    logger.info(
        "level database: %s to build, %d units, %d levels, %s on disk, about %s of memory, %d calibration tokens",
        needs.what,
        len(needs.units),
        sum(len(unit.levels) for unit in needs.units),
        in_bytes(needs.disk_bytes),
        in_bytes(needs.memory_bytes),
        tokens.numel(),
    )
    check_room([needs.in_folder(settings.folder)], rooms(blocks), offload=blocks.offload)


def _build(
    settings: BuildSettings,
    blocks: BlockModel,
    tokens: Tensor,
    compressor: Compressor,
    entries: dict[int, dict[str, Any]],
) -> None:
    """Build the missing blocks; then write the manifest."""
    folder = settings.folder
    rewrite_journal(folder / JOURNAL, entries)  # before the manifest goes: one of them always names what is finished
    (folder / MANIFEST).unlink(missing_ok=True)
    sync_folder(folder)
    store = settings.hessians if settings.propagate is None else None
    missing = [index for index in blocks.parts if index not in entries]
    unseen = [index for index in missing if sees_activations(blocks, index) and (store is None or index not in store)]
    entries = _walk(blocks, settings, tokens, compressor, entries, unseen)
    give_back_pinned()
    write_manifest(
        folder,
        method=settings.method,
        fingerprint=settings.fingerprint,
        recipe=settings.recipe,
        entries=[entries[index] for index in blocks.parts],
    )
    read_manifest(folder)  # as a later run does, before what names the blocks is gone
    (folder / JOURNAL).unlink(missing_ok=True)


@collective
def _walk(
    blocks: BlockModel,
    settings: BuildSettings,
    tokens: Tensor,
    compressor: Compressor,
    entries: Mapping[int, dict[str, Any]],
    unseen: Sequence[int],
) -> dict[int, dict[str, Any]]:
    """Walk over the blocks up to the last missing one, and return the entries of all.

    Every process has the activations of its shares of the text and compresses some of a block's units; the first one writes.

    Args: unseen: parts whose Hessians are nowhere yet.
    """
    folder, entries = settings.folder, dict(entries)
    missing = [index for index in blocks.parts if index not in entries]
    walked = range(unseen[-1] + 1 if unseen else 0)  # blocks that activations must pass or enter, the head after them
    units = {unit.name: unit for unit in plan_space(blocks, compressor, method=settings.method).units}
    batch, mine = batch_within_share(len(tokens), max(settings.batch_tokens // tokens.shape[1], 1)), shares(len(tokens))
    walks = (2 if settings.corrects else 1) if unseen else 0
    found = room_for_walks(folder, settings.activations, blocks, tokens, mine, walks=walks) if walks else []
    buffer, *dense = [activations_of(room, blocks, tokens, batch, mine) for room in found] or [torch.empty(0)]
    walking = Walking(buffer, batch, correction=settings.correction, mine=mine, dense=dense[0] if dense else None)
    for index in track(sorted({*missing, *walked}), "building the level database"):
        with blocks.on_device(index):
            if index in missing:
                on = index + 1 in walked
                entries[index], decoded, advanced = _built(
                    blocks, settings, tokens, compressor, walking, units, index, unseen, on=on
                )
            else:
                advanced = False
                decoded = _stored_level(folder, entries[index], settings.propagate) if index + 1 in walked else {}
            if index + 1 in walked and not advanced:
                propagate(blocks, index, buffer, batch, decoded, mine=mine)
                if walking.dense is not None:
                    propagate(blocks, index, walking.dense, batch, {}, mine=mine)
            del decoded  # before the next block
    return entries


def _built(
    blocks: BlockModel,
    settings: BuildSettings,
    tokens: Tensor,
    compressor: Compressor,
    walking: Walking,
    units: Mapping[str, Unit],
    index: int,
    unseen: Sequence[int],
    *,
    on: bool,
) -> tuple[dict[str, Any], dict[str, Tensor], bool]:
    """Compress a part and write it; of what was made, the next part finds no more in memory than is returned.

    Args: on: activations go on to the next part.

    Returns: its entry, its weights at the level that activations leave through, and whether they have left it already.
    """
    folder, store = settings.folder, settings.hessians if settings.propagate is None else None
    kept = store.read(index) if store is not None and sees_activations(blocks, index) and index not in unseen else None
    advanced = kept is None and settings.propagate is None and on
    hessians = kept or _hessians(blocks, index, walking, advance=advanced)
    if store is not None and index in unseen:
        on_rank_zero(partial(store.write, index, hessians))
    made, decoded = _compress_part(blocks, index, hessians, tokens, compressor, walking, units, settings.propagate)
    parts = [part for parts in on_all_ranks(lambda: made, to_first=True) for part in parts]
    return on_rank_zero(partial(_write, folder, index, parts, list(blocks.slots(index)))), decoded, advanced


def _write(folder: Path, index: int, parts: Sequence[Encoded], order: list[str]) -> dict[str, Any]:
    """Write a block of what each process has of it, and note that it is there."""
    entry = write_block(folder, index, parts, order)
    append(folder / JOURNAL, entry)
    return entry


def _hessians(blocks: BlockModel, index: int, walking: Walking, *, advance: bool) -> BlockHessians:
    """Return a part's Hessians from what enters it; an untied embedding, which nothing enters, has none."""
    return hessians_of(blocks, index, walking, advance=advance) if sees_activations(blocks, index) else BlockHessians({}, {})


def _compress_part(
    blocks: BlockModel,
    index: int,
    hessians: BlockHessians,
    tokens: Tensor,
    compressor: Compressor,
    walking: Walking,
    units: Mapping[str, Unit],
    propagate: str | None,
) -> tuple[list[Encoded], dict[str, Tensor]]:
    """Compress this process's share of a part's units to all their levels, and encode those of each unit when they are made.

    Returns: what a file has of them, and the weights of all units at the level `propagate`, through which activations leave; none
        where that is None.
    """
    slots = blocks.slots(index)
    placed: dict[str, Tensor] = {}

    def keep(name: str, levels: list[Compressed]) -> Encoded:
        return encoded({name: levels}, units)

    if index == blocks.embedding_part:
        ((name, slot),) = slots.items()
        H = hessians.hessians[name].to(blocks.device) if index == blocks.head_part else None

        made: list[Encoded] = []

        def compress(_: Sequence[str]) -> None:
            with named([name]):
                made.append(keep(name, compress_embedding(slot, tokens, compressor, H=H)))

        map_shards([name], compress)
        return made, placed

    def settled(name: str, levels: list[Compressed]) -> Compressed | None:
        return next((result for level, result in zip(units[name].levels, levels, strict=True) if level.key == propagate), None)

    return compress_units(blocks, index, slots, hessians, compressor, keep, walking, placed=placed, settled=settled), placed


def _stored_level(folder: Path, entry: dict[str, Any], key: str | None) -> dict[str, Tensor]:
    """Decode a finished block's units at the level with this key from its file."""
    if key is None:
        return {}
    database = LevelDatabase(folder, {"method": "", "units": entry["units"], "files": [entry]})
    return {
        unit.name: database.read(i, next(j for j, level in enumerate(unit.levels) if level.key == key)).decode()
        for i, unit in enumerate(database.space.units)
    }
