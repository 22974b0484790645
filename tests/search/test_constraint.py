from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evopress.errors import EvoPressError
from evopress.search.constraint import EXCHANGES, Deviation, make_exchange
from evopress.search.evolution import Evolution, SearchSettings
from evopress.search.strategy import run_search
from evopress.units import Budget, Level, Space, Unit

SIZES = (8, 8, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1)


@settings(max_examples=60, deadline=None)
@given(
    exchange=st.sampled_from(["size", "name", "any"]),
    genome=st.tuples(*[st.integers(0, 4) for _ in SIZES]),
    num_switches=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
)
def test_balanced_exchanges_keep_the_cost_and_the_levels(quant_space, exchange, genome, num_switches, seed):
    space = quant_space(SIZES)
    levels = list(genome)
    rule = make_exchange(exchange, space, Budget(space.cost(genome), 0.0, "bits per weight"))
    if rule(levels, num_switches, np.random.default_rng(seed)):
        assert space.cost(space.check(levels)) == space.cost(genome)


@pytest.mark.parametrize(("exchange", "key"), [("size", "size"), ("name", "kind")])
def test_a_switch_is_one_down_and_another_up_inside_one_group(quant_space, exchange, key):
    space = quant_space((4, 4, 4, 4, 2, 2), kinds=("q", "k", "q", "k", "v", "v"))
    rule = make_exchange(exchange, space, Budget(space.size * 4, 4, "bits per weight"))
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(300):
        levels = [2] * 6
        assert rule(levels, 1, rng)
        (giver,) = (i for i, level in enumerate(levels) if level == 3)
        (taker,) = (i for i, level in enumerate(levels) if level == 1)
        assert getattr(space.units[giver], key) == getattr(space.units[taker], key)
        seen.add((giver, taker))
    groups = Counter(getattr(unit, key) for unit in space.units)
    assert len(seen) == sum(n * (n - 1) for n in groups.values())  # every legal switch turns up


def test_groups_are_drawn_by_their_number_of_units(quant_space):
    space = quant_space((4,) * 9 + (2,) * 3)
    rule = make_exchange("size", space, Budget(space.size * 4, 4, "bits per weight"))
    rng = np.random.default_rng(1)
    small = 0
    for _ in range(4000):
        levels = [2] * 12
        rule(levels, 1, rng)
        small += levels[9:] != [2, 2, 2]
    assert small / 4000 == pytest.approx(3 / 12, abs=0.03)


def test_units_of_one_kind_and_different_steps_do_not_switch(quant_space):
    space = quant_space((4, 4, 2, 2), kinds=("q",) * 4)
    rule = make_exchange("name", space, Budget(space.size * 4, 4, "bits per weight"))
    rng = np.random.default_rng(2)
    for _ in range(100):
        levels = [2] * 4
        rule(levels, 1, rng)
        assert sorted(levels[:2]) == [1, 3] or sorted(levels[2:]) == [1, 3]


def test_unequal_steps_inside_a_unit_are_respected(quant_space):
    space = quant_space((4, 4), bits=(8, 4, 3))  # 8 -> 4 frees 16, 4 -> 3 frees 4
    rule = make_exchange("size", space, Budget(0, 0, "bits per weight"))
    rng = np.random.default_rng(3)
    for before in ([0, 1], [1, 2]):
        levels = list(before)
        assert rule(levels, 1, rng)
        assert levels == before[::-1]
    assert not rule([1, 1], 1, rng)  # one would free 4, the other take 16
    assert not rule([0, 2], 1, rng)  # one would free 16, the other take 4


def test_a_rare_legal_switch_is_found(quant_space):
    space = quant_space((1,) * 200 + (2, 2), bits=(3, 2))
    rule = make_exchange("size", space, Budget(0, 0, "bits per weight"))
    levels = [1] * 200 + [0, 1]  # all but the last two are at the bottom
    assert rule(levels, 1, np.random.default_rng(4))
    assert levels == [1] * 200 + [1, 0]


