"""Several level databases seen as one: levels of the same unit stand side by side, further units come after.

A space is the union of its sources' levels. Where a source has modules and another the weights in them, the modules' own price is
nothing, since their weights are paid for as units of their own, and what lies in a dropped module is free.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch

from evopress.compress.compressor import Payload
from evopress.currencies import Currency, num_experts
from evopress.errors import EvoPressError
from evopress.levels.modules import ATTENTION, MLP, modules_of
from evopress.levels.store import fingerprint
from evopress.units import Genome, Space, Unit, is_module


class LevelSource(Protocol):
    """Where a live model gets its levels from."""

    @property
    def folder(self) -> Path:
        """Named in errors."""

    @property
    def space(self) -> Space:
        """Units and levels."""

    def read(self, unit: int, level: int, device: torch.device | str = "cpu") -> Payload:
        """Read a weight at a level, packed to a device, where it is unpacked.

        Args: unit, level: indices in the space, in that of single weights where some are tied.
        """


class Levels(LevelSource, Protocol):
    """The levels of a run, in one database or in several."""

    @property
    def fingerprint(self) -> str:
        """Stands for everything that decides their content."""

    @property
    def errors(self) -> list[list[float]]:
        """Relative output error of every unit at every level; 0 for modules, which have none."""

    @property
    def recipe(self) -> Mapping[str, Any]:
        """What decides their content."""

    @property
    def num_bytes(self) -> int:
        """Bytes on disk."""


def join(
    spaces: Sequence[Space],
    *,
    method: str | None = None,
    currency: Currency | None = None,
    is_of_attention: Callable[[str], bool] | None = None,
) -> tuple[Space, list[list[tuple[int, int, int]]]]:
    """Put spaces together: what they have of the same unit side by side, units that only later ones have at the end.

    Args:
        method: the name of the result; None: the first space's.
        currency: what the result is priced in; None: the first space's.
        is_of_attention: tells of a weight's name whether it lies in its block's attention; where there are modules beside weights.

    Returns: the space, and for every unit the parts of its levels: (space, unit in it, number of levels).
    Raises: EvoPressError if units of the same name are of different models.
    """
    units: dict[str, Unit] = {}
    places: dict[str, list[tuple[int, int, int]]] = {}
    weights = any(not is_module(unit) for space in spaces for unit in space.units)
    for number, space in enumerate(spaces):
        for index, unit in enumerate(space.units):
            if weights and is_module(unit):  # its weights are units of their own
                unit = replace(unit, size=0, levels=tuple(replace(level, stored_bits=0) for level in unit.levels))
            if (known := units.get(unit.name)) is not None:
                if known.size != unit.size:
                    raise EvoPressError(f"{unit.name} has {known.size} weights in one level database and {unit.size} in another")
                unit = replace(known, levels=(*known.levels, *unit.levels))
            units[unit.name] = unit
            places.setdefault(unit.name, []).append((number, index, len(space.units[index].levels)))
    inside = spaces[0].inside
    if not inside and weights and any(is_module(unit) for unit in units.values()):
        assert is_of_attention is not None, "modules beside weights"
        modules = {place: i for i, unit in enumerate(units.values()) for place in modules_of(unit)}
        experts = {unit.name: i for i, unit in enumerate(units.values()) if num_experts(unit)}
        inside = tuple(
            None
            if is_module(unit)
            else experts.get(
                unit.name.rpartition(".")[0], modules.get((unit.block, ATTENTION if is_of_attention(unit.name) else MLP))
            )
            for unit in units.values()
        )
    joined = Space(method or spaces[0].method, tuple(units.values()), currency or spaces[0].currency, inside)
    return joined, list(places.values())


class LevelUnion:
    """Databases side by side, so that genomes of all of them are measured by one evaluator."""

    def __init__(
        self,
        parts: Sequence[Levels],
        *,
        method: str | None = None,
        currency: Currency | None = None,
        is_of_attention: Callable[[str], bool] | None = None,
    ) -> None:
        """Put further databases' levels after the first one's; see `join`.

        Raises: EvoPressError if the databases are of different units.
        """
        self._parts = tuple(parts)
        spaces = [part.space for part in parts]
        if len({frozenset(unit.name for unit in space.units) for space in spaces}) > 1 and method is None:
            raise EvoPressError(f"the level databases {', '.join(str(part.folder) for part in parts)} are of different models")
        self.space, self._places = join(spaces, method=method, currency=currency, is_of_attention=is_of_attention)
        self.folder = parts[0].folder

    @property
    def fingerprint(self) -> str:
        """See `Levels`."""
        return joint_fingerprint([part.fingerprint for part in self._parts])

    @property
    def recipe(self) -> dict[str, Any]:
        """See `Levels`."""
        return {part.space.method: part.recipe for part in self._parts}

    @property
    def num_bytes(self) -> int:
        """See `Levels`."""
        return sum(part.num_bytes for part in self._parts)

    @property
    def errors(self) -> list[list[float]]:
        """See `Levels`."""
        errors = [part.errors for part in self._parts]
        return [[error for part, unit, _ in of for error in errors[part][unit]] for of in self._places]

    def read(self, unit: int, level: int, device: torch.device | str = "cpu") -> Payload:
        """Read a unit at a level of whichever database it is in."""
        for part, index, count in self._places[unit]:
            if level < count:
                return self._parts[part].read(index, level, device)
            level -= count
        raise EvoPressError(f"{self.space.units[unit].name} has no such level")

    def genome_of_last(self, genome: Genome) -> Genome:
        """Turn a genome of the last database into one of the union; units that it has not keep their first level."""
        last = len(self._parts) - 1
        found = [0] * len(self.space)
        for place, parts in enumerate(self._places):
            part, index, count = parts[-1]
            if part == last:
                found[place] = len(self.space.units[place].levels) - count + genome[index]
        return tuple(found)


def joint_fingerprint(fingerprints: Sequence[str]) -> str:
    """Return what stands for several databases together; for one its own."""
    return fingerprints[0] if len(fingerprints) == 1 else fingerprint({"databases": list(fingerprints)})
