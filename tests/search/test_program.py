"""The integer program against the list of all genomes."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
from guided_literal import best_of_all

from evopress.currencies import currency_of
from evopress.search.constraint import tables_of
from evopress.search.program import _worth_making, best_genome, best_in
from evopress.units import Budget, Limit


def total_of(table, genome):
    return sum(of_unit[level] for of_unit, level in zip(table, genome, strict=True))


@pytest.mark.parametrize("most_changes", [None, 0, 1, 2, 3])
@pytest.mark.parametrize("seed", range(6))
def test_it_is_the_best_of_all_genomes(quant_space, budget_of, seed, most_changes) -> None:
    rng = np.random.default_rng(seed)
    space = quant_space(rng.choice([1, 3, 8], size=5).tolist(), bits=(4, 3, 2))
    parent = tuple(rng.integers(0, 3, size=5).tolist())
    values = rng.lognormal(sigma=1.5, size=(5, 3)).cumsum(axis=1).tolist()
    for total in (0, 3):
        budget = Budget(space.cost(parent) + total, 1.0, "")
        found = best_in(space, budget, values, near=parent, most_changes=most_changes)
        assert found is not None
        assert space.cost(found) <= space.cost(parent) + total
        assert most_changes is None or sum(a != b for a, b in zip(found, parent, strict=True)) <= most_changes
        expected = best_of_all(space.prices, budget.total, values, parent, most_changes)
        assert total_of(values, found) == pytest.approx(expected, rel=1e-9)


def test_what_nothing_can_meet_is_none() -> None:
    assert best_genome([([[2, 1], [2, 1]], 1)], [[0.0, 1.0], [0.0, 1.0]]) is None
    assert best_genome([([[2, 1], [2, 1]], 2)], [[0.0, 1.0], [0.0, 1.0]]) == (1, 1)
    assert best_genome([([[2, 0], [2, 0]], 0)], [[0.0, 1.0], [0.0, 1.0]], near=(0, 0), most_changes=1) is None


def test_differences_of_values_far_below_their_size_count() -> None:
    values = [[1e6, 1e6 + 1e-3], [0.0, 2e-3], [0.0, 5e-4]]
    assert best_genome([([[1, 0], [1, 0], [1, 0]], 2)], values) == (0, 0, 1)


@pytest.mark.parametrize("seed", range(4))
def test_further_limits_bind_too(quant_space, seed) -> None:
    rng = np.random.default_rng(seed)
    space = quant_space((3, 1, 1, 3, 8), bits=(4, 3, 2), kinds=("q", "v", "v", "q", "down"))
    budget = Budget(int(3 * space.size), 3.0, "", (Limit(4, kind="v"),))
    limits = tables_of(space, budget)
    values = rng.lognormal(size=(5, 3)).cumsum(axis=1).tolist()
    found = best_genome(limits, values)
    assert found is not None and budget.met_by(space, found)
    genomes = [genome for genome in itertools.product(range(3), repeat=5) if budget.met_by(space, genome)]
    assert total_of(values, found) == pytest.approx(min(total_of(values, genome) for genome in genomes), rel=1e-9)
    assert found != best_genome(limits[:1], values), "the further limit mattered"


def test_of_moves_that_cost_the_same_as_many_of_the_best_are_looked_at_as_can_be_made(quant_space) -> None:
    rng, space = np.random.default_rng(0), quant_space([1] * 40 + [3] * 40, bits=(4, 3, 2))
    parent = tuple(rng.integers(0, 3, size=80).tolist())
    values = rng.lognormal(size=(80, 3)).cumsum(axis=1)
    tables = tables_of(space, Budget(space.cost(parent), 3.0, ""))
    worth = _worth_making(tables, values.tolist(), parent, 4, (None,) * 80, [(False,) * 3] * 80).reshape(80, 3)
    assert worth[np.arange(80), parent].all() and worth.sum() <= 80 + 4 * 8  # one or two levels up or down, of two sizes
    gains = [values[u, parent[u] - 1] - values[u, parent[u]] for u in range(40) if parent[u] == 1]
    ups = [(u, parent[u] - 1) for u in range(40) if parent[u] == 1]
    best = sorted(zip(gains, ups, strict=True))[:2]
    assert all(worth[u, level] for _, (u, level) in best) and not all(worth[u, level] for u, level in ups)


def test_a_level_of_infinite_value_is_not_chosen() -> None:
    prices = [[2, 1, 0], [2, 1, 0]]
    assert best_genome([(prices, 2)], [[0.0, 1.0, 1.5], [0.0, 5.0, 9.0]]) == (2, 0)
    assert best_genome([(prices, 2)], [[0.0, 1.0, math.inf], [0.0, 5.0, 9.0]]) == (1, 1)
    assert best_genome([(prices, 0)], [[0.0, 1.0, math.inf], [0.0, 5.0, 9.0]]) is None


@pytest.mark.parametrize("most_changes", [None, 1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_with_modules_it_is_the_best_of_all_genomes(joint_space, seed, most_changes) -> None:
    rng, space = np.random.default_rng(seed), joint_space
    values = [rng.lognormal(size=len(unit.levels)).cumsum().tolist() for unit in space.units]
    genomes = [
        genome
        for genome in itertools.product(*(range(len(unit.levels)) for unit in space.units))
        if not any(space.is_gone(genome, unit) and level for unit, level in enumerate(genome))
    ]
    parents = [genome for genome in genomes if rng.random() < 0.01]
    for parent in parents[:6]:
        budget = Budget(space.cost(parent) + 2, 1.0, "", (Limit(1, currency_of("modules"), kind="mlp"),) if seed % 2 else ())
        near = parent if most_changes else None
        found = best_in(space, budget, values, near=near, most_changes=most_changes)

        def value(genome):
            return sum(values[u][level] for u, level in enumerate(genome) if not space.is_gone(genome, u))

        def changes(genome, parent=parent):
            counted = [u for u in range(len(space)) if not space.is_gone(parent, u) and not space.is_gone(genome, u)]
            return sum(genome[u] != parent[u] for u in counted)

        allowed = [g for g in genomes if budget.met_by(space, g) and (not most_changes or changes(g) <= most_changes)]
        if not allowed:
            assert found is None
            continue
        assert found is not None and budget.met_by(space, found)
        assert most_changes is None or changes(found) <= most_changes
        assert value(found) == pytest.approx(min(map(value, allowed)), rel=1e-9)
        if near is not None:
            assert all(found[u] == near[u] for u in range(len(space)) if space.is_gone(found, u))


@pytest.mark.parametrize("seed", [0, 4, 9, 20])
def test_prices_without_a_common_divisor_keep_the_limit(seed) -> None:
    """The solver's 0.999999 of a price of eight digits is more than one."""
    rng = random.Random(seed)
    prices, values = [], []
    for _ in range(60):
        size, scale = rng.choice([110592, 331776, 884736, 4096 * 4096]), 0.0
        prices.append([int(size * bits) + rng.choice([0, 1, 3, 17]) for bits in (6.25, 5.25, 4.25, 3.25, 2.25)])
        scale = 10 ** rng.uniform(-3, 1)
        values.append([scale * 4.0**-bits * rng.uniform(0.8, 1.2) for bits in (6, 5, 4, 3, 2)])
    near = tuple(rng.randrange(5) for _ in range(60))
    total = total_of(prices, near)
    found = best_genome([(prices, total)], values, near=near, most_changes=2)
    assert found is not None and total_of(prices, found) <= total
    assert total_of(values, found) < total_of(values, near)
