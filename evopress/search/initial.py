"""The first genome: uniform where the target is a level, else random mixes of the two neighbouring levels.

Source: paper, section 3 ("For initialization ...") and the sampling of Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from evopress.errors import EvoPressError
from evopress.search.constraint import Spending, StepCosts
from evopress.units import Budget, Genome, Space


def uniform_genome(space: Space, budget: Budget) -> Genome | None:
    """Return the genome with one level everywhere that costs exactly the budget; None if there is none."""
    for level in space.units[0].levels:
        genome = one_level(space, level.key)
        if genome is not None and space.cost(genome) == budget.total and budget.met_by(space, genome):
            return genome
    return None


def one_level(space: Space, key: str) -> Genome | None:
    """Return the genome with every unit at the level of this key; None if a unit lacks it.

    Keys tell levels apart; labels are rounded, so that one sparsity may read 70.0% in one unit and 69.9% in a smaller one.
    """
    indices = [next((i for i, level in enumerate(unit.levels) if level.key == key), None) for unit in space.units]
    return None if None in indices else tuple(index for index in indices if index is not None)


def random_mix(space: Space, budget: Budget, rng: np.random.Generator) -> Genome:
    """Draw a genome whose units sit at the two levels next to the target, within the budget; each kind within its part of a split.

    Raises: EvoPressError if no genome meets the budget.
    """
    genome = [0] * len(space)
    if space.inside or len(budget.by_kind) < len(budget.limits):
        return _fitting_mix(space, budget, rng)
    for kind, total in budget.by_kind.items() or ((None, budget.total),):
        members = [index for index, unit in enumerate(space.units) if kind in (None, unit.group)]
        part = _part(space, members)
        mix = _mix(part, Budget(total, budget.target, budget.measure), rng)
        for index, level in zip(members, mix, strict=True):
            genome[index] = level
    return tuple(genome)


def _part(space: Space, members: Sequence[int]) -> Space:
    """Return some units as a space of their own, in which nothing lies in anything."""
    return Space(space.method, tuple(space.units[index] for index in members), space.currency)


def _fitting_mix(space: Space, budget: Budget, rng: np.random.Generator) -> Genome:
    """Draw a random mix where modules hold other units, or there are several limits.

    Modules are dropped, random ones, where a limit asks for it or the units that stay cannot pay for themselves; those are then
    mixed as ever, and what is left over is spent.

    Raises: EvoPressError if no genome meets the limits.
    """
    modules = {index: None for index, unit in enumerate(space.units) if any(level.drops for level in unit.levels)}  # in order
    weights = [index for index in range(len(space)) if index not in modules]
    levels = [0 if index in modules else len(unit.levels) - 1 for index, unit in enumerate(space.units)]
    spending = Spending(space, budget, levels)
    order = iter(rng.permutation(list(modules)).tolist() if modules else [])
    while spending.exceeded:
        module = next(order, None)
        if module is None:
            raise EvoPressError(
                f"no genome found meets target {budget.target:g} {budget.measure}"
                f"{''.join(f', {limit}' for limit in budget.limits)}: raise one of them or add more compressed levels"
            )
        if spending.can_move(module, 1) and spending.helps(module):
            spending.move(module, 1)
    there = [index for index in weights if not space.is_gone(levels, index)]
    part, total = _part(space, there), budget.total - sum(space.prices[index][levels[index]] for index in modules)
    if there and total < part.greatest_cost:
        mix = _mix(part, Budget(total, budget.target, budget.measure), rng)
    else:
        mix = [0] * len(there)
    for index, level in zip(there, mix, strict=True):
        levels[index] = level
    spending.begin(levels)
    permuted = rng.permutation(there).tolist()
    for may in (spending.helps, lambda index: True):  # further limits on weights; anything moves where what helps is not enough
        for index in permuted:
            while spending.exceeded and spending.can_move(index, 1) and may(index):
                spending.move(index, 1)
    spending.fill(rng, but=modules)
    return tuple(levels)


def _mix(space: Space, budget: Budget, rng: np.random.Generator) -> list[int]:
    """Draw a random mix within one total.

    Every unit starts at its most compressed level that is not below the budget's average cost per weight. Random units go one
    level down, each once, until the budget is met (again and again where one level is not enough); random ones among those go
    back up where the rest of the budget allows it. Differs from the authors' code, which leaves that rest unused.

    Raises: EvoPressError if no genome meets the budget.
    """
    budget.check(space)
    steps = StepCosts.of(space)
    levels = [_neighbour_above(space, budget, index) for index in range(len(space))]
    slack = budget.total - space.cost(levels)
    moved: list[int] = []
    for _ in range(max(len(unit.levels) for unit in space.units)):  # a turn compresses every unit that can be
        if slack >= 0:
            break
        for unit in rng.permutation(len(space)).tolist():
            if slack < 0 and (step := steps.more[unit][levels[unit]]):
                levels[unit] += 1
                slack += step
                moved.append(unit)
    if slack < 0:
        raise EvoPressError(
            f"no genome of the {len(space)} units reaches the budget {budget.total}: every level must cost less than the one "
            "before; build the level database again"
        )
    if not moved:  # some units have no level as dear as the average: the others may rise above theirs
        moved = [unit for unit, level in enumerate(levels) for _ in range(level)]
    for index in rng.permutation(len(moved)).tolist():
        unit = moved[index]
        if 0 < (step := steps.less[unit][levels[unit]]) <= slack:
            levels[unit] -= 1
            slack -= step
    return levels


def random_mixes(space: Space, budget: Budget, *, num_candidates: int, rng: np.random.Generator) -> list[Genome]:
    """Draw distinct random mixes: `num_candidates`, or what 100 + 10 * num_candidates attempts find, at least one."""
    if num_candidates < 1:
        raise EvoPressError(f"{num_candidates} random candidates were asked for: at least 1 is needed")
    found: dict[Genome, None] = {}
    for _ in range(100 + 10 * num_candidates):
        found[random_mix(space, budget, rng)] = None
        if len(found) == num_candidates:
            break
    return list(found)


def initial_candidates(space: Space, budget: Budget, *, num_candidates: int, rng: np.random.Generator) -> list[Genome]:
    """Return the uniform genome alone where the target is a level, else distinct random mixes (see `random_mixes`)."""
    uniform = uniform_genome(space, budget)
    return [uniform] if uniform is not None else random_mixes(space, budget, num_candidates=num_candidates, rng=rng)


def _neighbour_above(space: Space, budget: Budget, index: int) -> int:
    """Find a unit's most compressed level that costs at least the budget's average per weight; 0 if none does."""
    unit = space.units[index]
    dear = [i for i, cost in enumerate(space.prices[index]) if cost * space.size >= budget.total * unit.size]
    return dear[-1] if dear else 0
