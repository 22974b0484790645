"""Measured one-step deltas: what every unit changes by one level more or less, everything else staying, against what was expected.

A neighbour costs the same tokens whatever it changes, and most change less than a small minibatch can tell. So what is measured is
drawn towards what was expected of it, by as much as it varies over minibatches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from evopress.errors import EvoPressError
from evopress.search.sensitivity import Expected
from evopress.search.strategy import NEIGHBOURS_TOGETHER, Question
from evopress.units import Genome, Space

_LEAST_SPREAD = 0.05
"""Least variance of deltas around what was expected, as a share of what they vary by over minibatches."""


class Deltas:
    """Both neighbours of every unit that is there, each measured beside the genome itself."""

    def __init__(self, space: Space, genome: Genome, *, tokens: int, parts: int) -> None:
        """Take the genome.

        Args: tokens: of every neighbour, in so many minibatches.

        Raises: EvoPressError if no unit that is there has another level.
        """
        self._space, self._genome = space, genome
        self.moves = [
            (unit, by)
            for unit in range(len(space))
            if not space.is_gone(genome, unit)
            for by in (-1, 1)
            if 0 <= genome[unit] + by < len(space.units[unit].levels)
        ]
        """(unit, levels that it moves by) of every neighbour, in the order of their measurement."""
        if not self.moves:
            raise EvoPressError(
                f"none of the {len(space)} units has a level beside its own to be measured at: leave search.strategy.delta_rounds "
                "and approach_tokens at 0, or add a level"
            )
        self._together = [
            self.moves[start : start + NEIGHBOURS_TOGETHER] for start in range(0, len(self.moves), NEIGHBOURS_TOGETHER)
        ]
        self._part, self._parts = tokens // parts, parts
        self._asked = 0
        self._found: list[list[float]] = [[] for _ in self.moves]
        self.tokens = self.evaluations = 0
        """Spent so far, and genomes measured."""

    @property
    def finished(self) -> bool:
        """Tell whether all are measured."""
        return self._asked == len(self._together) * self._parts

    def ask(self) -> Question:
        """Return the genome and some of its neighbours, on one more minibatch."""
        moves = self._together[self._asked // self._parts]
        return Question((self._genome, *(self._moved(unit, by) for unit, by in moves)), self._part)

    def tell(self, answer: Sequence[float]) -> None:
        """Take the fitnesses of what was asked for.

        Raises: EvoPressError if their number is wrong, or the genome's own is not finite.
        """
        group = self._asked // self._parts
        own, *others = map(float, answer)
        if len(others) != len(self._together[group]) or not math.isfinite(own):
            raise EvoPressError(
                f"the fitness returned {len(answer)} numbers for {len(self._together[group]) + 1} genomes, that of the current one "
                f"{own:g}: expected one finite number for it and one for each of the others"
            )
        start = group * NEIGHBOURS_TOGETHER
        for found, value in zip(self._found[start : start + len(others)], others, strict=True):
            found.append(value - own)
        self.tokens += self._part * len(answer)
        self.evaluations += len(answer)
        self._asked += 1

    def values(self, expected: Expected) -> list[list[float]]:
        """Return values[unit][level] for the integer program: what the neighbours change, infinite for all other levels.

        What lies in a dropped module stays as it is.
        """
        values = [[math.inf] * len(unit.levels) for unit in self._space.units]
        for unit, level in enumerate(self._genome):
            values[unit][level] = 0.0
        for (unit, by), delta in zip(self.moves, self.shrunk(expected), strict=True):
            values[unit][self._genome[unit] + by] = delta
        return values

    def shrunk(self, expected: Expected) -> list[float]:
        """Return every neighbour's delta, drawn towards what was expected; infinite where one was not finite.

        For each kind and direction, deltas are c times what was expected and a rest, whose variance beyond that of the
        measurements says how far to trust these.
        """
        found = np.array(self._found)
        means, finite = found.mean(axis=1), np.isfinite(found).all(axis=1)
        wanted = np.array([expected.change(self._genome, unit, by) for unit, by in self.moves])
        result = np.full(len(means), math.inf)
        groups = [(self._space.units[unit].kind, by) for unit, by in self.moves]
        for group in dict.fromkeys(groups):
            used = np.array([each == group for each in groups]) & finite
            if not used.any():
                continue
            measured, told = means[used], wanted[used]
            noise = float(found[used].var(axis=1, ddof=1).mean()) / self._parts
            scale = max(float(measured @ told) / float(told @ told), 0.0) if told.any() else 0.0
            rest = measured - scale * told
            between = max(float(np.mean(rest**2)) - noise, _LEAST_SPREAD * noise)
            weight = between / (between + noise) if between + noise > 0 else 1.0
            result[used] = scale * told + weight * rest
        return result.tolist()

    def report(self, expected: Expected) -> list[dict[str, Any]]:
        """Lay out what was measured of every neighbour, and what it was taken for."""
        means = [float(np.mean(each)) for each in self._found]
        return [
            {"unit": unit, "by": by, "measured": round(mean, 9), "taken_for": round(delta, 9)}
            for (unit, by), mean, delta in zip(self.moves, means, self.shrunk(expected), strict=True)
        ]

    def _moved(self, unit: int, by: int) -> Genome:
        return (*self._genome[:unit], self._genome[unit] + by, *self._genome[unit + 1 :])
