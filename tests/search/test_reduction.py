"""Levels ruled out by reduced costs: the best genome is among what is left, and of thousands of units that is little."""

import math
import time

import numpy as np
import pytest

from evopress.search import program
from evopress.search.constraint import tables_of
from evopress.search.program import best_genome, best_in
from evopress.search.reduction import Relaxation
from evopress.units import Budget


def both(monkeypatch: pytest.MonkeyPatch, call):
    """Return what a call finds without the reduction, and with it."""
    found = []
    for least in (10**9, 0):
        monkeypatch.setattr(program, "_MANY_UNITS", least)
        found.append(call())
    return found


@pytest.mark.parametrize("seed", range(12))
def test_the_best_of_weights_is_the_same(seed, monkeypatch) -> None:
    rng = np.random.default_rng(seed)
    sizes = rng.choice([1, 2, 3, 7], size=40)
    prices = [[int(size) * bits for bits in (8, 4, 3, 2)] for size in sizes]
    values = (rng.lognormal(sigma=2, size=(40, 1)) * 4.0 ** -np.array([8, 4, 3, 2]) * rng.uniform(0.8, 1.2, size=(40, 4))).tolist()
    values[3][1] = math.inf
    for total in (int(sizes.sum()) * 2, int(sizes.sum() * 2.5), int(sizes.sum()) * 5, int(sizes.sum()) * 9):
        plain, reduced = both(monkeypatch, lambda total=total: best_genome([(prices, total)], values))
        assert sum(of_unit[level] for of_unit, level in zip(prices, reduced, strict=True)) <= total
        value = [sum(of_unit[level] for of_unit, level in zip(values, genome, strict=True)) for genome in (plain, reduced)]
        assert value[1] == pytest.approx(value[0], rel=1e-9)
    assert both(monkeypatch, lambda: best_genome([(prices, int(sizes.sum()) * 2 - 1)], values)) == [None, None]


@pytest.mark.parametrize("seed", range(12))
def test_so_is_that_of_modules_with_weights_inside(joint_space, seed, monkeypatch) -> None:
    rng, space = np.random.default_rng(seed), joint_space
    values = [rng.lognormal(sigma=1.5, size=len(unit.levels)).cumsum().tolist() for unit in space.units]
    costs = sorted({space.cost(tuple(int(rng.integers(len(unit.levels))) for unit in space.units)) for _ in range(30)})
    for total in costs[::5]:
        plain, reduced = both(monkeypatch, lambda total=total: best_in(space, Budget(total, 1.0, ""), values))

        def value(genome):
            return sum(values[u][level] for u, level in enumerate(genome) if not space.is_gone(genome, u))

        assert (plain is None) == (reduced is None)
        if plain is not None:
            assert space.cost(reduced) <= total and value(reduced) == pytest.approx(value(plain), rel=1e-9)


def test_of_thousands_of_units_few_levels_are_left(quant_space, monkeypatch) -> None:
    rng, count = np.random.default_rng(0), 6000
    space = quant_space([1, 4] * (count // 2), bits=(6, 5, 4, 3, 2))
    values = rng.lognormal(size=(count, 1)) * 4.0 ** -np.arange(6, 1, -1) * rng.uniform(0.9, 1.1, size=(count, 5))
    seen: list[np.ndarray] = []
    plain = Relaxation.worth_choosing
    monkeypatch.setattr(Relaxation, "worth_choosing", lambda self: (seen.append(plain(self)), seen[-1])[1])
    budget = Budget(int(2.5 * space.size), 2.5, "")
    started = time.monotonic()
    genome = best_in(space, budget, values.tolist())
    assert genome is not None and budget.met_by(space, genome) and time.monotonic() - started < 60
    assert seen[0].sum() < 1.05 * count, "nearly every unit has one level left"
    best_in(space, budget, values.tolist(), near=genome, most_changes=20)
    tables = tables_of(space, budget)
    best_genome([*tables, tables[0]], values[:, ::-1].cumsum(axis=1)[:, ::-1].tolist(), near=genome, most_changes=1)
    assert len(seen) == 1, "few changes, and further limits, are solved as they are"
