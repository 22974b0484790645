"""Which exchanges of levels keep the budget: the rules behind the config word `exchange`.

Source: paper, section 3 (level-switch mutation) and 4.3 (switches only between equal sizes). A step is the move of one
unit by one level; its cost is the difference of the two levels' costs. Nothing here knows what a level means, so the same
rules serve bit widths, sparsities and dropped modules.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from evopress.errors import EvoPressError
from evopress.units import Budget, Genome, Space, Unit

Prices = Sequence[Sequence[int]]
"""prices[unit][level], whole numbers of any sign."""


class Exchange(Protocol):
    """Exchange levels between units without ever exceeding the budget."""

    def __call__(self, levels: list[int], num_switches: int, rng: np.random.Generator) -> bool:
        """Apply switches to `levels` in place; False if one was not found (`levels` is then of no use)."""
        ...


@dataclass(frozen=True)
class StepCosts:
    """Cost of every step, as `table[unit][level]`; 0 where the level has no such neighbour."""

    less: tuple[tuple[int, ...], ...]
    """Cost added by going one level less compressed (to `level - 1`)."""
    more: tuple[tuple[int, ...], ...]
    """Cost released by going one level more compressed (to `level + 1`)."""

    @classmethod
    def of(cls, space: Space) -> StepCosts:
        """Tabulate the steps of a space."""
        steps = [tuple(a - b for a, b in itertools.pairwise(prices)) for prices in space.prices]
        return cls(less=tuple((0, *step) for step in steps), more=tuple((*step, 0) for step in steps))


class GroupSwitch:
    """Switch one level between two units of one group whose steps cost the same; the cost stays exactly as it was.

    Source: paper, sections 3 and 4.3; the authors' groups. A group is drawn with probability proportional to its number of
    units, in it a unit that can be compressed more, then one that can be compressed less. Differs from the authors' code: the
    two are never the same unit.
    """

    max_attempts = 8
    """Draws before all switches are listed and one of them is drawn uniformly (only where most groups are stuck)."""

    def __init__(self, space: Space, key: Callable[[Unit], Hashable]) -> None:
        self._steps = StepCosts.of(space)
        groups: dict[Hashable, list[int]] = {}
        for index, unit in enumerate(space.units):
            groups.setdefault(key(unit), []).append(index)
        self._group_of = [groups[key(unit)] for unit in space.units]

    def __call__(self, levels: list[int], num_switches: int, rng: np.random.Generator) -> bool:
        return all(self._switch(levels, rng) for _ in range(num_switches))

    def _switch(self, levels: list[int], rng: np.random.Generator) -> bool:
        more = self._steps.more
        for _ in range(self.max_attempts):
            group = self._group_of[rng.integers(len(levels))]  # a uniform unit's group: probability by number of units
            givers = [i for i in group if more[i][levels[i]]]
            if givers and (takers := self._takers(levels, giver := _draw(givers, rng))):
                taker = _draw(takers, rng)
                break
        else:
            pairs = [(i, j) for i, level in enumerate(levels) if more[i][level] for j in self._takers(levels, i)]
            if not pairs:
                return False
            giver, taker = pairs[rng.integers(len(pairs))]
        levels[giver] += 1
        levels[taker] -= 1
        return True

    def _takers(self, levels: list[int], giver: int) -> list[int]:
        """List the units of the giver's group that can take exactly what the giver's step releases."""
        less, released = self._steps.less, self._steps.more[giver][levels[giver]]
        return [j for j in self._group_of[giver] if less[j][levels[j]] == released and j != giver]


class ExactExchange:
    """Move one unit one level and others, of any size, one level the other way, so that the cost stays as it was.

    A switch between two equal steps is the smallest case; one unit of 884,736 weights against eight of 110,592 is another. So
    the split of the budget between sizes can change, which groups by size freeze at the initial genome. Whether the one unit
    is compressed more or less is a fair coin's choice.
    """

    max_attempts = 50
    """Draws of (direction, unit, order of the others) for one exchange."""

    def __init__(self, space: Space) -> None:
        self._steps = StepCosts.of(space)

    def __call__(self, levels: list[int], num_switches: int, rng: np.random.Generator) -> bool:
        return all(self._exchange(levels, rng) for _ in range(num_switches))

    def _exchange(self, levels: list[int], rng: np.random.Generator) -> bool:
        for _ in range(self.max_attempts):
            compress = rng.random() < 0.5
            own, others = (self._steps.more, self._steps.less) if compress else (self._steps.less, self._steps.more)
            movable = [i for i, level in enumerate(levels) if own[i][level]]
            if not movable:
                continue
            unit = _draw(movable, rng)
            partners, missing = [], own[unit][levels[unit]]
            # What fits in random order: the same as drawing again and again among the units that still fit.
            for i in rng.permutation(len(levels)).tolist():
                step = others[i][levels[i]]
                if 0 < step <= missing and i != unit:
                    partners.append(i)
                    missing -= step
                    if not missing:
                        sign = 1 if compress else -1
                        levels[unit] += sign
                        for partner in partners:
                            levels[partner] -= sign
                        return True
        return False


class RepairedExchange:
    """Make random units one level less compressed, then random units one level more compressed until the budget is met.

    Source: the authors' `group_rule=none`. Slack that earlier generations left may be used up. Differs from the authors' code:
    no limit on the ratio of what is added to what is removed, since the cost stays within one step of the budget by itself.
    """

    def __init__(self, space: Space, budget: Budget) -> None:
        self._costs = space.prices
        self._steps = StepCosts.of(space)
        self._budget = budget.total

    def __call__(self, levels: list[int], num_switches: int, rng: np.random.Generator) -> bool:
        less, more = self._steps.less, self._steps.more
        cost = sum(costs[level] for costs, level in zip(self._costs, levels, strict=True))
        for _ in range(num_switches):
            movable = [i for i, level in enumerate(levels) if less[i][level]]
            if not movable:
                return False
            unit = _draw(movable, rng)
            cost += less[unit][levels[unit]]
            levels[unit] -= 1
        while cost > self._budget:  # ends: every turn compresses a unit
            movable = [i for i, level in enumerate(levels) if more[i][level]]
            if not movable:
                return False
            unit = _draw(movable, rng)
            cost -= more[unit][levels[unit]]
            levels[unit] += 1
        return True


def tables_of(space: Space, budget: Budget) -> list[tuple[Prices, int]]:
    """Return what every level of every unit costs of each limit, and the limit's total; the budget's own first."""
    totals = [budget.total, *(limit.total for limit in budget.limits)]
    tables: list[list[Sequence[int]]] = [[(0,) * len(unit.levels) for unit in space.units] for _ in totals]
    for unit, counted in enumerate(_counted(space, budget)):
        for limit, prices in counted:
            tables[limit][unit] = prices
    return list(zip(tables, totals, strict=True))


class Spending:
    """What a list of levels spends of every limit, kept up to date while units move one by one.

    What lies in a dropped module is free, so the cost of a module's step depends on the levels of what lies in it. There may be a
    limit for each of many groups, so a unit knows which of them count it.
    """

    def __init__(self, space: Space, budget: Budget, levels: list[int]) -> None:
        """Begin with `levels`, which only `move` may change from now on."""
        self._space = space
        self._totals = [budget.total, *(limit.total for limit in budget.limits)]
        self._counted = _counted(space, budget)
        self._members: dict[int, list[int]] = {}
        for index, module in enumerate(space.inside):
            if module is not None:
                self._members.setdefault(module, []).append(index)
        self.begin(levels)

    def begin(self, levels: list[int]) -> Spending:
        """Take other levels, which only `move` may change from now on."""
        self.levels = levels
        self._spent = [0] * len(self._totals)
        for unit, level in enumerate(levels):
            if not self._space.is_gone(levels, unit):
                for limit, prices in self._counted[unit]:
                    self._spent[limit] += prices[level]
        self.exceeded = [limit for limit, left in enumerate(self.left) if left < 0]
        """The limits that are exceeded, 0 being the budget's own total."""
        return self

    @property
    def left(self) -> list[int]:
        """What each limit leaves, the budget's own total first; below 0 where it is exceeded."""
        return [total - spent for spent, total in zip(self._spent, self._totals, strict=True)]

    def can_move(self, unit: int, by: int) -> bool:
        """Tell whether a unit that is there has a level so many levels further."""
        return 0 <= self.levels[unit] + by < len(self._space.units[unit].levels) and not self._space.is_gone(self.levels, unit)

    def step(self, unit: int, by: int) -> dict[int, int]:
        """Return what moving a unit that is there adds to the limits that count it or what lies in it; to others, nothing."""
        options, old = self._space.units[unit].levels, self.levels[unit]
        new = old + by
        added = {limit: prices[new] - prices[old] for limit, prices in self._counted[unit]}
        if options[old].drops != options[new].drops:
            sign = -1 if options[new].drops else 1
            for member in self._members.get(unit, ()):
                for limit, prices in self._counted[member]:
                    added[limit] = added.get(limit, 0) + sign * prices[self.levels[member]]
        return added

    def fits(self, added: Mapping[int, int]) -> bool:
        """Tell whether all limits are kept with so much more."""
        return all(more <= 0 or more <= self._totals[limit] - self._spent[limit] for limit, more in added.items())

    def helps(self, unit: int) -> bool:
        """Tell whether compressing a unit more brings a limit that is exceeded nearer, and exceeds no other."""
        added = self.step(unit, 1)
        return any(added.get(limit, 0) < 0 for limit in self.exceeded) and self.fits(added)

    def move(self, unit: int, by: int) -> None:
        """Move a unit that is there."""
        for limit, more in self.step(unit, by).items():
            self._spent[limit] += more
        self.levels[unit] += by
        self.exceeded = [limit for limit, left in enumerate(self.left) if left < 0]

    def fill(self, rng: np.random.Generator, *, but: Collection[int] = ()) -> int:
        """Make random units less compressed, each by one level, as far as the limits allow it; return how many."""
        moved = 0
        for unit in rng.permutation(len(self.levels)).tolist():
            if unit not in but and self.can_move(unit, -1) and self.fits(self.step(unit, -1)):
                self.move(unit, -1)
                moved += 1
        return moved