def test_any_crosses_sizes_in_both_directions_equally(quant_space):
    space = quant_space((8, *([1] * 8)))
    rule = make_exchange("any", space, Budget(space.size * 4, 4, "bits per weight"))
    rng = np.random.default_rng(5)
    outcomes = Counter()
    for _ in range(3000):
        levels = [2] * 9
        assert rule(levels, 1, rng)
        assert space.cost(levels) == space.size * 4
        outcomes[levels[0]] += 1
        if levels[0] != 2:
            assert levels[1:] == [4 - levels[0]] * 8
    assert outcomes[2] > 0  # plain switches between equal sizes are among them
    assert outcomes[1] / (outcomes[1] + outcomes[3]) == pytest.approx(0.5, abs=0.1)


def test_none_spends_at_most_the_budget_and_crosses_sizes(quant_space):
    space = quant_space(SIZES)
    budget = Budget(space.size * 4, 4, "bits per weight")
    rule = make_exchange("none", space, budget)
    rng = np.random.default_rng(6)
    levels = [2] * len(SIZES)
    sizes = {size: set() for size in SIZES}
    for _ in range(500):
        assert rule(levels, 2, rng)
        cost = space.cost(space.check(levels))
        assert budget.total - max(SIZES) < cost <= budget.total  # slack is below one step of the largest unit
        for size in sizes:
            sizes[size].add(sum(levels[i] for i, s in enumerate(SIZES) if s == size))
    assert all(len(sums) > 1 for sums in sizes.values())


@pytest.mark.parametrize("exchange", ["size", "any"])
def test_sparsity_steps_of_equal_cost_pair_any_units(exchange):
    """Levels that remove 10 weights each, from units of different size, in one group."""
    units = tuple(
        Unit(
            f"u{i}",
            i,
            "w",
            size,
            tuple(Level(f"{kept}", kept, f"{kept}", kept) for kept in range(size, size - 31, -10)),
        )
        for i, size in enumerate((100, 200, 400))
    )
    space = Space("sparsity", units)
    rng = np.random.default_rng(7)
    levels = [1, 1, 1]
    switched = make_exchange(exchange, space, Budget(670, 0.5, "sparsity"))(levels, 1, rng)
    assert switched == (exchange == "any")  # sizes differ, so groups by size have no partner
    assert space.cost(levels) == 670


