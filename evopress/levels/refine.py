"""A second pass along a found genome: every unit compressed anew at its level, for what enters it in the compressed model.

A level database's Hessians are those of activations that leave all blocks at one level, or dense. Here calibration text walks
through the model at the genome: what enters a block has the errors of the blocks before it, and its weights are fitted to that.
Where the dense model's activations walk beside, they also make good a share of what that input has lost. A block's new weights stay
only where a judge says that the model is better with them. What comes out is a level database with one level per unit.

The head comes after the blocks, where it is a unit of its own. An embedding stays as it is in the database, and so does a tied
weight: what enters the first block would change with it.

Only one block and its inputs are on the device at a time.

Shapes: N sequences of L tokens.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from evopress.compress.compressor import Compressed, Compressor
from evopress.files import explained, make_folder
from evopress.levels.build import _check_names_are_free, _finished_blocks, opened_whole
from evopress.levels.calibration import activations_of, propagate, room_for_walks
from evopress.levels.compressing import Walking, compress_units, hessians_of
from evopress.levels.journal import JOURNAL, append, read_journal, rewrite_journal
from evopress.levels.live import Live, block_at, part_held
from evopress.levels.locking import TEMPORARIES
from evopress.levels.plan import WalkSettings
from evopress.levels.store import (
    MANIFEST,
    DamagedDatabaseError,
    Encoded,
    LevelDatabase,
    encoded,
    fingerprint,
    read_manifest,
    write_block,
    write_manifest,
)
from evopress.progress import track
from evopress.ranks import batch_within_share, on_all_ranks, on_rank_zero, shares
from evopress.units import Genome, Unit

logger = logging.getLogger(__name__)
Weights = Mapping[str, Tensor]
"""Unit name to weight [R, C]."""


class Judge(Protocol):
    """Measures the model with the blocks before one at the weights that they were given last, all else at the genome."""

    def loss(self, index: int, weights: Weights) -> float:
        """Measure with these weights in block `index`, or in the head as a part, its other units at the genome; lower is better."""

    def advance(self, index: int, weights: Weights) -> None:
        """Settle block `index`: from now on it has these weights."""


@dataclass(frozen=True)
class Step:
    """What came of a block, or of the head or the embedding as a part."""

    block: int
    kept: bool
    """Its new weights stay."""
    before: float | None
    """Loss without them, and all that stayed of earlier blocks; None: not finite, or there was nothing to compress anew."""
    after: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {"block": self.block, "kept": self.kept, "before": self.before, "after": self.after}

    @classmethod
    def of(cls, value: Any) -> Step | None:
        """Read what `to_dict` wrote; None if this is something else."""
        if not isinstance(value, dict) or type(value.get("block")) is not int or type(value.get("kept")) is not bool:
            return None
        losses = [value.get("before"), value.get("after")]
        if not all(loss is None or type(loss) is float for loss in losses):
            return None
        return cls(value["block"], value["kept"], *losses)


def refined_units(database: LevelDatabase, genome: Genome) -> tuple[Unit, ...]:
    """Return a database's units, each with the one level that a genome gives it."""
    return tuple(
        Unit(unit.name, unit.block, unit.kind, unit.size, (unit.levels[level],))
        for unit, level in zip(database.space.units, genome, strict=True)
    )


def inexact_units(database: LevelDatabase, genome: Genome) -> set[str]:
    """Return the names of the units whose level is not the weight itself: those that can gain."""
    return {
        unit.name for unit, errors, level in zip(database.space.units, database.errors, genome, strict=True) if errors[level] > 0.0
    }


def ensure_refined(
    settings: WalkSettings,
    live: Live,
    database: LevelDatabase,
    genome: Genome,
    tokens: Tensor,
    compressor: Compressor,
    judge: Callable[[], Judge],
) -> LevelDatabase:
    """Open the refined levels that the settings name, making them or what is missing or damaged of them first.

    Several processes have the activations of their shares of the text and compress some of a block's units; the first one writes.

    Args:
        live: the model with the database's levels, the first ones of its space; dense, and given back so.
        genome: a level of the database for each unit.
        tokens: calibration token ids int64 [N, L].
        compressor: the one that made the database.
        judge: called if anything is to be done.

    Raises: EvoPressError as building a database does.
    """
    folder = folder_of(settings, database)
    try:
        refined = on_rank_zero(lambda: _whole(folder, len(live.blocks.parts)))
        if refined is None:
            _Walk(settings, live, database, genome, tokens, compressor, folder).go(judge)
    except OSError as error:
        raise explained(error, folder) from error
    return refined or on_rank_zero(lambda: LevelDatabase.open(folder))


