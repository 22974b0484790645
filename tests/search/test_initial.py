from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evopress.currencies import currency_of
from evopress.errors import EvoPressError
from evopress.search import initial
from evopress.search.constraint import StepCosts
from evopress.search.initial import initial_candidates, random_mix, random_mixes, uniform_genome
from evopress.units import Budget, Level, Limit, Space, Unit

SIZES = (8, 3, 3, 1, 1) * 4


@pytest.mark.parametrize(("bits", "level"), [(2, 4), (3, 3), (6, 0)])
def test_a_target_that_is_a_level_starts_uniform(quant_space, budget_of, bits, level):
    space = quant_space(SIZES)
    genomes = initial_candidates(space, budget_of(space, bits), num_candidates=8, rng=np.random.default_rng(0))
    assert genomes == [(level,) * len(SIZES)]


def test_a_uniform_genome_below_the_budget_is_not_it(quant_space, budget_of):
    space = quant_space(SIZES)
    assert uniform_genome(space, budget_of(space, 3.1)) is None


@pytest.mark.parametrize("bits", [2.1, 2.25, 2.5, 3.9, 5.5])
def test_mixes_use_the_two_neighbouring_levels_and_the_whole_budget(quant_space, budget_of, bits):
    space, budget = quant_space(SIZES), budget_of(quant_space(SIZES), bits)
    above = 6 - int(np.ceil(bits))
    for seed in range(30):
        genome = random_mix(space, budget, np.random.default_rng(seed))
        assert set(genome) <= {above, above + 1}
        slack = budget.total - space.cost(genome)
        lowered = [unit.size for unit, level in zip(space.units, genome, strict=True) if level == above + 1]
        assert 0 <= slack < min(lowered)  # nothing that was lowered fits back


def test_every_unit_can_be_at_either_level(quant_space, budget_of):
    space = quant_space(SIZES)
    rng = np.random.default_rng(0)
    mixes = np.array([random_mix(space, budget_of(space, 2.5), rng) for _ in range(400)])
    # Small units go back up a little more often: they fit what the last, larger one leaves.
    assert mixes.mean(axis=0) == pytest.approx(np.full(len(SIZES), 3.5), abs=0.25)


def test_candidates_are_distinct_and_repeat_with_the_seed(quant_space, budget_of):
    space, budget = quant_space(SIZES), budget_of(quant_space(SIZES), 2.5)
    first, second = (initial_candidates(space, budget, num_candidates=32, rng=np.random.default_rng(5)) for _ in range(2))
    assert first == second
    assert len(set(first)) == 32


def test_a_small_space_gives_the_mixes_it_has(quant_space, budget_of):
    space = quant_space((1, 1, 1, 1))
    mixes = random_mixes(space, budget_of(space, 2.5), num_candidates=100, rng=np.random.default_rng(0))
    assert len(mixes) == 6  # two of four units at 3 bits


def counted_draws(monkeypatch):
    draws = []
    draw = initial._TotalMixer.draw
    monkeypatch.setattr(initial._TotalMixer, "draw", lambda self, rng: draws.append(1) or draw(self, rng))
    return draws


@pytest.mark.parametrize("limits", [(), (Limit(3 * 64, currency_of("bits")),), (Limit(3 * 64, kind="q"),)])
def test_the_only_mix_there_is_takes_one_draw(quant_space, budget_of, monkeypatch, limits):
    """Where the target is a level: one draw finds it, however many are asked for."""
    space, draws = quant_space((4,) * 16, kinds=["q"] * 16), counted_draws(monkeypatch)
    budget = replace(budget_of(space, 3), limits=limits)
    assert random_mixes(space, budget, num_candidates=32, rng=np.random.default_rng(0)) == [(3,) * 16]
    assert len(draws) <= 2  # the second looks whether something could still move


def test_the_only_mix_is_known_where_modules_stay(joint_space):
    whole = tuple(0 if unit.kind == "mlp" else 1 for unit in joint_space.units)
    budget = Budget(joint_space.cost(whole), 3, "bits per weight")
    mixer = initial._mixer(joint_space, budget)
    assert mixer.only_one and mixer.draw(np.random.default_rng(0)) == whole
    assert not initial._mixer(joint_space, replace(budget, total=budget.total + 1)).only_one
    assert not initial._mixer(joint_space, replace(budget, limits=(Limit(1, currency_of("modules")),))).only_one