def _counted(space: Space, budget: Budget) -> list[list[tuple[int, Sequence[int]]]]:
    """Return of every unit the limits that count it, 0 being the budget's own total, each with what its levels cost of that."""
    counted: list[list[tuple[int, Sequence[int]]]] = [[(0, prices)] for prices in space.prices]
    of_kind: dict[str | None, list[int]] = {}
    for index, unit in enumerate(space.units):
        for kind in unit.kinds:
            of_kind.setdefault(kind, []).append(index)
    for place, limit in enumerate(budget.limits, start=1):
        prices = space.prices_in(limit.currency or space.words)
        for index in of_kind.get(limit.kind, ()):
            counted[index].append((place, prices[index]))
    return counted


class FittingExchange:
    """Move one unit one level, and others the other way: as many as it takes to keep all limits, or as many as then fit.

    For costs that do not balance exactly: levels as stored, modules beside weights, several limits. A dropped module pays for many
    weights' levels, one that is taken back is paid for by many. What lies in a dropped module does not move.
    """

    def __init__(self, space: Space, budget: Budget) -> None:
        self._space, self._spending = space, Spending(space, budget, [0] * len(space))

    def __call__(self, levels: list[int], num_switches: int, rng: np.random.Generator) -> bool:
        spending = self._spending.begin(levels)
        return all(self._exchange(spending, rng) for _ in range(num_switches))

    def _exchange(self, spending: Spending, rng: np.random.Generator) -> bool:
        by = 1 if rng.random() < 0.5 else -1
        movable = [unit for unit in range(len(self._space)) if spending.can_move(unit, by)]
        if not movable:
            return False
        moved = {_draw(movable, rng)}
        spending.move(next(iter(moved)), by)
        while spending.exceeded:
            helpful = [
                unit
                for unit in range(len(self._space))
                if unit not in moved and spending.can_move(unit, 1) and spending.helps(unit)
            ]
            if not helpful:
                return False
            spending.move(unit := _draw(helpful, rng), 1)
            if not spending.can_move(unit, 1):
                moved.add(unit)
        gained = spending.fill(rng, but=moved)
        return gained > 0 or by < 0  # what is compressed is compressed for something


