"""Levels ruled out by reduced costs: the best genome is among what is left, and of thousands of units that is little."""

import math
import time

import numpy as np
import pytest

from evopress.search import program
from evopress.search.constraint import tables_of
from evopress.search.program import best_genome, best_in
from evopress.search.reduction import Reduced, Relaxation
from evopress.units import Budget


def both(monkeypatch: pytest.MonkeyPatch, call):
    """Return what a call finds without the reduction, and with it."""
    found = []
    monkeypatch.setattr(program, "_END", {"mip_rel_gap": 0.0})
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


@pytest.mark.parametrize("seed", range(6))
def test_so_is_that_within_two_limits(seed, monkeypatch) -> None:
    rng = np.random.default_rng(seed)
    sizes, reads = rng.choice([1, 2, 3, 7], size=40), rng.choice([1, 5, 20], size=40)
    prices, read = ([[int(size) * bits for bits in (8, 4, 3, 2)] for size in of] for of in (sizes, sizes * reads))
    values = (rng.lognormal(sigma=2, size=(40, 1)) * 4.0 ** -np.array([8, 4, 3, 2]) * rng.uniform(0.8, 1.2, size=(40, 4))).tolist()
    for bits, bits_read in ((3, 2.5), (3, 3), (2.5, 5), (5, 2)):
        limits = [(prices, int(sizes.sum() * bits)), (read, int((sizes * reads).sum() * bits_read))]
        plain, reduced = both(monkeypatch, lambda limits=limits: best_genome(limits, values))
        assert all(spent(of, reduced) <= total for of, total in limits)
        assert spent(values, reduced) == pytest.approx(spent(values, plain), rel=1e-9)
    assert both(monkeypatch, lambda: best_genome([limits[0], (read, 2 * int((sizes * reads).sum()) - 1)], values)) == [None, None]


def spent(table, genome):
    return sum(of_unit[level] for of_unit, level in zip(table, genome, strict=True))


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Relaxation, Reduced]]:
    """Return what is reduced, and to what."""
    found: list[tuple[Relaxation, Reduced]] = []
    plain = Relaxation.reduced
    monkeypatch.setattr(Relaxation, "reduced", lambda self: (found.append((self, plain(self))), found[-1][1])[1])
    return found


def test_of_thousands_of_units_few_levels_are_left(quant_space, seen) -> None:
    rng, count = np.random.default_rng(0), 6000
    space = quant_space([1, 4] * (count // 2), bits=(6, 5, 4, 3, 2))
    values = rng.lognormal(size=(count, 1)) * 4.0 ** -np.arange(6, 1, -1) * rng.uniform(0.9, 1.1, size=(count, 5))
    budget = Budget(int(2.5 * space.size), 2.5, "")
    started = time.monotonic()
    genome = best_in(space, budget, values.tolist())
    assert genome is not None and budget.met_by(space, genome) and time.monotonic() - started < 60
    assert seen[0][1].allowed.sum() < 1.05 * count, "nearly every unit has one level left"
    best_in(space, budget, values.tolist(), near=genome, most_changes=20)
    assert len(seen) == 1, "few changes are solved as they are"
    again = best_genome(tables_of(space, budget) * 2, values.tolist())
    assert len(seen) == 2 and spent(values, again) == pytest.approx(spent(values, genome), rel=1e-5), "a limit twice is one"


@pytest.mark.parametrize("most_read", [None, 2.6])
def test_experts_that_fill_no_budget_exactly_take_seconds(seen, most_read, monkeypatch) -> None:
    """Of units of few sizes nearly all may be in the best genome, as far as the bounds tell: the solver alone took minutes."""
    rng, bits = np.random.default_rng(0), np.array([6, 5, 4, 3, 2])
    sizes = np.array(([64, 16, 16, 64] + [6] * 3 * 128) * 4)
    reads = np.array(([16] * 4 + [1] * 3 * 128) * 4)  # of 16
    values = rng.lognormal(size=(len(sizes), 1)) * sizes[:, None] * 4.0**-bits * rng.uniform(0.9, 1.1, size=(len(sizes), 5))
    limits = [((sizes[:, None] * bits).tolist(), int(2.77 * sizes.sum()))]
    if most_read:
        limits.append(((sizes[:, None] * reads[:, None] * bits).tolist(), int(most_read * (sizes * reads).sum())))
    started = time.monotonic()
    genome = best_genome(limits, values.tolist())
    assert genome is not None and all(spent(of, genome) <= total for of, total in limits) and time.monotonic() - started < 60
    asked, left = seen[0]
    assert left.within is not None and len(sizes) < left.allowed.sum() < len(sizes) + 400 < asked.allowed.sum()
    value = asked.values[np.arange(len(sizes)) * 5 + np.array(genome)].sum()
    assert left.lower <= value * (1 + 1e-9) and value <= asked.values[left.within].sum() and value < 1.001 * left.lower
    monkeypatch.setattr(program, "_solved", lambda *_, **__: None)
    fallback = best_genome(limits, values.tolist())
    assert fallback == tuple(left.within % 5), "where the solver finds none in time, that of the relaxation"
