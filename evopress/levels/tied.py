"""Levels as they are searched: weights that an engine runs as one matrix get one level, and cost what they take in its file.

So do the experts of a block where they are asked to. The level database stays what it is, one entry a weight. Here its units are
put together, so that whatever searches them, strategy or baseline, sees one unit, and need not know of engines or experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from evopress.compress.compressor import Payload
from evopress.engines import Engine, Shape
from evopress.errors import EvoPressError
from evopress.levels.union import Levels, LevelUnion
from evopress.units import Genome, Level, Space, Unit, is_of_expert


def as_engine_has(space: Space, engine: Engine, *, columns: Mapping[str, int], stored: int, written: int) -> Space:
    """Return a space of weights with an engine's prices.

    Args:
        columns: of every weight, by name.
        stored: bits of a scale and a zero together in the level database, which its levels' bits count.
        written: bits of a scale in the engine's file.
    """
    units = []
    for unit in space.units:
        if unit.name in columns:
            shape = (unit.size // columns[unit.name], columns[unit.name])
            levels = tuple(_priced(level, engine, shape, stored=stored, written=written) for level in unit.levels)
            unit = replace(unit, levels=levels)
        units.append(unit)
    return replace(space, units=tuple(units))


def _priced(level: Level, engine: Engine, shape: tuple[int, int], *, stored: int, written: int) -> Level:
    if level.source != "quant" or not level.key.isdecimal():
        return level
    rows, columns = shape
    bits = int(level.key)
    groups = (level.stored_bits - bits * rows * columns) // stored
    return replace(level, stored_bits=engine.stored_bits(Shape(rows, columns, bits, groups, written)))


def tied(space: Space, engine: Engine | None, *, experts: bool = False) -> Space:
    """Put units together that an engine ties, each where the first of them is.

    Args: experts: and the experts of a block, their weights of one name: "model.layers.0.mlp.experts.down_proj".

    Raises: EvoPressError if weights that are tied have different levels.
    """
    kinds = {kind: name for name, together in (engine.ties if engine else {}).items() for kind in together}
    places: dict[str, list[int]] = {}
    for index, unit in enumerate(space.units):
        module, _, kind = unit.name.rpartition(".")
        name = f"{module}.{kinds[kind]}" if kind in kinds else unit.name
        if experts and is_of_expert(unit):
            name = f"{module.rpartition('.')[0]}.{kind}"
        places.setdefault(name, []).append(index)
    members = tuple(tuple(indices) for indices in places.values())
    units = tuple(_together(name, [space.units[index] for index in indices]) for name, indices in places.items())
    at = {index: place for place, indices in enumerate(members) for index in indices}
    inside: tuple[int | None, ...] = ()
    if space.inside:
        around = [space.inside[indices[0]] for indices in members]
        if any(space.inside[index] != around[place] for place, indices in enumerate(members) for index in indices):
            raise EvoPressError(
                "method.experts=layer gives the experts of a block one level, and method.granularity=expert drops each for itself: "
                "leave one of them out"
            )
        inside = tuple(None if module is None else at[module] for module in around)
    return Space(space.method, units, space.currency, inside, untied=space, members=members)


def _together(name: str, units: list[Unit]) -> Unit:
    """Return one unit for several: its levels cost what theirs do together."""
    first = units[0]
    if len(units) == 1:
        return first
    for unit in units[1:]:
        if [level.key for level in unit.levels] != [level.key for level in first.levels]:
            raise EvoPressError(
                f"{first.name} and {unit.name} must share one level ({name}), but their available levels differ: choose "
                "others, or use engine=none and method.experts=each"
            )
    levels = tuple(
        replace(each[0], cost=sum(level.cost for level in each), stored_bits=sum(level.stored_bits for level in each))
        for each in zip(*(unit.levels for unit in units), strict=True)
    )
    kind = first.kind if is_of_expert(first) else name.rpartition(".")[2]
    return Unit(name, first.block, kind, sum(unit.size for unit in units), levels, first.read)


class TiedLevels:
    """See `Levels`: levels with another space, whose prices or ties are others.

    `read` takes a weight's index and its level, as without ties; genomes are those of the space.
    """

    def __init__(self, levels: Levels | LevelUnion, space: Space) -> None:
        """Take levels, and their space as it is searched."""
        self.untied, self.space = levels, space
        self.folder: Path = levels.folder

    @property
    def fingerprint(self) -> str:
        """See `Levels`."""
        return self.untied.fingerprint

    @property
    def recipe(self) -> Mapping[str, object]:
        """See `Levels`."""
        return self.untied.recipe

    @property
    def num_bytes(self) -> int:
        """See `Levels`."""
        return self.untied.num_bytes

    @property
    def errors(self) -> list[list[float]]:
        """See `Levels`; of weights that are tied the sums."""
        errors = self.untied.errors
        if self.space.untied is None:
            return errors
        return [[sum(each) for each in zip(*(errors[i] for i in indices), strict=True)] for indices in self.space.members]

    def read(self, unit: int, level: int, device: torch.device | str = "cpu") -> Payload:
        """See `LevelSource`."""
        return self.untied.read(unit, level, device)

    def genome_of_last(self, genome: Genome) -> Genome:
        """See `LevelUnion`; the last database's genome has a level for every weight."""
        assert isinstance(self.untied, LevelUnion)
        return self.space.fold(self.untied.genome_of_last(genome))
