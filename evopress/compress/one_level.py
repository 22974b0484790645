"""Every unit at one level of its own: what a second pass along a found genome compresses anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from evopress.compress.compressor import Compressed, Compressor
from evopress.units import Level


@dataclass(frozen=True)
class OneLevel:
    """Compress each unit by a compressor of its own; units with equal ones on one input are swept together."""

    of: Mapping[str, Compressor]
    """Unit name to a compressor that makes one level."""

    def levels(self, shape: tuple[int, int], *, unit: str = "") -> tuple[Level, ...]:
        """Return the one level of a unit."""
        return self.of[unit].levels(shape, unit=unit)

    def compress(self, weights: Mapping[str, Tensor], H: Tensor) -> dict[str, Sequence[Compressed]]:
        """Compress every weight to its level; see `Compressor.compress`."""
        results: dict[str, Sequence[Compressed]] = {}
        left = dict(weights)
        while left:
            first = self.of[next(iter(left))]
            together = {name: left.pop(name) for name in list(left) if self.of[name] == first}
            results |= first.compress(together, H)
        return {name: results[name] for name in weights}

    def settings(self) -> dict[str, Any]:
        """Return what decides the result."""
        return {name: compressor.settings() for name, compressor in self.of.items()}

    def narrowed(self, levels: Mapping[str, Level]) -> Compressor:
        """Return itself for fewer units."""
        return OneLevel({name: self.of[name] for name in levels})
