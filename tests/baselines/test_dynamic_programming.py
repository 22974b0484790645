import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evopress.baselines import dynamic_programming
from evopress.currencies import currency_of
from evopress.errors import EvoPressError
from evopress.units import Budget, Level, Limit, Space, Unit


def space_of(sizes, bits=(6, 5, 4, 3, 2)) -> Space:
    levels = [tuple(Level(f"{b} bits", b * n, str(b), b * n) for b in bits) for n in sizes]
    return Space("quant", tuple(Unit(f"u{i}", i, "q", n, levels[i]) for i, n in enumerate(sizes)))


def brute_force(space: Space, total: int, errors) -> float:
    """Return the least sum of errors within the budget, by trying every genome."""
    genomes = itertools.product(*(range(len(unit.levels)) for unit in space.units))
    return min(error_sum(genome, errors) for genome in genomes if space.cost(genome) <= total)


def error_sum(genome, errors) -> float:
    return math.fsum(values[level] for values, level in zip(errors, genome, strict=True))


@pytest.mark.parametrize("bits", [2.0, 2.25, 2.5, 3.0, 4.7, 6.0])
@pytest.mark.parametrize("seed", range(3))
def test_five_units_equal_brute_force(bits, seed):
    space = space_of((884736, 884736, 331776, 110592, 110592))
    budget = Budget(int(bits * space.size), bits, "bits per weight")
    scales = np.random.default_rng(seed).lognormal(sigma=2, size=5)
    errors = [[float(scale) * 4.0**-b for b in (6, 5, 4, 3, 2)] for scale in scales]
    genome = dynamic_programming(space, budget, errors)
    assert space.cost(space.check(genome)) <= budget.total
    assert error_sum(genome, errors) == pytest.approx(brute_force(space, budget.total, errors), rel=1e-9)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_small_knapsack_equals_brute_force(data):
    """Unrelated costs up to 10^7, different numbers of levels, errors in no order."""
    units, errors = [], []
    for i in range(data.draw(st.integers(1, 5))):
        costs = sorted(data.draw(st.sets(st.integers(0, 10**7), min_size=1, max_size=4)), reverse=True)
        units.append(Unit(f"u{i}", i, "w", 5, tuple(Level(str(c), c, str(c), c) for c in costs)))
        errors.append([data.draw(st.integers(0, 1000)) / 1000 for _ in costs])
    space = Space("toy", tuple(units))
    budget = Budget(data.draw(st.integers(space.least_cost, space.greatest_cost)), 0.5, "share")
    genome = dynamic_programming(space, budget, errors)
    assert space.cost(space.check(genome)) <= budget.total
    assert error_sum(genome, errors) == pytest.approx(brute_force(space, budget.total, errors), rel=1e-9, abs=1e-12)


def test_small_errors_are_told_apart():
    space = space_of((1, 1, 1, 1), bits=(3, 2))
    errors = [[0.0, 1e-9], [0.0, 2e-9], [0.0, 4e-9], [0.0, 3e-9]]
    assert dynamic_programming(space, Budget(10, 2.5, "bits per weight"), errors) == (1, 1, 0, 0)


def test_hundreds_of_units_are_solved_within_the_budget():
    space = space_of((8, 3, 3, 1, 1) * 40)
    budget = Budget(int(2.5 * space.size), 2.5, "bits per weight")
    scales = np.random.default_rng(0).lognormal(size=200)
    errors = [[float(scale) * 4.0**-b for b in (6, 5, 4, 3, 2)] for scale in scales]
    genome = dynamic_programming(space, budget, errors)
    assert space.cost(genome) <= budget.total
    # No single switch between equal sizes, and nothing that still fits, makes it better: the optimum is a local one too.
    total = error_sum(genome, errors)
    for i, j in itertools.permutations(range(200), 2):
        if space.units[i].size == space.units[j].size and genome[i] < 4 and genome[j] > 0:
            gain = errors[i][genome[i]] - errors[i][genome[i] + 1] + errors[j][genome[j]] - errors[j][genome[j] - 1]
            assert gain <= 1e-9 * total


def test_impossible_problems_are_refused():
    space = space_of((8, 8, 1), bits=(4, 3))
    errors = [[0.0, 1.0]] * 3
    with pytest.raises(EvoPressError, match="below what"):
        dynamic_programming(space, Budget(50, 2.9, "bits per weight"), errors)
    with pytest.raises(EvoPressError, match="errors of 2 units but 3 units"):
        dynamic_programming(space, Budget(60, 3.5, "bits per weight"), errors[:2])
    with pytest.raises(EvoPressError, match="errors of u1"):
        dynamic_programming(space, Budget(60, 3.5, "bits per weight"), [[0.0, 1.0], [0.0, math.nan], [0.0, 1.0]])


@pytest.mark.parametrize("seed", range(4))
def test_further_limits_are_kept(seed):
    space = space_of((8, 3, 3, 1, 1), bits=(4, 3, 2))
    rng = np.random.default_rng(seed)
    errors = rng.lognormal(size=(5, 3)).cumsum(axis=1).tolist()
    stored = currency_of("bytes")
    levels = [tuple(replace(level, stored_bits=level.cost + unit.size**2) for level in unit.levels) for unit in space.units]
    space = replace(space, units=tuple(replace(unit, levels=own) for unit, own in zip(space.units, levels, strict=True)))
    least, most = (space.cost_in(stored, (level,) * 5) for level in (2, 0))
    budget = Budget(space.cost((1,) * 5), 3.0, "bits per weight", (Limit((least * 2 + most) // 3, stored),))
    genome = dynamic_programming(space, budget, errors)
    kept = [each for each in itertools.product(range(3), repeat=5) if budget.met_by(space, each)]
    assert genome in kept and error_sum(genome, errors) == pytest.approx(min(error_sum(each, errors) for each in kept), rel=1e-9)
    free = dynamic_programming(space, replace(budget, limits=()), errors)
    assert error_sum(free, errors) <= error_sum(genome, errors)
    with pytest.raises(EvoPressError, match=r"limits has \d+ bytes, but at their most compressed levels"):
        dynamic_programming(space, replace(budget, limits=(Limit(least - 1, stored),)), errors)


def test_where_a_limit_asks_for_modules_to_be_dropped_there_is_none():
    keep = (Level("keep", 0, "keep", 0), Level("drop", 0, "drop", 0))
    levels = (Level("4 bits", 4, "4", 4), Level("2 bits", 2, "2", 2))
    units = (Unit("a", 0, "attention", 0, keep), Unit("a.q", 0, "q", 1, levels), Unit("b", 1, "attention", 0, keep))
    space = Space("joint", units, None, (None, 0, None))
    errors = [[0.0, 0.0], [0.1, 0.2], [0.0, 0.0]]
    budget = Budget(4, 4.0, "bits per weight", (Limit(1, currency_of("modules")),))
    with pytest.raises(EvoPressError, match="no genome that keeps all modules is within 4 bits per weight and 1 modules"):
        dynamic_programming(space, budget, errors)
    assert dynamic_programming(space, replace(budget, limits=()), errors) == (0, 0, 0)
