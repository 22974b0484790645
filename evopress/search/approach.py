"""The way to a first genome where modules must be dropped: down from the model that has them all, the budget tightened by steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from evopress.search.program import best_in
from evopress.units import Budget, Genome, Space


class Approach:
    """A genome above the budget, weights at their last levels and all modules there, and the steps that are left to come down."""

    def __init__(self, space: Space, budget: Budget, droppable: Sequence[bool], *, steps: int) -> None:
        """Begin at the top.

        Args:
            droppable: of every unit: it is a module that can be dropped.
            steps: after which the genome is within the budget.
        """
        self._space, self._budget, self._steps, self._taken = space, budget, steps, 0
        self.genome: Genome = tuple(0 if droppable[i] else len(unit.levels) - 1 for i, unit in enumerate(space.units))
        """The one at which it is asked next what modules are worth."""

    def step(self, values: Sequence[Sequence[float]]) -> bool:
        """Go down one step by values[unit][level]; return False where no genome above the budget is left, and `genome` stays."""
        self._taken += 1
        left = 1 - self._taken / self._steps
        nearer = best_in(self._space, self._towards(left), values, near=self.genome) if left > 0 else None
        if nearer is not None:
            self.genome = nearer
        return nearer is not None

    def _towards(self, left: float) -> Budget:
        """Return a budget between the genome and the one to meet: with so much left of the way, a share."""

        def between(total: int, spent: int) -> int:
            return max(total, total + math.floor((spent - total) * left))

        space, budget = self._space, self._budget
        limits = tuple(replace(limit, total=between(limit.total, limit.spent(space, self.genome))) for limit in budget.limits)
        return replace(budget, total=between(budget.total, space.cost(self.genome)), limits=limits)
