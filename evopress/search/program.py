"""The integer program of a genome: one level for each unit, the least sum of values, costs within limits.

Exact below a thousand units; of more, what no best genome can have is ruled out before, and the solver ends where what it has found
is good enough, or after a number of nodes (`reduction.py`; the log says at level DEBUG how far from the best that can be).

With x[u, l] = 1 where unit u is at level l, a unit has one level, and one that lies in a module has one as long as the module is
kept: the levels of both then add up to the same. So what lies in a dropped module costs nothing and counts for nothing.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Hashable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from evopress.search.constraint import Prices, tables_of
from evopress.search.reduction import Relaxation
from evopress.units import Budget, Genome, Space

if TYPE_CHECKING:
    from scipy.optimize import LinearConstraint

logger = logging.getLogger(__name__)


def best_in(
    space: Space,
    budget: Budget,
    values: Sequence[Sequence[float]],
    *,
    near: Genome | None = None,
    most_changes: int | None = None,
) -> Genome | None:
    """Choose the genome with the least sum of values within a budget and all its limits; see `best_genome`.

    What lies in a dropped module has the level that it has in `near`.
    """
    drops = [tuple(level.drops for level in unit.levels) for unit in space.units]
    return best_genome(
        tables_of(space, budget),
        values,
        near=near,
        most_changes=most_changes,
        inside=space.inside or (None,) * len(space),
        drops=drops,
    )


def best_genome(
    limits: Sequence[tuple[Prices, int]],
    values: Sequence[Sequence[float]],
    *,
    near: Genome | None = None,
    most_changes: int | None = None,
    inside: Sequence[int | None] = (),
    drops: Sequence[Sequence[bool]] = (),
) -> Genome | None:
    """Choose the levels with the least sum of values.

    Args:
        limits: prices, and the most that the chosen levels' may add up to.
        values: values[unit][level]; infinite for a level that may not be chosen.
        near: a genome that at most `most_changes` units may differ from.
        inside: of every unit the index of the module that it lies in; None: it lies in none.
        drops: drops[unit][level] tells whether the unit, a module, is not there at a level.

    Returns: None if no genome is within the limits.
    """
    variables = _Variables([len(of_unit) for of_unit in values], inside, drops)
    objective = np.array(variables.above_least(values)[0])
    allowed, changes = np.isfinite(objective), None
    if near is not None and most_changes is not None:
        allowed &= _worth_making(limits, values, near, most_changes, variables.inside, drops)
        changes = variables.changes(near, most_changes)
    objective = np.where(allowed, objective, 0.0)
    # The solver stops at an absolute gap of 1e-6, which must be small against every difference that matters.
    objective = objective / (np.abs(objective).max() or 1.0) * 1e4
    capacities = [_Capacity(variables, prices, total) for prices, total in limits]
    if any(capacity.left < 0 for capacity in capacities):
        return None
    if changes is None and len(values) >= _MANY_UNITS:
        genome = _of_many(variables, objective, allowed, capacities)
    else:
        genome = _solved(variables, objective, allowed, capacities, changes)
    if genome is None:
        return None
    there = variables.there(genome)
    return tuple(
        level if counts else (0 if near is None else near[unit])
        for unit, (level, counts) in enumerate(zip(genome, there, strict=True))
    )


_MANY_UNITS = 1000
"""Of so many the solver may take minutes, or not come to an end: most levels are ruled out before, and it is told when to end."""
_END: dict[str, Any] = {"mip_rel_gap": 1e-5, "node_limit": 1000}
"""A relative gap of the sum of values, and a number of nodes: a limit of time would not give the same genome twice."""


class _Variables:
    """The program's variables, of every unit one for each level, in a row; what they mean to each other.

    Args: as `best_genome` has them, `counts` the number of every unit's levels.
    """

    def __init__(self, counts: Sequence[int], inside: Sequence[int | None], drops: Sequence[Sequence[bool]]) -> None:
        self.counts, self.inside, self._drops = counts, inside or (None,) * len(counts), drops
        self.size = sum(counts)
        self.starts = np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(int)
        """Every unit's first variable."""
        self._kept = {  # the variables of which one is 1 as long as a module is there
            module: [self.starts[module] + level for level, gone in enumerate(drops[module]) if not gone]
            for module in sorted({module for module in self.inside if module is not None})
        }

    def above_least(self, of_units: Sequence[Sequence[float]]) -> tuple[list[float], float]:
        """Take each unit's least number off, which is paid anyhow or as its module is; return the rest, and what is paid anyhow."""
        least = [min(filter(math.isfinite, of_unit)) for of_unit in of_units]
        flat = [number - low for of_unit, low in zip(of_units, least, strict=True) for number in of_unit]
        total = sum(low for low, module in zip(least, self.inside, strict=True) if module is None)
        for low, module in zip(least, self.inside, strict=True):
            for variable in () if module is None else self._kept[module]:
                flat[variable] += low
        return flat, total

    def one_level_each(self) -> LinearConstraint:
        """Return that a unit has one level, and one in a module as long as that is there."""
        from scipy.optimize import LinearConstraint
        from scipy.sparse import csr_array

        num_units = len(self.counts)
        rows, columns = [np.repeat(np.arange(num_units), self.counts)], [np.arange(self.size)]
        entries = [np.ones(self.size)]
        for unit, module in enumerate(self.inside):
            if module is not None:
                rows.append(np.full(len(self._kept[module]), unit))
                columns.append(np.array(self._kept[module], dtype=int))
                entries.append(np.full(len(self._kept[module]), -1.0))
        places = np.concatenate(rows), np.concatenate(columns)
        levels = csr_array((np.concatenate(entries), places), shape=(num_units, self.size))
        one = np.array([float(module is None) for module in self.inside])
        return LinearConstraint(levels, one, one)

    def changes(self, near: Genome, most: int) -> LinearConstraint:
        """Return that at most so many units differ from a genome, those that are not there in it aside."""
        from scipy.optimize import LinearConstraint

        same, number = np.zeros((1, self.size)), 0
        for unit, module in enumerate(self.inside):
            if module is not None and self._drops[module][near[module]]:
                continue  # whatever it becomes
            same[0, self.starts[unit] + near[unit]] += 1.0
            if module is None:
                number += 1
            else:
                same[0, self._kept[module]] -= 1.0
        return LinearConstraint(same, lb=number - most)

    def relaxation(self, objective: np.ndarray, allowed: np.ndarray, capacities: Sequence[_Capacity]) -> Relaxation:
        """Return the program with prices on what is spent."""
        keeps = np.zeros(self.size, dtype=bool)
        keeps[[variable for those in self._kept.values() for variable in those]] = True
        return Relaxation(
            values=objective,
            costs=np.stack([capacity.costs for capacity in capacities]),
            allowed=allowed,
            unit=np.repeat(np.arange(len(self.counts)), self.counts),
            module=np.array([-1 if module is None else module for module in self.inside]),
            keeps=keeps,
            capacities=np.array([capacity.left for capacity in capacities], dtype=np.float64),
        )

    def genome(self, x: np.ndarray) -> list[int]:
        """Return the level of every unit: the variable that is next to 1."""
        return [int(np.argmax(of_unit)) for of_unit in np.split(x, self.starts[1:])]

    def levels(self, chosen: np.ndarray) -> list[int]:
        """Return the level of every unit by its variable."""
        return [int(level) for level in chosen - self.starts]

    def there(self, genome: Sequence[int]) -> list[bool]:
        """Tell of every unit whether it is in no module that the genome drops."""
        return [module is None or not self._drops[module][genome[module]] for module in self.inside]


