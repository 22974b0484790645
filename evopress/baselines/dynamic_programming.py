"""The baseline of SPDY: levels that minimise the sum of the units' own errors within the budget.

Source: SPDY (Frantar & Alistarh, 2022) without its second, random search; paper, section 4.3. A multiple-choice
knapsack, solved exactly as an integer program (`search/program.py`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

from evopress.baselines.baseline import WEIGHTS, Baseline, Problem
from evopress.errors import EvoPressError
from evopress.search.program import best_in
from evopress.search.sensitivity import with_modules_kept
from evopress.units import Budget, Genome, Space

logger = logging.getLogger(__name__)


class DynamicProgramming(Baseline):
    """The levels with the least sum of errors."""

    serves = (WEIGHTS,)

    def find(self, problem: Problem) -> dict[str, Genome]:
        """See `Baseline`."""
        _check_errors(problem.space, problem.errors)
        genome = _least_errors(problem.space, problem.budget, problem.errors)
        if genome is None:
            logger.info("baseline dp is left out: no genome that keeps all modules is within the target and its limits")
            return {}
        return {"dp": genome}


def dynamic_programming(space: Space, budget: Budget, errors: Sequence[Sequence[float]]) -> Genome:
    """Choose the levels with the least sum of errors within the budget and all its limits.

    Args:
        space: units and levels.
        budget: the total cost allowed, and what else limits it.
        errors: errors[i][l] is the error of unit i at level l (quantization: relative squared output error), finite. Modules that
            could be dropped have none, and stay; what lies in one that is gone from the start keeps its first level.

    Raises: EvoPressError if the errors do not match the units, or the budget cannot be met.
    """
    budget.check(space)
    _check_errors(space, errors)
    least = _least_errors(space, budget, errors)
    if least is None:
        limits = f" and {', '.join(map(str, budget.limits))}" if budget.limits else ""
        raise EvoPressError(
            f"no genome that keeps all modules is within {budget.target:g} {budget.measure}{limits}: raise the target "
            "or the limits, or add a more compressed level"
        )
    return least


def _least_errors(space: Space, budget: Budget, errors: Sequence[Sequence[float]]) -> Genome | None:
    """Solve the problem over all units; None if no genome that drops nothing is within the budget and its limits."""
    return best_in(space, budget, with_modules_kept(space, errors))


def _check_errors(space: Space, errors: Sequence[Sequence[float]]) -> None:
    if len(errors) != len(space):
        raise EvoPressError(f"there are errors of {len(errors)} units but {len(space)} units: build the level database again")
    for unit, values in zip(space.units, errors, strict=True):
        if len(values) != len(unit.levels) or not all(math.isfinite(value) for value in values):
            raise EvoPressError(
                f"the errors of {unit.name} are {list(values)}: expected {len(unit.levels)} finite numbers, "
                "build the level database again"
            )
