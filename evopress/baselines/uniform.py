"""The uniform baseline: one level for all units.

Pruned levels lie around one sparsity, the only one at which all units have a level. At another target there is a second database
beside the run's, which has every unit at just that sparsity.
"""

from __future__ import annotations

from collections.abc import Callable

from evopress.baselines.baseline import WEIGHTS, Baseline, Planned, Problem, check_hessians
from evopress.compress.compressor import Compressor
from evopress.compress.sparse import PruneTo, SparsityLevels, kept_at
from evopress.currencies import SPARSITY
from evopress.search.initial import one_level
from evopress.settings import RunSettings
from evopress.units import Budget, Genome, Level, Space


class Uniform(Baseline):
    """The uniform genomes on either side of the budget, or the one that costs exactly as much."""

    serves = (WEIGHTS,)
    beside_budget = True

    def check(self, run: RunSettings) -> None:
        """See `Baseline`."""
        several = run.budgets or run.max_kl is not None or run.min_agreement is not None
        aside = run.method.name == "sparsity" and (several or run.method.centre not in (None, run.sparsity))
        if aside and "baselines" in run.stages:
            check_hessians(run, "uniform", " where the sparsity is not method.centre, for it is pruned anew there")

    def further(self, plan: Planned, compressor: Compressor) -> Compressor | None:
        """See `Baseline`."""
        return _at_target(plan.space, plan.budget, compressor) if _lacks_target(plan.space, plan.budget) else None

    def num_genomes(self, plan: Planned) -> int:
        """See `Baseline`."""
        return 1 if _lacks_target(plan.space, plan.budget) else len(_beside(plan.space, plan.budget, uniform_genomes(plan.space)))

    def find(self, problem: Problem) -> dict[str, Genome]:
        """See `Baseline`."""
        space, budget = problem.space, problem.budget
        if not _lacks_target(space, budget):
            return _beside(space, budget, uniform_genomes(space, problem.uniform_name))
        problem.hessians()  # which the levels are pruned by
        levels = problem.add_levels("uniform", _at_target(space, budget, problem.compressor()))
        return {"uniform": levels.genome_of_last((0,) * len(space.whole))}


def _lacks_target(space: Space, budget: Budget) -> bool:
    """Tell whether units are pruned, and the target is no level of all."""
    pruned = any(level.source == SPARSITY for unit in space.units for level in unit.levels)
    return pruned and all(space.cost(genome) != budget.total for genome in uniform_genomes(space).values())


def _at_target(space: Space, budget: Budget, pruner: Compressor) -> PruneTo:
    """Return what prunes every unit to the target."""
    assert isinstance(pruner, SparsityLevels)
    return PruneTo(pruner=pruner, kept={unit.name: (kept_at(unit.size, budget.target),) for unit in space.whole.units})


def _beside(space: Space, budget: Budget, uniform: dict[str, Genome]) -> dict[str, Genome]:
    """Return which of some genomes are next to a budget on either side, or spend it."""
    costs = {name: space.cost(genome) for name, genome in uniform.items()}
    kept = {name for name, genome in uniform.items() if budget.met_by(space, genome)}
    within = max(sorted(kept), key=costs.__getitem__, default=None)
    above = min((name for name in costs if name not in kept), key=costs.__getitem__, default=None)
    exact = within is not None and costs[within] == budget.total
    return {name: uniform[name] for name in ((within,) if exact else (above, within)) if name is not None}


def uniform_genomes(space: Space, name: Callable[[Level], str] = lambda level: f"uniform_{level.key}") -> dict[str, Genome]:
    """Return the uniform genome of every level that is one and the same of all units, least compressed first, by its name."""
    genomes = {name(level): one_level(space, level.key) for level in space.units[0].levels}
    return {name: genome for name, genome in genomes.items() if genome is not None}
