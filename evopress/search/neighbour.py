"""Genomes to begin from at one budget, made of what a search found at another."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from evopress.search.constraint import Spending
from evopress.search.program import best_in
from evopress.search.strategy import Problem
from evopress.units import Budget, Genome, Space

_RANDOM = 8
"""Genomes that are made at random where no error tells what to change."""


def genomes_from_neighbour(problem: Problem, values: Sequence[Sequence[float]] | None = None) -> tuple[Genome, ...]:
    """Move the neighbour's genome to the problem's budget: the best one by the values, or some at random where there are none.

    Args: values: values[unit][level], the less the better; None: the errors of the levels.
    """
    if problem.neighbour is None:
        return ()
    space, budget = problem.space, problem.budget
    genome, values = space.check(problem.neighbour.genome), problem.errors if values is None else values
    if budget.met_by(space, genome) and space.cost(genome) == budget.total:
        return (genome,)
    if values and (found := moved(space, budget, genome, values)) is not None:
        return (found,)
    drawn = [_moved_at_random(space, budget, genome, problem.rng_initial) for _ in range(_RANDOM)]
    return tuple(dict.fromkeys(each for each in drawn if each is not None))


def moved(space: Space, budget: Budget, genome: Genome, values: Sequence[Sequence[float]]) -> Genome | None:
    """Return the genome with the least sum of values that keeps the budget, no unit moved against the others' direction; exact.

    All units become more compressed where the genome is beyond the budget, and less where it is within. Modules stay whose values
    are all the same.

    Returns: None if there is none.
    """
    within = budget.met_by(space, genome)

    def may(unit: int, level: int) -> bool:
        if any(each.drops for each in space.units[unit].levels) and len(set(values[unit])) == 1:
            return level == genome[unit]
        if space.is_gone(genome, unit):
            return True
        return level <= genome[unit] if within else level >= genome[unit]

    masked = [
        [value if may(unit, level) else math.inf for level, value in enumerate(of_unit)] for unit, of_unit in enumerate(values)
    ]
    found = best_in(space, budget, masked, near=genome)
    return found if found is not None and budget.met_by(space, found) else None


def _moved_at_random(space: Space, budget: Budget, genome: Genome, rng: np.random.Generator) -> Genome | None:
    """Compress random units until the budget is kept, then spend what is left on random others; None where that does not do."""
    spending = Spending(space, budget, list(genome))
    for unit in rng.permutation(len(space)).tolist():
        while spending.can_move(unit, 1) and spending.helps(unit):
            spending.move(unit, 1)
    if spending.exceeded:
        return None
    while spending.fill(rng):
        pass
    return tuple(spending.levels)
