from collections import Counter

import numpy as np
import pytest

from evopress.errors import EvoPressError
from evopress.search.constraint import EXCHANGES
from evopress.search.initial import random_mix
from evopress.search.mutation import DISTRIBUTIONS, LevelSwitch, offspring
from evopress.units import Budget

SIZES = (8, 3, 3, 1, 1, 8, 3, 3, 1, 1, 8, 8)


@pytest.mark.parametrize("distribution", sorted(DISTRIBUTIONS))
@pytest.mark.parametrize("exchange", sorted(EXCHANGES))
@pytest.mark.parametrize("bits", [2.5, 3.0, 4.3])
def test_offspring_differ_keep_the_budget_and_use_existing_levels(quant_space, budget_of, exchange, distribution, bits):
    space = quant_space(SIZES)
    budget = budget_of(space, bits)
    mutation = LevelSwitch(space, budget, exchange=exchange, distribution=distribution)
    for seed in range(15):
        rng = np.random.default_rng(seed)
        parent = random_mix(space, budget, rng)
        for _ in range(8):
            child = mutation(parent, rng)
            assert child != parent
            assert space.check(child) == child
            assert space.cost(child) <= budget.total
            if exchange not in ("none", "fit"):  # these may leave something over, or spend what was left
                assert space.cost(child) == space.cost(parent)
            parent = child


def test_number_of_switches_is_the_minimum_of_two_uniforms():
    rng = np.random.default_rng(0)
    counts = Counter(DISTRIBUTIONS["min_uniform"](3, rng) for _ in range(18_000))
    assert set(counts) == {1, 2, 3}
    for switches, share in ((1, 5 / 9), (2, 3 / 9), (3, 1 / 9)):
        assert counts[switches] / 18_000 == pytest.approx(share, abs=0.015)


def test_constant_is_always_the_maximum():
    rng = np.random.default_rng(0)
    assert {DISTRIBUTIONS["constant"](7, rng) for _ in range(50)} == {7}


@pytest.mark.parametrize(("max_switches", "most_changed"), [(1, 2), (3, 6)])
def test_a_switch_changes_two_units(quant_space, budget_of, max_switches, most_changed):
    space = quant_space((1,) * 200)
    mutation = LevelSwitch(space, budget_of(space, 4), max_switches=max_switches, distribution="constant")
    rng = np.random.default_rng(1)
    changed = [sum(level != 2 for level in mutation((2,) * 200, rng)) for _ in range(100)]
    assert max(changed) == most_changed
    assert Counter(changed).most_common(1)[0][0] == most_changed


def test_equal_generators_make_equal_offspring(quant_space, budget_of):
    space = quant_space(SIZES)
    mutation = LevelSwitch(space, budget_of(space, 4), exchange="any")
    parent = (2,) * len(SIZES)
    first, second, other = (offspring(mutation, parent, 10, np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert first == second != other


@pytest.mark.parametrize("exchange", sorted(EXCHANGES))
def test_a_set_of_offspring_is_distinct(quant_space, budget_of, exchange):
    space = quant_space(SIZES)
    parent = (2,) * len(SIZES)
    children = offspring(LevelSwitch(space, budget_of(space, 4), exchange=exchange), parent, 32, np.random.default_rng(0))
    assert len({*children, parent}) == 33


def test_a_small_space_gives_all_the_offspring_it_has(quant_space, budget_of):
    space = quant_space((1, 1, 1))
    children = offspring(LevelSwitch(space, budget_of(space, 4), max_switches=1), (2, 2, 2), 50, np.random.default_rng(0))
    assert len(set(children)) == len(children) == 6  # three givers times two takers


@pytest.mark.parametrize("exchange", sorted(EXCHANGES))
@pytest.mark.parametrize("bits", [2, 6])
def test_a_space_without_a_legal_switch_is_refused(quant_space, budget_of, exchange, bits):
    space = quant_space((4, 4, 2))
    budget = budget_of(space, bits)
    parent = space.uniform(f"{bits} bits")
    with pytest.raises(EvoPressError, match=f'exchange "{exchange}".*budget {budget.total}'):
        offspring(LevelSwitch(space, budget, exchange=exchange), parent, 4, np.random.default_rng(0))


def test_switches_that_always_undo_each_other_are_refused(quant_space, budget_of):
    space = quant_space((1, 1), bits=(3, 2))
    mutation = LevelSwitch(space, budget_of(space, 2.5), max_switches=2, distribution="constant")
    with pytest.raises(EvoPressError, match="found no other genome"):
        mutation((0, 1), np.random.default_rng(0))


def test_settings_out_of_range_are_refused(quant_space):
    space, budget = quant_space((1, 1)), Budget(8, 4, "bits per weight")
    with pytest.raises(EvoPressError, match='distribution "poisson" is unknown'):
        LevelSwitch(space, budget, distribution="poisson")
    with pytest.raises(EvoPressError, match="max_switches is 0"):
        LevelSwitch(space, budget, max_switches=0)


def test_offspring_stop_at_a_mutation_that_changes_nothing():
    with pytest.raises(EvoPressError, match="in 140 attempts"):
        offspring(lambda parent, rng: parent, (0, 1), 4, np.random.default_rng(0))
