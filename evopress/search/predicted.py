"""Offspring that are drawn by what is expected of them: up goes what gains most per cost, down what loses least.

Not in the paper, which draws uniformly. The values are those of the integer program: of every level of every unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import numpy as np

from evopress.errors import EvoPressError
from evopress.search.constraint import Spending
from evopress.search.mutation import DISTRIBUTIONS, Mutation
from evopress.search.sensitivity import Expected
from evopress.units import Budget, Genome, Space

_LEAST = 1e-3
"""Least chance of a unit, as a share of the greatest: nothing is ruled out."""


class PredictedSwitch:
    """Move units up with a chance in proportion to gain per cost, others down by cost per loss until all limits are kept.

    Args:
        values: values[unit][level] is what a level holds of the fitness.
        max_switches, distribution: as of `LevelSwitch`.
    """

    max_attempts = 100

    def __init__(
        self, space: Space, budget: Budget, values: Sequence[Sequence[float]], *, max_switches: int, distribution: str
    ) -> None:
        self._space, self._expected = space, Expected(space, values)
        self._spending = Spending(space, budget, [0] * len(space))
        self._max_switches, self._draw_num_switches = max_switches, DISTRIBUTIONS[distribution]

    def __call__(self, parent: Genome, rng: np.random.Generator) -> Genome:
        """Return an offspring of the parent, different from it and within the budget."""
        for _ in range(self.max_attempts):
            spending = self._spending.begin(list(parent))
            moved: set[int] = set()
            for _ in range(self._draw_num_switches(self._max_switches, rng)):
                self._switch(spending, moved, rng)
            if not spending.exceeded and (child := tuple(spending.levels)) != parent:
                return child
        raise EvoPressError(
            f"offspring by expected gain found no other genome from the current one in {self.max_attempts} attempts: use "
            "search.strategy.predicted_offspring=0, or another target"
        )

    def _switch(self, spending: Spending, moved: set[int], rng: np.random.Generator) -> None:
        """Move one unit up, and others down until all limits are kept, as far as there are such."""
        ups = [unit for unit in range(len(self._space)) if unit not in moved and spending.can_move(unit, -1)]
        if not ups:
            return
        gains = [-self._expected.change(spending.levels, unit, -1) / max(*spending.step(unit, -1).values(), 1) for unit in ups]
        unit = ups[_draw(gains, rng)]
        spending.move(unit, -1)
        moved.add(unit)
        while exceeded := spending.exceeded:
            downs, ease = [], []
            for unit in range(len(self._space)):
                if unit in moved or not spending.can_move(unit, 1):
                    continue
                added = spending.step(unit, 1)
                released = max(-added.get(i, 0) for i in exceeded)
                if released > 0:
                    downs.append(unit)
                    ease.append(released / max(self._expected.change(spending.levels, unit, 1), 1e-12))
            if not downs:
                return
            unit = downs[_draw(ease, rng)]
            spending.move(unit, 1)
            if not spending.can_move(unit, 1):
                moved.add(unit)
        spending.fill(rng, but=moved)


class EitherMutation:
    """Draw from one mutation with a chance, else from another; and from this where the first finds nothing."""

    def __init__(self, one: Mutation, other: Mutation, chance: float) -> None:
        self._one, self._other, self._chance = one, other, chance

    def __call__(self, parent: Genome, rng: np.random.Generator) -> Genome:
        """Return an offspring of the parent."""
        if rng.random() < self._chance:
            with suppress(EvoPressError):  # draws by gain may keep coming to one move that a further limit forbids
                return self._one(parent, rng)
        return self._other(parent, rng)


def _draw(weights: Sequence[float], rng: np.random.Generator) -> int:
    """Draw an index in proportion to weights; those below the least chance, and negative ones, have that."""
    chances = np.maximum(np.asarray(weights, dtype=np.float64), 0.0)
    greatest = float(chances.max())
    chances = np.maximum(chances, _LEAST * greatest) if greatest > 0 else np.ones(len(chances))
    return int(rng.choice(len(chances), p=chances / chances.sum()))