def _whole(folder: Path, num_parts: int) -> LevelDatabase | None:
    """Open refined levels if all are there; if not, make room for what is missing."""
    refined = opened_whole(folder)
    if refined is not None and len(steps_of(refined)) == num_parts:
        with suppress(OSError):  # what a run leaves that is killed right after it has written the manifest
            (folder / JOURNAL).unlink(missing_ok=True)
        return refined
    make_room(folder, num_parts)
    return None


def make_room(folder: Path, num_parts: int) -> None:
    """Make a folder for refined levels, without what a killed run has left half-written; the run folder is held by this one alone.

    Raises: EvoPressError if it cannot be made, or a folder lies where a file belongs.
    """
    make_folder(folder)
    _check_names_are_free(folder, num_parts)
    for pattern in TEMPORARIES:
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)


def folder_of(settings: WalkSettings, database: LevelDatabase) -> Path:
    """Return where the refined levels of these settings lie."""
    return settings.root / f"{database.space.method}-{fingerprint(settings.recipe)}"


def steps_of(refined: LevelDatabase) -> list[Step]:
    """Return what came of each block, in order; fewer where the manifest does not say."""
    told = refined.manifest.get("steps")
    return [step for value in told if (step := Step.of(value)) is not None] if isinstance(told, list) else []


