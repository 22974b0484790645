"""The baseline of SPDY: levels that minimise the sum of the units' own errors within the budget.

Source: SPDY (Frantar & Alistarh, 2022) without its second, random search; paper, section 4.3. A multiple-choice
knapsack, solved exactly as an integer program.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from evopress.baselines.baseline import WEIGHTS, Baseline, Problem
from evopress.errors import EvoPressError
from evopress.units import Budget, Genome, Space, Unit

logger = logging.getLogger(__name__)


class DynamicProgramming(Baseline):
    """The levels with the least sum of errors."""

    serves = (WEIGHTS,)

    def find(self, problem: Problem) -> dict[str, Genome]:
        """See `Baseline`."""
        if least_with_modules(problem.space) > problem.budget.total:
            logger.info("baseline dp is left out: it keeps all modules, whose weights take more than the target allows")
            return {}
        return {"dp": dynamic_programming(problem.space, problem.budget, problem.errors)}


def dynamic_programming(space: Space, budget: Budget, errors: Sequence[Sequence[float]], *, group_by: str | None = None) -> Genome:
    """Choose the levels with the least sum of errors within the budget.

    Args:
        space: units and levels.
        budget: the total cost allowed.
        errors: errors[i][l] is the error of unit i at level l (quantization: relative squared output error), finite. Modules that
            could be dropped have none, and stay; what lies in one that is gone from the start keeps its first level.
        group_by: None for one problem over all units; "size" for one per group of units with equal numbers of weights,
            each with its proportional part of the budget (the authors' `--group_by_numel`).

    Raises: EvoPressError if the errors do not match the units, or the budget, or a group's part of it, cannot be met.
    """
    budget.check(space)
    _check_errors(space, errors)
    if group_by not in (None, "size"):
        raise EvoPressError(f'group_by is "{group_by}": expected "size", or nothing for one problem over all units')
    genome = [0] * len(space)
    groups: dict[int, list[int]] = {}
    for index, unit in enumerate(space.units):
        if not any(level.drops for level in unit.levels) and not space.is_gone(genome, index):
            groups.setdefault(unit.size if group_by else 0, []).append(index)
    for members in groups.values():
        units = [space.units[index] for index in members]
        total = budget.total * sum(unit.size for unit in units) // space.size if group_by else budget.total
        levels = _solve(units, [space.prices[index] for index in members], total, [errors[index] for index in members])
        for index, level in zip(members, levels, strict=True):
            genome[index] = level
    return tuple(genome)


def least_with_modules(space: Space) -> int:
    """Return what the cheapest genome costs that drops no module; where none can be dropped, the cheapest at all."""
    genome = [0 if any(level.drops for level in unit.levels) else len(unit.levels) - 1 for unit in space.units]
    return space.cost(genome)


def _solve(units: Sequence[Unit], prices: Sequence[Sequence[int]], total: int, errors: Sequence[Sequence[float]]) -> list[int]:
    """Solve one multiple-choice knapsack: one level for each unit, costs within `total`, least sum of errors."""
    # Cost above the most compressed level, in units of the greatest common divisor: small integers, exact in the solver.
    extra = [[price - of_unit[-1] for price in of_unit] for of_unit in prices]
    capacity = total - sum(of_unit[-1] for of_unit in prices)
    if capacity < 0:
        raise EvoPressError(
            f"a budget of {total} for {len(units)} units (first: {units[0].name}) is below their least cost "
            f"{total - capacity}: add a more compressed level, raise the target, or leave group_by empty"
        )
    divisor = math.gcd(*(cost for costs in extra for cost in costs)) or 1
    costs = np.array([cost // divisor for unit_costs in extra for cost in unit_costs], dtype=np.float64)
    objective = np.array([error for unit_errors in errors for error in unit_errors], dtype=np.float64)
    # The solver stops at an absolute gap of 1e-6: make that small against every difference that matters.
    objective = objective / (np.abs(objective).max() or 1.0) * 1e4
    owner = np.repeat(np.arange(len(units)), [len(unit.levels) for unit in units])
    columns = np.arange(len(costs))
    one_level_each = csr_array((np.ones(len(costs)), (owner, columns)), shape=(len(units), len(costs)))
    result = milp(
        objective,
        integrality=np.ones(len(costs)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_level_each, 1, 1), LinearConstraint(costs[None, :], ub=capacity // divisor)],
        options={"mip_rel_gap": 0.0},
    )
    assert result.success, f"a feasible knapsack was not solved: {result.message}"
    starts = np.flatnonzero(np.diff(owner, prepend=-1))
    levels = [int(np.argmax(part)) for part in np.split(result.x, starts[1:])]
    assert sum(of_unit[level] for of_unit, level in zip(prices, levels, strict=True)) <= total
    return levels


def _check_errors(space: Space, errors: Sequence[Sequence[float]]) -> None:
    if len(errors) != len(space):
        raise EvoPressError(f"there are errors of {len(errors)} units but {len(space)} units: build the level database again")
    for unit, values in zip(space.units, errors, strict=True):
        if len(values) != len(unit.levels) or not all(math.isfinite(value) for value in values):
            raise EvoPressError(
                f"the errors of {unit.name} are {list(values)}: expected {len(unit.levels)} finite numbers, "
                "build the level database again"
            )
