"""The integer program of a genome: one level for each unit, the least sum of values, costs within limits; exact."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from evopress.search.constraint import Spending
from evopress.units import Budget, Genome, Space

Prices = Sequence[Sequence[int]]
"""prices[unit][level], whole numbers of any sign."""


def limits_around(space: Space, budget: Budget, genome: Genome, units: Sequence[int]) -> list[tuple[Prices, int]]:
    """Return each limit of a budget as what the levels of some units cost more than the genome's own, and what it leaves.

    Exact as long as the other units stay, and what of a unit costs does not depend on the level of another.
    """

    spending = Spending(space, budget, list(genome))
    steps = [[spending.step(i, level - genome[i]) for level in range(len(space.units[i].levels))] for i in units]
    return [([[step[limit] for step in of_unit] for of_unit in steps], left) for limit, left in enumerate(spending.left)]


def best_genome(
    limits: Sequence[tuple[Prices, int]],
    values: Sequence[Sequence[float]],
    *,
    near: Genome | None = None,
    most_changes: int | None = None,
) -> Genome | None:
    """Choose the levels with the least sum of values.

    Args:
        limits: prices, and the most that the chosen levels' may add up to.
        values: values[unit][level], finite.
        near: a genome that at most `most_changes` units may differ from.

    Returns: None if no genome is within the limits.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp  # half a second, which naming a strategy need not wait for
    from scipy.sparse import csr_array

    # Less each unit's least value, which is paid anyhow. The solver stops at an absolute gap of 1e-6: make that small against every
    # difference that matters.
    objective = np.concatenate([np.asarray(of_unit, dtype=np.float64) - min(of_unit) for of_unit in values])
    objective = objective / (objective.max() or 1.0) * 1e4
    counts = [len(of_unit) for of_unit in values]
    owner, columns = np.repeat(np.arange(len(counts)), counts), np.arange(len(objective))
    one_level_each = csr_array((np.ones(len(objective)), (owner, columns)), shape=(len(counts), len(objective)))
    constraints = [LinearConstraint(one_level_each, 1, 1)]
    for prices, total in limits:
        # Price above the cheapest level, in units of the greatest common divisor: small integers, exact in the solver.
        extra = [price - min(of_unit) for of_unit in prices for price in of_unit]
        capacity, divisor = total - sum(map(min, prices)), math.gcd(*extra) or 1
        if capacity < 0:
            return None
        costs = np.array([price // divisor for price in extra], dtype=np.float64)
        constraints.append(LinearConstraint(costs[None, :], ub=capacity // divisor))
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    if near is not None and most_changes is not None:
        kept = np.zeros((1, len(objective)))
        kept[0, starts + np.asarray(near)] = 1.0
        constraints.append(LinearConstraint(kept, lb=len(counts) - most_changes))
    result = milp(
        objective,
        integrality=np.ones(len(objective)),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": 0.0},
    )
    if result.x is None:
        return None
    genome = tuple(int(np.argmax(part)) for part in np.split(result.x, starts[1:]))
    for prices, total in limits:
        assert sum(of_unit[level] for of_unit, level in zip(prices, genome, strict=True)) <= total
    return genome
