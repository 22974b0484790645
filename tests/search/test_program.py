"""The integer program against the list of all genomes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from guided_literal import best_of_all

from evopress.search.program import best_genome, limits_around
from evopress.units import Budget, Limit


def total_of(table, genome):
    return sum(of_unit[level] for of_unit, level in zip(table, genome, strict=True))


@pytest.mark.parametrize("most_changes", [None, 0, 1, 2, 3])
@pytest.mark.parametrize("seed", range(6))
def test_it_is_the_best_of_all_genomes(quant_space, budget_of, seed, most_changes) -> None:
    rng = np.random.default_rng(seed)
    space = quant_space(rng.choice([1, 3, 8], size=5).tolist(), bits=(4, 3, 2))
    parent = tuple(rng.integers(0, 3, size=5).tolist())
    ((prices, none_left),) = limits_around(space, Budget(space.cost(parent), 1.0, ""), parent, range(5))
    assert none_left == 0
    values = rng.lognormal(sigma=1.5, size=(5, 3)).cumsum(axis=1).tolist()
    for total in (0, 3):
        found = best_genome([(prices, total)], values, near=parent, most_changes=most_changes)
        assert found is not None
        assert space.cost(found) <= space.cost(parent) + total
        assert most_changes is None or sum(a != b for a, b in zip(found, parent, strict=True)) <= most_changes
        expected = best_of_all(prices, total, values, parent, most_changes)
        assert total_of(values, found) == pytest.approx(expected, rel=1e-9)


def test_a_genome_s_own_levels_are_free_and_the_others_cost_what_the_space_counts(quant_space) -> None:
    space = quant_space((8, 3, 1))
    genome = (0, 2, 4)
    ((prices, left),) = limits_around(space, Budget(space.cost(genome) + 5, 1.0, ""), genome, range(3))
    assert left == 5
    assert [prices[unit][level] for unit, level in enumerate(genome)] == [0, 0, 0]
    assert space.cost((3, 1, 0)) - space.cost(genome) == prices[0][3] + prices[1][1] + prices[2][0]


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
    parent = (2, 2, 2, 2, 2)
    budget = Budget(int(3 * space.size), 3.0, "", (Limit(4, kind="v"),))
    limits = limits_around(space, budget, parent, range(5))
    values = rng.lognormal(size=(5, 3)).cumsum(axis=1).tolist()
    found = best_genome(limits, values)
    assert found is not None and budget.met_by(space, found)
    genomes = [genome for genome in itertools.product(range(3), repeat=5) if budget.met_by(space, genome)]
    assert total_of(values, found) == pytest.approx(min(total_of(values, genome) for genome in genomes), rel=1e-9)
    assert found != best_genome(limits[:1], values), "the further limit mattered"


def test_only_the_units_that_are_given_move(quant_space) -> None:
    space = quant_space((3, 3, 3), bits=(4, 3, 2))
    ((prices, left),) = limits_around(space, Budget(27, 3.0, ""), (1, 1, 1), [0, 2])
    assert len(prices) == 2
    assert best_genome([(prices, left)], [[0.0, 5.0, 6.0], [0.0, 1.0, 1.5]]) == (0, 2)
