"""Several level databases of the same units, seen as one: the first one's levels keep their indices, further ones come after."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch

from evopress.compress.compressor import Payload
from evopress.errors import EvoPressError
from evopress.levels.store import LevelDatabase
from evopress.units import Genome, Space, Unit


class LevelSource(Protocol):
    """Where a live model gets its levels from."""

    @property
    def folder(self) -> Path:
        """Named in errors."""

    @property
    def space(self) -> Space:
        """Units and levels."""

    def read(self, unit: int, level: int, device: torch.device | str = "cpu") -> Payload:
        """Read a unit at a level, both indices of the space, packed to a device, where it is unpacked."""


class LevelUnion:
    """Databases side by side, so that genomes of all of them are measured by one evaluator."""

    def __init__(self, databases: Sequence[LevelDatabase]) -> None:
        """Put further databases' levels after the first one's.

        Raises: EvoPressError if the databases are of different units.
        """
        self._databases = tuple(databases)
        first = databases[0]
        units = []
        for same in zip(*(database.space.units for database in databases), strict=True):
            if len({(unit.name, unit.size) for unit in same}) > 1:
                raise EvoPressError(f"the level databases {', '.join(str(d.folder) for d in databases)} are of different models")
            unit = same[0]
            units.append(Unit(unit.name, unit.block, unit.kind, unit.size, tuple(level for u in same for level in u.levels)))
        self.folder = first.folder
        self.space = Space(first.space.method, tuple(units))

    def read(self, unit: int, level: int, device: torch.device | str = "cpu") -> Payload:
        """Read a unit at a level of whichever database it is in."""
        for database in self._databases:
            count = len(database.space.units[unit].levels)
            if level < count:
                return database.read(unit, level, device)
            level -= count
        raise EvoPressError(f"{self.space.units[unit].name} has no such level")

    def genome_of_last(self, genome: Genome) -> Genome:
        """Turn a genome of the last database into one of the union."""
        offsets = [sum(len(database.space.units[i].levels) for database in self._databases[:-1]) for i in range(len(self.space))]
        return tuple(offset + level for offset, level in zip(offsets, genome, strict=True))
