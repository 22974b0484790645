"""Levels that cannot be in the best genome, by Lagrangian relaxation of the budget: what is left of thousands of units is a few.

With a price λ on what each limit counts, every unit has its least value on its own, which bounds the program from below; a genome
within the limits bounds it from above. A level that adds more than the gap between the two to the lower bound is in no best genome
(Geoffrion 1974: variable fixing by reduced costs). Exact; where units of a few sizes fill no budget exactly, that leaves most of
them, whose proof no solver ends. Then only those that add least are chosen from, the core (Balas and Zemel 1980), and the lower
bound says how far from the best the outcome can be.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

_CUTS, _BISECTIONS, _FILLINGS = 200, 60, 1000
_ROUNDING = 1e-9
"""Of sums, relative."""
_CORE = 300
"""Levels, beside one for each unit, that the solver still ends with in seconds; with 1,200 it took minutes."""
_MOST = 1e10
"""Of a price; the dearest move of a program costs less."""


@dataclass(frozen=True)
class Reduced:
    """What is left of a program."""

    allowed: np.ndarray
    """Of each variable."""
    lower: float
    """No solution's value is less."""
    within: np.ndarray | None
    """The variable of every unit of a solution that may not be the best; None: none was found."""


@dataclass(frozen=True)
class Relaxation:
    """One level for each unit, the least sum of values, costs within capacities; units of modules count where that is kept.

    Arrays have a number for each variable, which are the units' levels in a row.
    """

    values: np.ndarray
    """What lies in a module has its least taken off and counted with the module's levels that keep it; so have the costs."""
    costs: np.ndarray
    """[limits, variables], whole numbers."""
    allowed: np.ndarray
    unit: np.ndarray
    """Of each variable."""
    module: np.ndarray
    """Of each unit the one that it lies in, which lies in none itself; -1: none."""
    keeps: np.ndarray
    """Whether a variable is of a module and keeps it."""
    capacities: np.ndarray
    """What the costs of a solution may add up to, [limits], whole numbers."""

    def reduced(self) -> Reduced:
        """Rule levels out; all that are allowed are left where nothing within the capacities is found."""
        prices = self._best_prices()
        added, first, lower = self._at(prices)
        within = self._within(prices)
        if within is None:
            return Reduced(self.allowed, lower, None)
        chosen = self._filled(within)
        gap = self.value(chosen) - lower
        left = self.allowed & (added <= gap + _ROUNDING * (abs(lower) + np.abs(self.values[self.allowed]).max(initial=1.0)))
        most = len(self.module) + _CORE
        if left.sum() <= most:
            return Reduced(left, lower, chosen)
        core = np.zeros_like(left)
        core[np.argsort(np.where(left, added, np.inf), kind="stable")[:most]] = True
        core[chosen] = core[first] = True
        return Reduced(core & self.allowed, lower, chosen)

    @cached_property
    def _is_module(self) -> np.ndarray:
        """Of each unit, whether others lie in it."""
        return np.isin(np.arange(len(self.module)), self.module)

    @cached_property
    def _scale(self) -> np.ndarray:
        return np.maximum(self.capacities, 1.0)

    def _at(self, prices: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
        """Relax the capacities: return what every variable adds, the least variable of every unit, and the lower bound.

        Args: prices: of each whole capacity, [limits].

        Units of dropped modules have a variable too, which counts for nothing.
        """
        count = len(self.module)
        weighed = np.where(self.allowed, self.values + (prices / self._scale) @ self.costs, np.inf)
        inside = self.module >= 0
        least = np.full(count, np.inf)
        np.minimum.at(least, self.unit, weighed)
        of_members = np.zeros(count)
        np.add.at(of_members, self.module[inside], least[inside])
        weighed = weighed + np.where(self.keeps, of_members[self.unit], 0.0)
        least = np.full(count, np.inf)
        np.minimum.at(least, self.unit, weighed)
        added = weighed - least[self.unit]
        first = np.full(count, len(weighed))
        best = added == 0
        np.minimum.at(first, self.unit[best], np.flatnonzero(best))
        keeping = np.full(count, np.inf)  # what keeping a module adds
        np.minimum.at(keeping, self.unit[self.keeps], added[self.keeps])
        lies = inside[self.unit]
        added[lies] += keeping[self.module[self.unit[lies]]]
        return added, first, float(least[~inside].sum() - prices @ (self.capacities / self._scale))

    def _there(self, chosen: np.ndarray) -> np.ndarray:
        """Tell of every unit whether its level counts."""
        kept = np.ones(len(self.module) + 1, dtype=bool)  # the last is of no module
        kept[:-1] = self.keeps[chosen] | ~self._is_module
        return kept[self.module]

    def value(self, chosen: np.ndarray) -> float:
        """Add up what counts of a solution, the variable of every unit."""
        return float(self.values[chosen[self._there(chosen)]].sum())

    def _left(self, chosen: np.ndarray) -> np.ndarray:
        """Return what is left of every capacity."""
        return self.capacities - self.costs[:, chosen[self._there(chosen)]].sum(axis=1)

    def _best_prices(self) -> np.ndarray:
        """Return the prices with the greatest lower bound: cutting planes (Kelley 1960), each a bound's value and slope."""
        from scipy.optimize import linprog

        count = len(self.costs)
        prices, best, greatest = np.zeros(count), np.zeros(count), -np.inf
        slopes, offsets, bounds = [], [], [(0.0, _MOST)] * count + [(None, None)]
        for _ in range(_CUTS):
            _, first, lower = self._at(prices)
            if lower > greatest:
                greatest, best = lower, prices
            slope = -self._left(first) / self._scale
            slopes.append([*-slope, 1.0])
            offsets.append(lower - slope @ prices)
            found = linprog([*np.zeros(count), -1.0], A_ub=slopes, b_ub=offsets, bounds=bounds)
            if found.x is None or found.x[-1] - greatest <= 1e-12 * abs(greatest):
                break
            prices = found.x[:-1]
        return best

    def _within(self, prices: np.ndarray) -> np.ndarray | None:
        """Return the least variable of every unit at the lowest multiple of prices where that is within all capacities."""
        if (found := self._fitting(prices)) is not None:
            return found
        for direction in (prices, np.full_like(prices, max(float(prices.max()), 1e-6))):
            low, high = 0.0, 1e-9
            while (found := self._fitting(prices + high * direction)) is None and high < 1e9:
                low, high = high, 4.0 * high
            if found is None:
                continue
            for _ in range(_BISECTIONS):
                middle = (low + high) / 2
                if (nearer := self._fitting(prices + middle * direction)) is None:
                    low = middle
                else:
                    found, high = nearer, middle
            return found
        return None

    def _fitting(self, prices: np.ndarray) -> np.ndarray | None:
        """Return the least variable of every unit at prices, if that is within all capacities."""
        first = self._at(prices)[1]
        return first if (self._left(first) >= 0).all() else None

    def _filled(self, chosen: np.ndarray) -> np.ndarray:
        """Spend what is left, the level that takes most off the value first."""
        chosen, left = chosen.copy(), self._left(chosen)
        movable = self.allowed & (self._there(chosen) & ~self._is_module)[self.unit]
        for _ in range(_FILLINGS):
            costs = self.costs - self.costs[:, chosen][:, self.unit]
            fits = movable & (costs <= left[:, None]).all(axis=0)
            gains = np.where(fits, self.values[chosen][self.unit] - self.values, 0.0)
            best = int(np.argmax(gains))
            if gains[best] <= 0:
                break
            left = left - costs[:, best]
            chosen[self.unit[best]] = best
        return chosen