EXCHANGES: dict[str, Callable[[Space, Budget], Exchange]] = {
    "size": lambda space, budget: GroupSwitch(space, lambda unit: unit.size),
    "name": lambda space, budget: GroupSwitch(space, lambda unit: unit.group),
    "any": lambda space, budget: ExactExchange(space),
    "none": RepairedExchange,
    "fit": FittingExchange,
}
"""The values of `exchange`: between units of equal size, of equal kind (experts of one layer), any that balance exactly, any
repaired to fit; fit: any, whatever the costs and limits, modules beside weights too."""


class Deviation:
    """Bound how far genomes may go from the uniform one, in levels.

    Source: `max_level` and `max_total_deviation` of the authors' sparsity search.

    Args:
        centre: the uniform genome at the target.
        max_level: greatest deviation of one unit; None: any.
        max_total: greatest sum of deviations; None: any.
    """

    def __init__(self, centre: Genome, *, max_level: int | None = None, max_total: int | None = None) -> None:
        self._centre, self._max_level, self._max_total = centre, max_level, max_total

    def __call__(self, genome: Sequence[int]) -> bool:
        """Tell whether a genome is within the bounds."""
        deviations = [abs(level - centre) for level, centre in zip(genome, self._centre, strict=True)]
        far = self._max_level is not None and max(deviations) > self._max_level
        return not far and (self._max_total is None or sum(deviations) <= self._max_total)


def make_exchange(name: str, space: Space, budget: Budget) -> Exchange:
    """Build the exchange rule of this name; raise EvoPressError if there is none."""
    if name not in EXCHANGES:
        raise EvoPressError(f'exchange "{name}" is unknown: choose one of {", ".join(EXCHANGES)}')
    if name != "fit" and (space.inside or len(budget.by_kind) < len(budget.limits)):
        raise EvoPressError(
            f"search.exchange={name} keeps one total of costs that add up, but here modules hold other units or there are further "
            "limits: use search.exchange=fit"
        )
    return EXCHANGES[name](space, budget)


def _draw(items: list[int], rng: np.random.Generator) -> int:
    return items[rng.integers(len(items))]
