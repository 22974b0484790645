"""The uniform baseline: one level for all units."""

from __future__ import annotations

from collections.abc import Callable

from evopress.baselines.baseline import WEIGHTS, Baseline, Planned, Problem
from evopress.search.initial import one_level
from evopress.units import Budget, Genome, Level, Space


class Uniform(Baseline):
    """The uniform genomes on either side of the budget, or the one that costs exactly as much."""

    serves = (WEIGHTS,)
    beside_budget = True

    def num_genomes(self, plan: Planned) -> int:
        """See `Baseline`."""
        return len(_beside(plan.space, plan.budget, uniform_genomes(plan.space)))

    def find(self, problem: Problem) -> dict[str, Genome]:
        """See `Baseline`."""
        return _beside(problem.space, problem.budget, uniform_genomes(problem.space, problem.uniform_name))


def _beside(space: Space, budget: Budget, uniform: dict[str, Genome]) -> dict[str, Genome]:
    """Return which of some genomes are next to a budget on either side, or spend it."""
    costs = {name: space.cost(genome) for name, genome in uniform.items()}
    kept = {name for name, genome in uniform.items() if budget.met_by(space, genome)}
    within = max(sorted(kept), key=costs.__getitem__, default=None)
    above = min((name for name in costs if name not in kept), key=costs.__getitem__, default=None)
    exact = within is not None and costs[within] == budget.total
    return {name: uniform[name] for name in ((within,) if exact else (above, within)) if name is not None}


def uniform_genomes(space: Space, name: Callable[[Level], str] = lambda level: f"uniform_{level.key}") -> dict[str, Genome]:
    """Return the uniform genome of every level that all units have, least compressed first, by its name."""
    genomes = {name(level): one_level(space, level.key) for level in space.units[0].levels}
    return {name: genome for name, genome in genomes.items() if genome is not None}