def test_what_no_draw_changes_is_worked_out_once(quant_space, budget_of, monkeypatch):
    space, calls = quant_space(SIZES), []
    tabulated = StepCosts.of
    monkeypatch.setattr(initial.StepCosts, "of", lambda space: calls.append(1) or tabulated(space))
    assert len(random_mixes(space, budget_of(space, 2.5), num_candidates=32, rng=np.random.default_rng(0))) == 32
    assert len(calls) == 1


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_space_with_any_budget_gets_a_mix_within_it(data):
    """Units with different numbers of levels, unrelated costs and no shared labels."""
    units = []
    for i in range(data.draw(st.integers(1, 6))):
        costs = sorted(data.draw(st.sets(st.integers(0, 40), min_size=1, max_size=5)), reverse=True)
        levels = tuple(Level(f"{i}-{cost}", cost, str(cost), cost) for cost in costs)
        units.append(Unit(f"u{i}", i, "w", data.draw(st.integers(1, 9)), levels))
    space = Space("toy", tuple(units))
    budget = Budget(data.draw(st.integers(space.least_cost, space.greatest_cost)), 0.5, "share")
    genome = space.check(random_mix(space, budget, np.random.default_rng(data.draw(st.integers(0, 999)))))
    assert space.cost(genome) <= budget.total


def test_units_without_the_upper_neighbour_are_made_up_for(quant_space):
    space = quant_space((1,) * 8, bits=[(2,)] * 4 + [(6, 5, 4, 3, 2)] * 4)
    budget = Budget(32, 4, "bits per weight")
    genome = random_mix(space, budget, np.random.default_rng(0))
    assert genome == (0, 0, 0, 0, 0, 0, 0, 0)


def test_levels_far_below_are_used_where_the_neighbours_are_not_enough(quant_space):
    space = quant_space((1,) * 4, bits=[(4,), (4,), (4, 3, 2, 1), (4, 3, 2, 1)])
    assert random_mix(space, Budget(10, 2.5, "bits per weight"), np.random.default_rng(0)) == (0, 0, 3, 3)


def test_dropping_mixes_keep_and_drop():
    levels = (Level("keep", 1, "1", 16), Level("drop", 0, "0", 0))
    space = Space("drop", tuple(Unit(f"u{i}", i, "mlp", 10 + i, levels) for i in range(10)))
    genome = random_mix(space, Budget(7, 0.3, "modules"), np.random.default_rng(0))
    assert sum(genome) == 3


def test_impossible_requests_are_refused(quant_space, budget_of):
    space = quant_space(SIZES)
    with pytest.raises(EvoPressError, match="below what"):
        random_mix(space, budget_of(space, 1.9), np.random.default_rng(0))
    with pytest.raises(EvoPressError, match="0 random candidates"):
        random_mixes(space, budget_of(space, 2.5), num_candidates=0, rng=np.random.default_rng(0))


def drop_space(num_blocks=8, stuck=()):
    keep, drop = Level("keep", 1, "keep", 16), Level("drop", 0, "drop", 0)
    units = []
    for block in range(num_blocks):
        for kind, size in (("attention", 3), ("mlp", 50)):
            levels = (keep,) if (block, kind) in stuck else (keep, drop)
            units.append(Unit(f"{block}.{kind}", block, kind, size, levels))
    return Space("drop", tuple(units))


def test_a_mix_keeps_the_part_of_each_kind():
    space = drop_space(stuck={(0, "attention"), (5, "mlp")})
    budget = Budget(11, 0.3, "depth sparsity", limits=(Limit(6, kind="attention"), Limit(5, kind="mlp")))
    seen = set()
    for seed in range(200):
        genome = random_mix(space, budget, np.random.default_rng(seed))
        assert budget.met_by(space, genome)
        assert (space.total(space.prices, genome, "attention"), space.total(space.prices, genome, "mlp")) == (6, 5)
        seen.update(i for i, level in enumerate(genome) if level)
    assert seen == set(range(16)) - {0, 11}  # whatever may be dropped is dropped sometimes


def test_another_split_of_the_same_total_does_not_meet_the_budget():
    space = drop_space(2)
    budget = Budget(2, 0.5, "depth sparsity", limits=(Limit(1, kind="attention"), Limit(1, kind="mlp")))
    assert budget.met_by(space, (1, 0, 0, 1))
    assert not budget.met_by(space, (1, 0, 1, 0))
    assert Budget(2, 0.5, "depth sparsity").met_by(space, (1, 0, 1, 0))