def test_dropped_modules_switch_within_their_kind():
    levels = (Level("keep", 1, "1", 16), Level("drop", 0, "0", 0))
    kinds = ("attention", "mlp") * 4
    space = Space("drop", tuple(Unit(f"{i}.{kind}", i // 2, kind, 10, levels) for i, kind in enumerate(kinds)))
    rule = make_exchange("name", space, Budget(4, 0.5, "modules"))
    rng = np.random.default_rng(8)
    genome = [1, 1, 1, 0, 0, 1, 0, 0]
    for _ in range(100):
        assert rule(genome, 1, rng)
        assert sum(genome[0::2]) == 2
        assert sum(genome[1::2]) == 2


def test_an_unknown_exchange_is_refused(quant_space):
    with pytest.raises(EvoPressError, match=r'exchange "sizes" is unknown.*size, name, any, none'):
        make_exchange("sizes", quant_space((1, 1)), Budget(8, 4, "bits per weight"))


@pytest.mark.parametrize("exchange", sorted(EXCHANGES))
def test_no_exchange_from_a_cornered_genome(quant_space, exchange):
    space = quant_space((4, 4, 2))
    rule = make_exchange(exchange, space, Budget(space.greatest_cost, 6, "bits per weight"))
    assert not rule([0, 0, 0], 1, np.random.default_rng(9))


# Bounds on deviations


def sparsity_space(sizes, *, step=10, num_levels=4):
    """Levels a step apart around half of each unit, fewer where the unit is small; the key counts from the target."""

    def levels(size):
        reach = min(num_levels, size // 2 // step)
        return tuple(
            Level(f"{-kept / size:.1%}", kept, str(i), kept)
            for i, kept in ((i, size // 2 - i * step) for i in range(-reach, reach + 1))
        )

    return Space("sparsity", tuple(Unit(f"u{i}", i, "w", size, levels(size)) for i, size in enumerate(sizes)))


def deviations(space, genome):
    return [abs(int(unit.levels[level].key)) for unit, level in zip(space.units, genome, strict=True)]


def bounded(space, *, max_level=None, max_total=None, generations=60, num_offspring=6, seed=0):
    """Run a search whose fitness pulls units apart and return every genome that it asked about."""
    settings = SearchSettings(
        generations=generations,
        num_offspring=num_offspring,
        survivors=[1],
        tokens=[1],
        initial_candidates=1,
        initial_tokens=1,
        max_switches=3,
        distribution="min_uniform",
        exchange="any",
        max_level=max_level,
        max_total_deviation=max_total,
    )
    total = sum(unit.size // 2 for unit in space.units)
    rng_initial, rng_mutation = np.random.default_rng(seed).spawn(2)
    evolution = Evolution(space, Budget(total, 0.5, "sparsity"), settings, rng_initial=rng_initial, rng_mutation=rng_mutation)
    weights = np.random.default_rng(seed).normal(size=len(space))
    asked = []

    def fitness(genomes, *, tokens):
        asked.extend(genomes)
        return [float(weights @ np.array(genome)) for genome in genomes]

    return run_search(evolution, fitness), asked


def test_deviation_counts_levels_from_the_centre():
    centre = (2, 0, 1)
    assert all(Deviation(centre)(genome) for genome in (centre, (9, 9, 9)))
    one = Deviation(centre, max_level=1)
    assert [one(genome) for genome in (centre, (1, 1, 2), (3, 0, 0), (4, 0, 1), (0, 0, 1))] == [True, True, True, False, False]
    few = Deviation(centre, max_total=2)
    assert [few(genome) for genome in (centre, (0, 0, 1), (3, 1, 1), (3, 1, 0))] == [True, True, True, False]
    both = Deviation(centre, max_level=1, max_total=2)
    assert [both(genome) for genome in ((3, 1, 1), (0, 0, 1), (3, 1, 0))] == [True, False, False]


@pytest.mark.parametrize("bounds", [{}, {"max_level": 1}, {"max_level": 2}, {"max_total": 6}, {"max_level": 2, "max_total": 9}])
def test_bounds_hold_over_many_generations(bounds):
    space = sparsity_space((40, 80, 80, 100, 200, 200, 30, 60))
    for seed in range(3):
        best, asked = bounded(space, seed=seed, **bounds)
        total = sum(unit.size // 2 for unit in space.units)
        assert {space.cost(space.check(genome)) for genome in asked} == {total}
        far = [deviations(space, genome) for genome in asked]
        assert max(map(max, far)) <= bounds.get("max_level", 4)
        assert max(map(sum, far)) <= bounds.get("max_total", 99)
        reached = (
            max(deviations(space, best)) == bounds.get("max_level")
            or sum(deviations(space, best)) >= bounds.get("max_total", 0) - 1
        )
        assert reached, "the search never came to its bound"
        if not bounds:
            assert max(map(max, far)) > 2


def test_a_tight_bound_leaves_a_large_model_searchable():
    """Two deviations among 200 units: a hundredth of the switches is allowed once both are spent."""
    space = sparsity_space((80,) * 200)
    best, asked = bounded(space, max_total=2, generations=12, num_offspring=4)
    assert sum(deviations(space, best)) == 2
    assert len(set(asked)) > 30


@pytest.mark.parametrize("bounds", [{"max_level": 1}, {"max_total": 4}])
def test_bounds_need_a_target_that_is_a_level(quant_space, bounds):
    settings = SearchSettings(
        generations=1,
        num_offspring=1,
        survivors=[1],
        tokens=[1],
        initial_candidates=1,
        initial_tokens=1,
        max_switches=1,
        distribution="constant",
        exchange="size",
        max_level=bounds.get("max_level"),
        max_total_deviation=bounds.get("max_total"),
    )
    space, rng = quant_space((4, 4, 4)), np.random.default_rng(0)
    with pytest.raises(EvoPressError, match=r"search\.max_level=.* target 2\.5 bits per weight is not a level"):
        Evolution(space, Budget(30, 2.5, "bits per weight"), settings, rng_initial=rng, rng_mutation=rng)
    Evolution(space, Budget(36, 3.0, "bits per weight"), settings, rng_initial=rng, rng_mutation=rng)
