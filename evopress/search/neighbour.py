"""Genomes to begin from at one budget, made of what a search found at another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from evopress.search.constraint import Spending
from evopress.search.program import best_genome, limits_around
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

    All units become more compressed where the genome is beyond the budget, and less where it is within; modules stay.

    Returns: None if there is none.
    """
    modules = [any(level.drops for level in unit.levels) for unit in space.units]
    free = [unit for unit in range(len(space)) if not modules[unit] and not space.is_gone(genome, unit)]
    within = budget.met_by(space, genome)
    allowed = [range(genome[u] + 1) if within else range(genome[u], len(space.units[u].levels)) for u in free]

    def part(table: Sequence[Sequence[Any]]) -> list[list[Any]]:
        return [[of_unit[level] for level in levels] for of_unit, levels in zip(table, allowed, strict=True)]

    limits = [(part(prices), left) for prices, left in limits_around(space, budget, genome, free)]
    found = best_genome(limits, part([values[unit] for unit in free])) if free else None
    if found is None:
        return None
    levels = {unit: of_unit[level] for unit, of_unit, level in zip(free, allowed, found, strict=True)}
    result = tuple(levels.get(unit, level) for unit, level in enumerate(genome))
    return result if budget.met_by(space, result) else None


def _moved_at_random(space: Space, budget: Budget, genome: Genome, rng: np.random.Generator) -> Genome | None:
    """Compress random units until the budget is kept, then spend what is left on random others; None where that does not do."""
    spending = Spending(space, budget, list(genome))
    for unit in rng.permutation(len(space)).tolist():
        while (exceeded := spending.exceeded) and spending.can_move(unit, 1):
            if not any(spending.step(unit, 1)[limit] < 0 for limit in exceeded):
                break
            spending.move(unit, 1)
    if spending.exceeded:
        return None
    while spending.fill(rng):
        pass
    return tuple(spending.levels)