class _Walk:
    """One walk of calibration text along the compressed model."""

    def __init__(
        self,
        settings: WalkSettings,
        live: Live,
        database: LevelDatabase,
        genome: Genome,
        tokens: Tensor,
        compressor: Compressor,
        folder: Path,
    ) -> None:
        self.settings, self.live, self.blocks, self.folder = settings, live, live.blocks, folder
        self.database, self.genome, self.tokens = database, genome, tokens
        self.units = {unit.name: unit for unit in refined_units(database, genome)}
        self.places = {unit.name: i for i, unit in enumerate(database.space.units)}
        self.inexact = inexact_units(database, genome)
        self.compressor = compressor.narrowed({name: self.units[name].levels[0] for name in self.units if name in self.inexact})
        self.batch, self.mine = (
            batch_within_share(len(tokens), max(settings.batch_tokens // tokens.shape[1], 1)),
            shares(len(tokens)),
        )

    def go(self, make_judge: Callable[[], Judge]) -> None:
        """Walk up to the last missing block; then write the manifest."""
        parts, embedding = self.blocks.parts, self.blocks.embedding_part
        entries, steps = on_rank_zero(self._begin)
        missing = [index for index in parts if index not in entries]
        walked = range(missing[-1] + 1 if missing else 0)
        if walked:
            judge = make_judge()
            room, *further = self._room()
            with part_held(self.live, embedding, None if embedding is None else self.live.levels_in(self.genome, embedding)):
                buffer = activations_of(room, self.blocks, self.tokens, self.batch, self.mine)
            walking = Walking(buffer, self.batch, correction=self.settings.correction, mine=self.mine)
            for room in further:
                walking.dense = activations_of(room, self.blocks, self.tokens, self.batch, self.mine)
        loss: float | None = None  # of the model as it is where the walk has come to
        for index in track(walked, "refining the model"):
            if index in entries:
                weights, loss = self._stored(entries[index]), None
            else:
                made, new = self._compress(index, walking)
                before = after = loss
                if new:
                    before = judge.loss(index, {}) if loss is None else loss
                    after = judge.loss(index, new)
                kept = bool(new) and is_better(after, before)
                weights, loss = (new, after) if kept else ({}, before)
                steps[index] = Step(index, kept, finite(before), finite(after))
                entries[index] = self._write(index, made if kept else [], steps[index])
            if index + 1 in walked and index < len(self.blocks.blocks):
                with block_at(self.live, index, self.genome, weights):
                    propagate(self.blocks, index, buffer, self.batch, {}, mine=self.mine)
                if walking.dense is not None:
                    with self.blocks.on_device(index):
                        propagate(self.blocks, index, walking.dense, self.batch, {}, mine=self.mine)
                judge.advance(index, weights)
        on_rank_zero(lambda: self._end(entries, steps))

    def _begin(self) -> tuple[dict[int, dict[str, Any]], dict[int, Step]]:
        """Return the entries of the finished parts and what came of each; only the journal names them from now on."""
        entries = _finished_blocks(self.folder, len(self.blocks.parts))
        steps = _told_steps(self.folder, entries)
        entries = {index: entry for index, entry in entries.items() if index in steps}
        told = {index: {**entry, "step": steps[index].to_dict()} for index, entry in entries.items()}
        rewrite_journal(self.folder / JOURNAL, told)  # before the manifest goes: one of them always names what is finished
        (self.folder / MANIFEST).unlink(missing_ok=True)
        return entries, steps

    def _end(self, entries: Mapping[int, dict[str, Any]], steps: Mapping[int, Step]) -> None:
        write_manifest(
            self.folder,
            method=self.database.space.method,
            fingerprint=fingerprint(self.settings.recipe),
            recipe=self.settings.recipe,
            entries=[entries[index] for index in self.blocks.parts],
            further={"steps": [steps[index].to_dict() for index in self.blocks.parts]},
        )
        (self.folder / JOURNAL).unlink(missing_ok=True)

    def _room(self) -> list[Tensor]:
        """Return room for the activations of the compressed model and, where weights are corrected, of the dense one."""
        walks = 2 if self.settings.correction else 1
        return room_for_walks(self.folder, self.settings.activations, self.blocks, self.tokens, self.mine, walks=walks)

    def _compress(self, index: int, walking: Walking) -> tuple[list[Encoded], dict[str, Tensor]]:
        """Compress what can gain of a block, or the head, for what enters it, and what its own levels make of that.

        Returns: what a file has of those that this process has made, and the weights of all units that are made.
        """
        slots = self.blocks.slots(index)
        names = [name for name in slots if name in self.inexact]
        if not names or index == self.blocks.embedding_part:
            return [], {}
        with block_at(self.live, index, self.genome):
            placed = {name: slot.weight for name, slot in slots.items()}
            hessians = hessians_of(self.blocks, index, walking)
        with self.blocks.on_device(index):
            made = compress_units(
                self.blocks,
                index,
                names,
                hessians,
                self.compressor,
                lambda name, levels: encoded({name: levels}, self.units),
                walking,
                placed=placed,
                settled=lambda name, levels: levels[0],
            )
        return made, {name: placed[name] for name in names}

    def _write(self, index: int, made: list[Encoded], step: Step) -> dict[str, Any]:
        """Write a block's file, new weights and the database's where there are none, and note what came of the block."""
        parts = [part for parts in on_all_ranks(lambda: made, to_first=True) for part in parts]

        def write() -> dict[str, Any]:
            names = list(self.blocks.slots(index))
            new = {record["name"] for _, records in parts for record in records}
            places = {name: self.places[name] for name in names if name not in new}
            old = encoded({name: [compressed_at(self.database, i, self.genome[i])] for name, i in places.items()}, self.units)
            entry = write_block(self.folder, index, [*parts, old], names)
            append(self.folder / JOURNAL, {**entry, "step": step.to_dict()})
            return entry

        return on_rank_zero(write)

    def _stored(self, entry: dict[str, Any]) -> dict[str, Tensor]:
        """Decode a finished block's weights from its file."""
        block = LevelDatabase(self.folder, {"method": "", "units": entry["units"], "files": [entry]})
        return {unit.name: block.read(i, 0).decode() for i, unit in enumerate(block.space.units)}


def compressed_at(database: LevelDatabase, place: int, level: int) -> Compressed:
    """Read a unit at a level, with what the manifest says of it."""
    record = database.manifest["units"][place]["levels"][level]
    return Compressed(database.read(place, level), float(record["error"]), float(record.get("damping") or 0.0))


def _told_steps(folder: Path, entries: Mapping[int, Any]) -> dict[int, Step]:
    """Return the steps that the manifest or else the journal tells of finished blocks."""
    try:
        told = read_manifest(folder).get("steps")
        values: Sequence[Any] = told if isinstance(told, list) else []
    except DamagedDatabaseError:
        values = [entry.get("step") for entry in read_journal(folder / JOURNAL)]
    steps = [step for value in values if (step := Step.of(value)) is not None]
    return {step.block: step for step in steps if step.block in entries}


def is_better(after: float | None, before: float | None) -> bool:
    """Tell whether a loss is lower; what is no number is worse than any."""
    if after is None or not math.isfinite(after):
        return False
    return before is None or not math.isfinite(before) or after < before


def finite(loss: float | None) -> float | None:
    """Return a loss, or None for what is no number."""
    return loss if loss is not None and math.isfinite(loss) else None
