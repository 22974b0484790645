"""The first genome: uniform where the target is a level, else random mixes of the two neighbouring levels.

Source: paper, section 3 ("For initialization ...") and the sampling of Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from evopress.currencies import SPARSITY
from evopress.errors import EvoPressError
from evopress.search.constraint import Spending, StepCosts
from evopress.units import Budget, Genome, Space

_FLOAT = 1e-9
"""What a sparsity times a size is off, at most, before it is rounded; of the size."""


def uniform_genome(space: Space, budget: Budget) -> Genome | None:
    """Return the genome with one level everywhere that costs exactly the budget; None if there is none."""
    for level in space.units[0].levels:
        genome = one_level(space, level.key)
        if genome is not None and space.cost(genome) == budget.total and budget.met_by(space, genome):
            return genome
    return None


def one_level(space: Space, key: str) -> Genome | None:
    """Return the genome with every unit at the level of this key; None if a unit lacks it, or it is another sparsity in some.

    Keys tell levels apart; labels are rounded, so that one sparsity may read 70.0% in one unit and 69.9% in a smaller one.
    """
    indices = [next((i for i, level in enumerate(unit.levels) if level.key == key), None) for unit in space.units]
    if None in indices:
        return None
    genome = tuple(index for index in indices if index is not None)
    return genome if _is_one_sparsity(space, genome) else None


def _is_one_sparsity(space: Space, genome: Genome) -> bool:
    """Tell whether some sparsity, rounded to whole weights, is that of every pruned weight.

    Their levels are a fixed number of weights from the target, so elsewhere a key is another sparsity in units of another size.
    """
    whole = space.whole.units
    chosen = [(unit.size, unit.levels[level]) for unit, level in zip(whole, space.unfold(genome), strict=True)]
    pruned = [(size, size - level.cost) for size, level in chosen if level.source == SPARSITY]
    least, most = ([(count + half) / size for size, count in pruned] for half in (-0.5, 0.5))
    return max(least, default=0.0) <= min(most, default=1.0) + _FLOAT


def random_mix(space: Space, budget: Budget, rng: np.random.Generator) -> Genome:
    """Draw a genome whose units sit at the two levels next to the target, within the budget; each kind within its part of a split.

    Raises: EvoPressError if no genome meets the budget.
    """
    return _mixer(space, budget).draw(rng)


def random_mixes(space: Space, budget: Budget, *, num_candidates: int, rng: np.random.Generator) -> list[Genome]:
    """Draw distinct random mixes: `num_candidates`, or what 100 + 10 * num_candidates attempts find, at least one.

    Where the units' levels are given by the budget, as where the target is a level, one draw finds the only mix.

    Raises: EvoPressError if no genome meets the budget.
    """
    if num_candidates < 1:
        raise EvoPressError(f"{num_candidates} random candidates were asked for: at least 1 is needed")
    mixer = _mixer(space, budget)
    found: dict[Genome, None] = {}
    for _ in range(1 if mixer.only_one else 100 + 10 * num_candidates):
        found[mixer.draw(rng)] = None
        if len(found) == num_candidates:
            break
    return list(found)


def _mixer(space: Space, budget: Budget) -> _KindsMixer | _FittingMixer:
    """Return what draws random mixes.

    Raises: EvoPressError if it is known before the first draw that no genome meets the budget.
    """
    fitting = space.inside or len(budget.by_kind) < len(budget.limits)
    return _FittingMixer(space, budget) if fitting else _KindsMixer(space, budget)


def _part(space: Space, members: Sequence[int]) -> Space:
    """Return some units as a space of their own, in which nothing lies in anything."""
    return Space(space.method, tuple(space.units[index] for index in members), space.currency)


class _KindsMixer:
    """Draws random mixes of each kind within its part of a split, or of all units within one total."""

    def __init__(self, space: Space, budget: Budget) -> None:
        self._num_units = len(space)
        self._parts: list[tuple[list[int], _TotalMixer]] = []
        for kind, total in budget.by_kind.items() or ((None, budget.total),):
            members = [index for index, unit in enumerate(space.units) if kind in (None, unit.group)]
            part = Budget(total, budget.target, budget.measure)
            self._parts.append((members, _TotalMixer(_part(space, members), part)))

    @property
    def only_one(self) -> bool:
        """Whether every draw gives the same mix."""
        return all(mixer.only_one for _, mixer in self._parts)

    def draw(self, rng: np.random.Generator) -> Genome:
        """Draw a mix."""
        genome = [0] * self._num_units
        for members, mixer in self._parts:
            for index, level in zip(members, mixer.draw(rng), strict=True):
                genome[index] = level
        return tuple(genome)


class _FittingMixer:
    """Draws random mixes where modules hold other units, or there are several limits.

    Modules are dropped, random ones, where a limit asks for it or the units that stay cannot pay for themselves; those are then
    mixed as ever, and what is left over is spent.
    """

    def __init__(self, space: Space, budget: Budget) -> None:
        self._space, self._budget = space, budget
        self._modules = {index: None for index, unit in enumerate(space.units) if any(level.drops for level in unit.levels)}
        self._spending = Spending(space, budget, self._least())
        self._last: tuple[list[int], int, _TotalMixer | None] | None = None
        """Weights that were there in the last draw, what they may cost, and what mixed them."""

    @property
    def only_one(self) -> bool:
        """Whether every draw gives the same mix: no module is dropped, the weights are given, and nothing is left to spend."""
        spending = self._spending.begin(self._least())
        if spending.exceeded:
            return False
        there, mixer = self._weights(spending.levels)
        if mixer is not None and not mixer.only_one:
            return False
        spending.begin(self._mixed(spending.levels, np.random.default_rng(0)))
        return not spending.exceeded and not any(
            spending.can_move(unit, -1) and spending.fits(spending.step(unit, -1)) for unit in there
        )

    def draw(self, rng: np.random.Generator) -> Genome:
        """Draw a mix.

        Raises: EvoPressError if no genome meets the limits.
        """
        budget = self._budget
        spending = self._spending.begin(self._least())
        order = iter(rng.permutation(list(self._modules)).tolist() if self._modules else [])
        while spending.exceeded:
            module = next(order, None)
            if module is None:
                raise EvoPressError(
                    f"no genome found meets target {budget.target:g} {budget.measure}"
                    f"{''.join(f', {limit}' for limit in budget.limits)}: raise one of them or add more compressed levels"
                )
            if spending.can_move(module, 1) and spending.helps(module):
                spending.move(module, 1)
        there, _ = self._weights(spending.levels)
        levels = self._mixed(spending.levels, rng)
        spending.begin(levels)
        permuted = rng.permutation(there).tolist()
        for may in (spending.helps, lambda index: True):  # further limits on weights; anything moves where what helps is not enough
            for index in permuted:
                while spending.exceeded and spending.can_move(index, 1) and may(index):
                    spending.move(index, 1)
        spending.fill(rng, but=self._modules)
        return tuple(levels)

    def _least(self) -> list[int]:
        """Return what a draw begins with: all modules, the weights in them at their most compressed levels."""
        return [0 if index in self._modules else len(unit.levels) - 1 for index, unit in enumerate(self._space.units)]

    def _weights(self, levels: Sequence[int]) -> tuple[list[int], _TotalMixer | None]:
        """Return the weights that are there, and what mixes their levels; None where all can be at their least compressed ones."""
        space = self._space
        there = [index for index in range(len(space)) if index not in self._modules and not space.is_gone(levels, index)]
        total = self._budget.total - sum(space.prices[index][levels[index]] for index in self._modules)
        if self._last is None or self._last[:2] != (there, total):
            part = _part(space, there)
            mixed = there and total < part.greatest_cost
            mixer = _TotalMixer(part, Budget(total, self._budget.target, self._budget.measure)) if mixed else None
            self._last = there, total, mixer
        return there, self._last[2]

    def _mixed(self, levels: Sequence[int], rng: np.random.Generator) -> list[int]:
        """Return the levels with a random mix of the weights that are there."""
        mixed = list(levels)
        there, mixer = self._weights(levels)
        for index, level in zip(there, mixer.draw(rng) if mixer is not None else [0] * len(there), strict=True):
            mixed[index] = level
        return mixed


class _TotalMixer:
    """Draws random mixes within one total.

    Every unit starts at its most compressed level that is not below the budget's average cost per weight. Random units go one
    level down, each once, until the budget is met (again and again where one level is not enough); random ones among those go
    back up where the rest of the budget allows it. Differs from the authors' code, which leaves that rest unused.

    Raises: EvoPressError if no genome meets the budget.
    """

    def __init__(self, space: Space, budget: Budget) -> None:
        budget.check(space)
        self._space, self._budget, self._steps = space, budget, StepCosts.of(space)
        self._start = [_neighbour_above(space, budget, index) for index in range(len(space))]
        self._slack = budget.total - space.cost(self._start)

    @property
    def only_one(self) -> bool:
        """Whether every draw gives the same mix: no unit has to go down, and none can go up."""
        steps = (less[level] for less, level in zip(self._steps.less, self._start, strict=True))
        return self._slack >= 0 and not any(0 < step <= self._slack for step in steps)

    def draw(self, rng: np.random.Generator) -> list[int]:
        """Draw a mix.

        Raises: EvoPressError if no genome meets the budget.
        """
        steps, levels, slack = self._steps, list(self._start), self._slack
        moved: list[int] = []
        for _ in range(max(len(unit.levels) for unit in self._space.units)):  # a turn compresses every unit that can be
            if slack >= 0:
                break
            for unit in rng.permutation(len(levels)).tolist():
                if slack < 0 and (step := steps.more[unit][levels[unit]]):
                    levels[unit] += 1
                    slack += step
                    moved.append(unit)
        if slack < 0:
            raise EvoPressError(
                f"no genome of the {len(levels)} units reaches the budget {self._budget.total}: every level must cost less than "
                "the one before; build the level database again"
            )
        if not moved:  # some units have no level as dear as the average: the others may rise above theirs
            moved = [unit for unit, level in enumerate(levels) for _ in range(level)]
        for index in rng.permutation(len(moved)).tolist():
            unit = moved[index]
            if 0 < (step := steps.less[unit][levels[unit]]) <= slack:
                levels[unit] -= 1
                slack -= step
        return levels


def initial_candidates(space: Space, budget: Budget, *, num_candidates: int, rng: np.random.Generator) -> list[Genome]:
    """Return the uniform genome alone where the target is a level, else distinct random mixes (see `random_mixes`)."""
    uniform = uniform_genome(space, budget)
    return [uniform] if uniform is not None else random_mixes(space, budget, num_candidates=num_candidates, rng=rng)


def _neighbour_above(space: Space, budget: Budget, index: int) -> int:
    """Find a unit's most compressed level that costs at least the budget's average per weight; 0 if none does."""
    unit = space.units[index]
    dear = [i for i, cost in enumerate(space.prices[index]) if cost * space.size >= budget.total * unit.size]
    return dear[-1] if dear else 0
