"""The integer program of a genome: one level for each unit, the least sum of values, costs within limits; exact.

With x[u, l] = 1 where unit u is at level l, a unit has one level, and one that lies in a module has one as long as the module is
kept: the levels of both then add up to the same. So what lies in a dropped module costs nothing and counts for nothing.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np

from evopress.search.constraint import Prices, tables_of
from evopress.units import Budget, Genome, Space


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
    from scipy.optimize import Bounds, LinearConstraint, milp  # half a second, which naming a strategy need not wait for
    from scipy.sparse import csr_array

    counts = [len(of_unit) for of_unit in values]
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(int)
    size = sum(counts)
    inside = inside or (None,) * len(counts)
    kept = {  # the variables of which one is 1 as long as a module is there
        module: [starts[module] + level for level, gone in enumerate(drops[module]) if not gone]
        for module in sorted({module for module in inside if module is not None})
    }

    def above_least(of_units: Sequence[Sequence[float]]) -> tuple[list[float], float]:
        """Take each unit's least number off, which is paid anyhow or as its module is; return the rest, and what is paid anyhow."""
        least = [min(filter(math.isfinite, of_unit)) for of_unit in of_units]
        flat = [number - low for of_unit, low in zip(of_units, least, strict=True) for number in of_unit]
        total = sum(low for low, module in zip(least, inside, strict=True) if module is None)
        for low, module in zip(least, inside, strict=True):
            for variable in () if module is None else kept[module]:
                flat[variable] += low
        return flat, total

    # The solver stops at an absolute gap of 1e-6, which must be small against every difference that matters.
    objective = np.array(above_least(values)[0])
    allowed = np.isfinite(objective)
    if near is not None and most_changes is not None:
        allowed &= _worth_making(limits, values, near, most_changes, inside, drops)
    objective = np.where(allowed, objective, 0.0)
    objective = objective / (np.abs(objective).max() or 1.0) * 1e4
    rows, columns, entries = [np.repeat(np.arange(len(counts)), counts)], [np.arange(size)], [np.ones(size)]
    for unit, module in enumerate(inside):
        if module is not None:
            rows.append(np.full(len(kept[module]), unit))
            columns.append(np.array(kept[module], dtype=int))
            entries.append(np.full(len(kept[module]), -1.0))
    levels = csr_array((np.concatenate(entries), (np.concatenate(rows), np.concatenate(columns))), shape=(len(counts), size))
    one = np.array([float(module is None) for module in inside])
    constraints = [LinearConstraint(levels, one, one)]
    capacities, divisors = [], []
    for prices, total in limits:
        # In units of the greatest common divisor: small integers, exact in the solver.
        extra, least = above_least(prices)
        divisors.append(math.gcd(*map(int, extra)) or 1)
        capacities.append((total - int(least)) // divisors[-1])
        if capacities[-1] < 0:
            return None
        costs = np.array([price // divisors[-1] for price in extra], dtype=np.float64)
        constraints.append(LinearConstraint(costs[None, :], ub=capacities[-1]))
    if near is not None and most_changes is not None:
        same, number = np.zeros((1, size)), 0
        for unit, module in enumerate(inside):
            if module is not None and drops[module][near[module]]:
                continue  # whatever it becomes
            same[0, starts[unit] + near[unit]] += 1.0
            if module is None:
                number += 1
            else:
                same[0, kept[module]] -= 1.0
        constraints.append(LinearConstraint(same, lb=number - most_changes))
    while True:
        result = milp(
            objective,
            integrality=np.ones(size),
            bounds=Bounds(0, allowed.astype(np.float64)),
            constraints=constraints,
            options={"mip_rel_gap": 0.0},
        )
        if result.x is None:
            return None
        genome = [int(np.argmax(part)) for part in np.split(result.x, starts[1:])]
        there = [module is None or not drops[module][genome[module]] for module in inside]
        # Numbers of eight digits are not exact in the solver, which takes 0.999999 for 1.
        excess = [
            sum(of_unit[level] for of_unit, level, counts in zip(prices, genome, there, strict=True) if counts) - total
            for prices, total in limits
        ]
        if all(over <= 0 for over in excess):
            break
        for place, over in enumerate(excess):
            if over > 0:
                capacities[place] -= -(-over // divisors[place])
                constraints[1 + place] = LinearConstraint(constraints[1 + place].A, ub=capacities[place])
    return tuple(
        level if counts else (0 if near is None else near[unit])
        for unit, (level, counts) in enumerate(zip(genome, there, strict=True))
    )


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
