import itertools
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evopress.baselines.exhaustive import all_genomes, count_genomes, exhaustive
from evopress.currencies import currency_of
from evopress.errors import EvoPressError
from evopress.units import Budget, Genome, Level, Limit, Space, Unit


def drop_space(*kinds, cost=1) -> Space:
    levels = (Level("keep", cost, "keep", 0), Level("drop", 0, "drop", 0))
    return Space("drop", tuple(Unit(f"{kind}.{i}", i, kind, cost, levels) for i, kind in enumerate(kinds)))


def keep(total, *split) -> Budget:
    return Budget(total, 0.25, "sparsity", tuple(Limit(part, kind=kind) for kind, part in split))


PAIRS = drop_space(*["pair"] * 6)


def fitness(genomes):
    """The best of all keeps pairs 0, 1 and 4; no pair is worth anything without another one."""
    worth = {(0, 1): 5.0, (1, 4): 3.0, (0, 4): 1.0, (2, 3): 6.0, (3, 5): 2.0}
    kept = [{i for i, level in enumerate(genome) if level == 0} for genome in genomes]
    return [10.0 - sum(value for pair, value in worth.items() if set(pair) <= some) for some in kept]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_small_space_equals_brute_force(data):
    """Different numbers of levels, unrelated costs, up to three kinds, a split over some of them."""
    units = []
    for i in range(data.draw(st.integers(1, 6))):
        costs = sorted(data.draw(st.sets(st.integers(0, 7), min_size=1, max_size=4)), reverse=True)
        kind = data.draw(st.sampled_from("abc"))
        units.append(Unit(f"u{i}", i, kind, 5, tuple(Level(str(c), c, str(c), c) for c in costs)))
    space = Space("toy", tuple(units))
    genomes = list(itertools.product(*(range(len(unit.levels)) for unit in units)))
    aim = data.draw(st.sampled_from(genomes))  # a budget that is met, mostly
    slack = data.draw(st.sampled_from([0, 0, 0, 1]))
    kinds = data.draw(st.sets(st.sampled_from("abc")))
    limits = tuple(Limit(space.total(space.prices, aim, kind), kind=kind) for kind in kinds)
    budget = Budget(space.cost(aim) + slack, 0.5, "share", limits)

    def spends_it_all(genome: Genome) -> bool:
        return space.cost(genome) == budget.total and all(limit.spent(space, genome) == limit.total for limit in limits)

    expected = [genome for genome in genomes if spends_it_all(genome)]
    assert list(all_genomes(space, budget)) == expected  # `product` is lexicographic
    assert count_genomes(space, budget) == len(expected)
    assert slack or aim in expected


def test_counts_of_the_papers_spaces_take_no_time():
    assert count_genomes(drop_space(*["pair"] * 16), keep(10)) == 8008  # Figure 1
    modules = drop_space(*["attention", "mlp"] * 32, cost=7)
    half = keep(2 * 16 * 7, ("attention", 16 * 7), ("mlp", 16 * 7))
    assert count_genomes(modules, half) == math.comb(32, 16) ** 2
    assert count_genomes(modules, keep(2 * 16 * 7)) == math.comb(64, 32)
    assert next(all_genomes(modules, half)) == (0,) * 32 + (1,) * 32  # without looking through the others


def test_a_split_that_no_genome_keeps_counts_none():
    space = drop_space("attention", "mlp", "attention")
    for budget in (
        keep(3, ("attention", 3)),  # two modules
        keep(2, ("attention", 1), ("mlp", 0)),  # the parts are less than the total
        keep(2, ("attention", 2), ("head", 1)),  # no such unit
    ):
        assert count_genomes(space, budget) == 0
        assert list(all_genomes(space, budget)) == []


@pytest.mark.parametrize("batch", [1, 7, 20, 100])
def test_the_optimum_is_found_in_batches_of_every_size(batch):
    sizes = []

    def fitness_of(genomes):
        sizes.append(len(genomes))
        return fitness(genomes)

    best, found = exhaustive(PAIRS, keep(3), fitness_of, limit=20, batch=batch)
    assert best == (0, 0, 1, 1, 0, 1)
    genomes = list(all_genomes(PAIRS, keep(3)))
    assert found == list(zip(genomes, fitness(genomes), strict=True))
    assert len(found) == math.comb(6, 3) == sum(sizes)
    assert max(sizes) == min(batch, 20)