class _Capacity:
    """A limit in units of the greatest common divisor of its prices: small integers, exact in the solver."""

    def __init__(self, variables: _Variables, prices: Prices, total: int) -> None:
        extra, least = variables.above_least(prices)
        self._prices, self._total = prices, total
        self._divisor = math.gcd(*map(int, extra)) or 1
        self.costs = np.array([price // self._divisor for price in extra], dtype=np.float64)
        """Of every variable, beyond its unit's least."""
        self.left = (total - int(least)) // self._divisor
        """What may be spent beyond the least."""

    def constraint(self) -> LinearConstraint:
        from scipy.optimize import LinearConstraint

        return LinearConstraint(self.costs[None, :], ub=self.left)

    def tighten(self, genome: Sequence[int], there: Sequence[bool]) -> bool:
        """Lower the capacity by what a genome spends too much; return whether it does."""
        spent = sum(of_unit[level] for of_unit, level, counts in zip(self._prices, genome, there, strict=True) if counts)
        over = max(spent - self._total, 0)
        self.left -= -(-over // self._divisor)
        return over > 0


def _solved(
    variables: _Variables,
    objective: np.ndarray,
    allowed: np.ndarray,
    capacities: Sequence[_Capacity],
    changes: LinearConstraint | None = None,
    end: Mapping[str, Any] = MappingProxyType({"mip_rel_gap": 0.0}),
) -> list[int] | None:
    """Return the best genome within all capacities, counted in integers; None if there is none, or none before the end.

    Numbers of eight digits are not exact in the solver, which takes 0.999999 for 1: a capacity that what it finds exceeds is
    tightened until nothing does.
    """
    from scipy.optimize import Bounds, milp  # half a second, which naming a strategy need not wait for

    levels, also = variables.one_level_each(), () if changes is None else (changes,)
    while True:
        result = milp(
            objective,
            integrality=np.ones(variables.size),
            bounds=Bounds(0, allowed.astype(np.float64)),
            constraints=[levels, *(capacity.constraint() for capacity in capacities), *also],
            options=dict(end),
        )
        if result.x is None:
            return None
        genome = variables.genome(result.x)
        there = variables.there(genome)
        exceeded = [capacity.tighten(genome, there) for capacity in capacities]
        if not any(exceeded):
            return genome


def _of_many(
    variables: _Variables, objective: np.ndarray, allowed: np.ndarray, capacities: Sequence[_Capacity]
) -> list[int] | None:
    """Return the best genome that the solver finds among what is left, or that of the relaxation where that is better."""
    relaxation = variables.relaxation(objective, allowed, capacities)
    reduced = relaxation.reduced()
    if reduced.within is None:
        return _solved(variables, objective, reduced.allowed, capacities)
    found = [variables.levels(reduced.within), _solved(variables, objective, reduced.allowed, capacities, end=_END)]
    value, genome = min((relaxation.value(variables.starts + genome), genome) for genome in found if genome is not None)
    logger.debug("integer program of %d units: at most %.1e above the best", len(genome), 1 - reduced.lower / (value or 1.0))
    return genome


def _worth_making(
    limits: Sequence[tuple[Prices, int]],
    values: Sequence[Sequence[float]],
    near: Genome,
    most_changes: int,
    inside: Sequence[int | None],
    drops: Sequence[Sequence[bool]],
) -> np.ndarray:
    """Tell which levels the best genome within so many changes may have, [units and levels]: of thousands of units these are few.

    Of moves that add the same to every limit, of units that are there together, only so many of the best can be made: for any
    other, one of theirs is left that does as well.
    """
    modules = set(inside)
    alike: dict[Hashable, list[tuple[float, int, int]]] = {}
    worth = [[True] * len(of_unit) for of_unit in values]
    for unit, (of_unit, module) in enumerate(zip(values, inside, strict=True)):
        now = near[unit]
        if unit in modules or not math.isfinite(of_unit[now]) or (module is not None and drops[module][near[module]]):
            continue  # what others depend on, and what may change for nothing
        for level, value in enumerate(of_unit):
            if level != now:
                added = (prices[unit][level] - prices[unit][now] for prices, _ in limits)
                alike.setdefault((module, *added), []).append((value - of_unit[now], unit, level))
                worth[unit][level] = False
    for moves in alike.values():
        units: set[int] = set()
        for _, unit, level in sorted(moves):
            if len(units) == most_changes:
                break
            if unit not in units:
                units.add(unit)
                worth[unit][level] = True
    return np.array([each for of_unit in worth for each in of_unit])
