"""Levels that cannot be in the best genome, by Lagrangian relaxation of the budget: what is left of thousands of units is a few.

With a price λ on what is spent, every unit has its least value on its own, which bounds the program from below; a genome within the
budget bounds it from above. A level that adds more than the gap between the two to the lower bound is in no best genome
(Geoffrion 1974: variable fixing by reduced costs). Exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

_BISECTIONS, _FILLINGS = 100, 1000
_ROUNDING = 1e-9
"""Of sums, relative."""


@dataclass(frozen=True)
class Relaxation:
    """One level for each unit, the least sum of values, costs within a capacity; units of modules count where that is kept.

    Arrays have a number for each variable, which are the units' levels in a row.
    """

    values: np.ndarray
    """What lies in a module has its least taken off and counted with the module's levels that keep it; so have the costs."""
    costs: np.ndarray
    allowed: np.ndarray
    unit: np.ndarray
    """Of each variable."""
    module: np.ndarray
    """Of each unit the one that it lies in, which lies in none itself; -1: none."""
    keeps: np.ndarray
    """Whether a variable is of a module and keeps it."""
    capacity: float

    def worth_choosing(self) -> np.ndarray:
        """Tell of every variable whether it may be in a best solution; all that are allowed where nothing within is found."""
        prices = self._least_prices()
        if prices is None:
            return self.allowed
        at = [self._at(price) for price in prices]
        added, _, lower = max(at, key=lambda each: each[2])
        gap = self._value(self._filled(at[-1][1])) - lower
        return self.allowed & (added <= gap + _ROUNDING * (abs(lower) + np.abs(self.values[self.allowed]).max(initial=1.0)))

    @cached_property
    def _is_module(self) -> np.ndarray:
        """Of each unit, whether others lie in it."""
        return np.isin(np.arange(len(self.module)), self.module)

    def _at(self, price: float) -> tuple[np.ndarray, np.ndarray, float]:
        """Relax the budget at a price: return what every variable adds, the least variable of every unit, and the lower bound.

        Units of dropped modules have a variable too, which counts for nothing.
        """
        count = len(self.module)
        weighed = np.where(self.allowed, self.values + price * self.costs, np.inf)
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
        return added, first, float(least[~inside].sum()) - price * self.capacity

    def _exceeds(self, price: float) -> bool:
        """Tell whether the least genome at a price is beyond the capacity."""
        return self._cost(self._at(price)[1]) > self.capacity

    def _there(self, chosen: np.ndarray) -> np.ndarray:
        """Tell of every unit whether its level counts."""
        kept = np.ones(len(self.module) + 1, dtype=bool)  # the last is of no module
        kept[:-1] = self.keeps[chosen] | ~self._is_module
        return kept[self.module]

    def _value(self, chosen: np.ndarray) -> float:
        return float(self.values[chosen[self._there(chosen)]].sum())

    def _cost(self, chosen: np.ndarray) -> float:
        return float(self.costs[chosen[self._there(chosen)]].sum())

    def _least_prices(self) -> tuple[float, ...] | None:
        """Return prices next to each other, of which the last one's genome is within the capacity; None if none was found."""
        if not self._exceeds(0.0):
            return (0.0,)
        low, high = 0.0, 1e-6
        while self._exceeds(high):
            low, high = high, 4.0 * high
            if high > 1e18:
                return None
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            if not low < middle < high:
                break
            if self._exceeds(middle):
                low = middle
            else:
                high = middle
        return low, high

    def _filled(self, chosen: np.ndarray) -> np.ndarray:
        """Spend what is left, the level that takes most off the value first."""
        chosen, left = chosen.copy(), self.capacity - self._cost(chosen)
        movable = self.allowed & (self._there(chosen) & ~self._is_module)[self.unit]
        for _ in range(_FILLINGS):
            costs = self.costs - self.costs[chosen][self.unit]
            gains = np.where(movable & (costs <= left), self.values[chosen][self.unit] - self.values, 0.0)
            best = int(np.argmax(gains))
            if gains[best] <= 0:
                break
            left -= costs[best]
            chosen[self.unit[best]] = best
        return chosen