def test_of_equal_genomes_the_first_is_best_and_nan_never():
    genomes = list(all_genomes(PAIRS, keep(3)))
    values = dict(zip(genomes, [math.nan, 2.0, 1.0, 1.0, *[math.inf] * 16], strict=True))
    best, found = exhaustive(PAIRS, keep(3), lambda part: [values[g] for g in part], limit=20, batch=8)
    assert best == genomes[2]
    assert math.isnan(found[0][1])


def test_an_interrupted_search_goes_on_where_it_stopped():
    stored, seen = {}, []

    def dies(genomes):
        if len(stored) >= 12:
            raise KeyboardInterrupt
        return fitness(genomes)

    with pytest.raises(KeyboardInterrupt):
        exhaustive(PAIRS, keep(3), dies, limit=20, batch=6, on_batch=stored.update)
    assert list(stored) == list(all_genomes(PAIRS, keep(3)))[:12]

    def fitness_of(genomes):
        seen.extend(genomes)
        return fitness(genomes)

    resumed = exhaustive(PAIRS, keep(3), fitness_of, limit=20, batch=6, known=dict(stored), on_batch=stored.update)
    assert seen == list(all_genomes(PAIRS, keep(3)))[12:]
    assert resumed == exhaustive(PAIRS, keep(3), fitness, limit=20, batch=6)
    assert stored == dict(resumed[1])
    seen.clear()
    assert exhaustive(PAIRS, keep(3), fitness_of, limit=20, batch=6, known=stored) == resumed
    assert seen == []


def test_fitnesses_of_other_genomes_are_ignored():
    other = (0, 0, 0, 0, 0, 0)
    best, found = exhaustive(PAIRS, keep(3), fitness, limit=20, batch=6, known={other: -100.0})
    assert best == (0, 0, 1, 1, 0, 1)
    assert other not in dict(found)


def unreachable(genomes):
    raise AssertionError("nothing may be measured")


def test_spaces_above_the_limit_are_refused_with_their_count():
    with pytest.raises(EvoPressError, match=r"would measure 20 genomes, more than baselines\.exhaustive_limit=19: raise"):
        exhaustive(PAIRS, keep(3), unreachable, limit=19, batch=6)
    with pytest.raises(EvoPressError, match=r"would measure 1,832,624,140,942,590,534 genomes"):
        exhaustive(drop_space(*["block"] * 64), keep(32), unreachable, limit=10_000, batch=6)


def test_a_budget_that_no_genome_costs_is_refused():
    with pytest.raises(EvoPressError, match=r"none of the 6 units' genomes costs exactly the budget 7 .*choose another target"):
        exhaustive(drop_space(*["block"] * 6, cost=2), keep(7), unreachable, limit=100, batch=6)


def test_only_infinite_fitnesses_are_refused():
    with pytest.raises(EvoPressError, match=r"none of the 20 genomes has a finite fitness"):
        exhaustive(PAIRS, keep(3), lambda genomes: [math.nan] * len(genomes), limit=20, batch=6)


def test_genomes_that_break_a_further_limit_are_left_out():
    levels = [(Level("keep", 1, "keep", 8 * size), Level("drop", 0, "drop", 0)) for size in (9, 1, 5, 2)]
    space = Space("drop", tuple(Unit(f"m{i}", i, "m", 1, of_unit) for i, of_unit in enumerate(levels)))
    stored = currency_of("bytes")
    budget = Budget(2, 0.5, "sparsity", (Limit(8 * 7, stored),))
    kept = [(1, 0, 0, 1), (1, 0, 1, 0), (1, 1, 0, 0)]
    assert list(all_genomes(space, budget)) == kept and count_genomes(space, budget) == 6
    best, measured = exhaustive(space, budget, lambda genomes: [sum(genome[:3]) for genome in genomes], limit=6, batch=2)
    assert [genome for genome, _ in measured] == kept and best == (1, 0, 0, 1)
    with pytest.raises(EvoPressError, match=r"costs exactly the budget 2 \(0.5 sparsity\) and keeps 2 bytes: choose"):
        exhaustive(space, replace(budget, limits=(Limit(16, stored),)), len, limit=6, batch=2)
