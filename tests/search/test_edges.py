"""Boundaries of the search at which one sign or one place off would go unseen elsewhere: found by changing lines one at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from toy_search import SETTINGS, budget_of, joint_space, quant_space

from evopress.currencies import CURRENCIES
from evopress.errors import EvoPressError
from evopress.levels.tied import tied
from evopress.search.deltas import Deltas
from evopress.search.evolution import Evolution, SearchSettings
from evopress.search.guided_settings import GuidedStrategy
from evopress.search.mutation import LevelSwitch
from evopress.search.predicted import PredictedSwitch
from evopress.search.program import best_in
from evopress.search.racing import Race, RaceRules
from evopress.search.sensitivity import Expected, of_modules, sensitivities
from evopress.search.strategy import Problem
from evopress.units import Budget, Level, Limit, Space, Unit

EVOLUTION = SearchSettings(9, 4, [2, 1], [8, 16], 3, 8, 3, "min_uniform", "any")
NUMBERS = GuidedStrategy(rounds=5, attribution_tokens=64, attribution_sequences=8, screen_tokens=32, changes=[3, 1])


def guided(space: Space, budget: Budget, errors: Any = (), **numbers: Any) -> Any:
    initial, mutation = np.random.default_rng(0).spawn(2)
    problem = Problem(space, budget, errors, rng_initial=initial, rng_mutation=mutation, starts=())
    return replace(NUMBERS, **numbers).searching(EVOLUTION).make(problem)


def of_bits(count: int, bits: float, **numbers: Any) -> Any:
    space = quant_space((1,) * count, bits=(4, 3, 2), kinds=("q",) * count)
    return guided(space, budget_of(space, bits), [[0.1, 0.2, 0.4]] * count, **numbers)


def evolution_of(bits: float = 4.0, **more: Any) -> Evolution:
    space = quant_space([2] * 8)
    initial, mutation = np.random.default_rng(0).spawn(2)
    settings = replace(SETTINGS, survivors=[1], tokens=[8])
    return Evolution(space, budget_of(space, bits), settings, rng_initial=initial, rng_mutation=mutation, **more)


# Races


@pytest.mark.parametrize(("margin", "done"), [(1.6, True), (1.9, False)])
def test_who_is_behind_is_told_by_the_standard_error_of_a_sample(margin: float, done: bool) -> None:
    """The mean of the differences is 1, its standard error 0.577: 1.73 errors."""
    race = Race([(0,), (1,)], tokens=256, rules=RaceRules(race_margin=margin))
    for difference in (0.0, 1.0, 2.0):
        race.tell([difference, 0.0])
    assert race.finished is done


def test_a_race_of_few_tokens_has_three_minibatches_all_the_same() -> None:
    race = Race([(0,), (1,)], tokens=8, rules=RaceRules())
    for index in range(3):
        assert not race.finished
        race.tell([1.0 + index, 1.0 + index])
    assert race.finished


def test_who_dropped_out_is_compared_on_the_minibatches_that_it_had() -> None:
    """Later ones are harder."""
    race, part = Race([(0,), (1,), (2,)], tokens=384, rules=RaceRules()), 0
    while not race.finished:
        text, sign = (1.0 if part < 3 else 11.0), (-1) ** part
        race.tell([{(0,): text, (1,): text + 0.1 * sign, (2,): text + 4.0}[genome] for genome in race.ask().genomes])
        part += 1
    parts = race.report()["parts"]
    assert parts[2] == 3 < parts[0] and race.evaluations == sum(parts)
    assert race.means[2] - race.means[0] == pytest.approx(4.0, abs=0.2)


def test_of_equals_the_first_wins_a_race() -> None:
    race = Race([(0,), (1,), (2,)], tokens=384, rules=RaceRules())
    while not race.finished:
        race.tell([{(0,): 1.0, (1,): 0.5, (2,): 0.5}[genome] for genome in race.ask().genomes])
    assert race.winner == 1


def test_a_racing_search_whose_offspring_are_no_numbers_stops() -> None:
    evolution = evolution_of(race=RaceRules())
    parent = evolution.parent

    def go() -> None:
        record = None
        while evolution.generation < 20:
            answer = [1.0 if genome == parent else math.nan for genome in evolution.ask().genomes]
            record = evolution.tell(answer) or record
            if record is not None:
                assert record.non_finite == 8 and evolution.non_finite == 8 * record.generation

    with pytest.raises(EvoPressError, match="in 10 generations"):
        go()


def test_a_round_counts_proposals_that_are_no_numbers_in_a_race() -> None:
    strategy = of_bits(12, 3.0, rounds=1, selection="racing")
    strategy.ask()
    strategy.tell([np.random.default_rng(0).lognormal(sigma=2.0, size=12).tolist()] * 8)
    lost, record = strategy.ask().genomes[1], None
    while record is None:
        record = strategy.tell([math.nan if genome == lost else 1.0 for genome in strategy.ask().genomes])
    assert record.non_finite == strategy.non_finite == 1


# Guided rounds


def test_sensitivities_are_kept_of_as_many_rounds_as_are_averaged() -> None:
    strategy, rng, lengths = of_bits(12, 2.5, averaged=2), np.random.default_rng(0), []
    while not strategy.finished and len(lengths) < 5:
        question = strategy.ask()
        asked = getattr(question, "genomes", None)  # the later a proposal the better; each round other units hold all
        answer = [rng.lognormal(sigma=3.0, size=12).tolist()] * 8 if asked is None else [1.0 - i for i in range(len(asked))]
        if strategy.tell(answer) is not None:
            lengths.append(len(strategy.state()["sensitivities"]))
    assert len(lengths) >= 4 and lengths[-1] == 2


def test_proposals_of_modules_change_two_at_least() -> None:
    keep, drop = Level("keep", 1, "keep", 0, "drop"), Level("drop", 0, "drop", 0, "drop")
    units = tuple(Unit(f"{i}.{kind}", i, kind, 1, (keep, drop)) for i in range(6) for kind in ("attention", "mlp"))
    assert guided(Space("drop", units), Budget(8, 0.3, "x"), changes=[80, 10])._changes == [5, 2]


def test_a_longer_guided_search_is_the_same_one() -> None:
    numbers = ((1, 0, 0), (2, 1, 3))
    one, longer = (replace(NUMBERS, rounds=r, second_order_rounds=s, delta_rounds=d).searching(EVOLUTION) for r, s, d in numbers)
    assert one.identity() == longer.identity()


def test_rounds_of_deltas_are_screened_too() -> None:
    asks = replace(NUMBERS, rounds=1, delta_rounds=3).searching(EVOLUTION).asks()
    assert [ask.times for ask in asks if ask.milestone and ask.key == "search.strategy.screen_tokens"] == [4]


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_sensitivities_of_a_state_are_positive(value: float) -> None:
    state = of_bits(8, 3.0).state() | {"sensitivities": [[value] * 8]}
    with pytest.raises(ValueError, match="not all positive"):
        of_bits(8, 3.0).restore(state)


def test_the_parent_of_a_state_is_within_the_budget() -> None:
    with pytest.raises(ValueError, match="not within the budget"):
        evolution_of().restore(evolution_of().state() | {"parent": [0] * 8})


# The integer program, exchanges


def test_a_module_that_comes_back_has_its_levels_to_choose() -> None:
    values = [[0.0, 100.0]] * 2 + [[0.0, 1.0, 2.0]] * 5
    found = best_in(joint_space(), Budget(16, 3.2, ""), values, near=(1, 0, 0, 0, 0, 0, 0), most_changes=1)
    assert found == (0, 0, 2, 2, 0, 0, 0)


def test_what_is_compressed_in_an_exchange_is_compressed_for_something() -> None:
    space, rng = quant_space((8, 1), bits=(4, 3, 2)), np.random.default_rng(0)
    mutation = LevelSwitch(space, Budget(27, 3.0, ""), exchange="fit", max_switches=1)
    assert all(min(mutation((1, 1), rng)) < 1 for _ in range(200))


# What is expected


def test_modules_hold_what_the_median_of_their_kind_holds() -> None:
    held = np.tile([0.0, 1.0, 1.0, 100.0], (2, 1))
    assert of_modules(np.ones(4), held, ["mlp"] * 4, [True] * 4).tolist() == pytest.approx([0.01, 0.5, 0.5, 50.0])


def test_units_that_differ_by_chance_keep_a_little_of_it() -> None:
    low, high = sensitivities(np.array([[1.0, 3.1], [3.0, 1.1]] * 4), np.full(2, 0.1), ["q"] * 2)
    assert 10.0 < low < 10.25 < high < 10.5


def measured(offset: float, means: Sequence[float]) -> tuple[Space, Deltas]:
    """Return deltas of two units, each measured on two minibatches that lie an offset to both sides of a mean."""
    space = quant_space((1,) * 2, bits=(4, 3), kinds=("q", "q"))
    deltas = Deltas(space, (0, 0), tokens=8, parts=2)
    for sign in (-1, 1):
        deltas.ask()
        deltas.tell([0.0, *(mean + sign * offset for mean in means)])
    return space, deltas


@pytest.mark.parametrize(
    ("offset", "means", "expected", "shrunk"),
    [
        (1.0, (2.0, -1.0), [0.0, 0.0], [1.2, -0.6]),  # of the mean square 2.5 the minibatches' error has 1
        (1.0, (-2.0, -1.0), [0.0, 1.0], [-1.2, -0.6]),  # an expectation of the other sign counts for nothing
        (4.0, (2.0, -1.0), [0.0, 0.0], [2 * 0.05 / 1.05, -0.05 / 1.05]),  # all of it error: a twentieth stays
    ],
)
def test_deltas_are_drawn_towards_what_was_expected_by_their_noise(
    offset: float, means: Sequence[float], expected: list[float], shrunk: list[float]
) -> None:
    space, deltas = measured(offset, means)
    assert deltas.shrunk(Expected(space, [expected] * 2)) == pytest.approx(shrunk)


def test_offspring_are_predicted_by_gain_per_cost() -> None:
    space, rng = quant_space((9, *[1] * 9), bits=(4, 3, 2)), np.random.default_rng(0)
    draw = PredictedSwitch(space, Budget(54, 3.0, ""), [[0.0, 5.0, 10.0]] * 10, max_switches=1, distribution="constant")
    assert sum(draw((1,) * 10, rng)[0] == 0 for _ in range(300)) < 15, "it costs nine times as much as the others"


@pytest.mark.parametrize(("total", "switches"), [(32, 3), (34, 1)])  # nothing is left over, or what is filled
def test_no_unit_goes_up_by_more_than_one_level(total: int, switches: int) -> None:
    space, rng = quant_space((1,) * 8), np.random.default_rng(0)
    values = [[0.0, w, 3 * w, 9 * w, 27 * w] for w in (100.0, 1, 1, 1, 1, 1, 1, 0.001)]
    draw = PredictedSwitch(space, Budget(total, 4.0, ""), values, max_switches=switches, distribution="constant")
    assert all(min(draw((2,) * 8, rng)) == 1 for _ in range(200))


# Limits and prices


def test_what_a_limit_can_come_down_to_counts_what_can_be_dropped() -> None:
    assert Limit(0).bounds(joint_space()) == (2, 20)


def test_a_limit_at_the_least_is_one_that_can_be_kept() -> None:
    space = quant_space((1, 1), bits=(4, 2))
    Budget(6, 3.0, "", (Limit(4),)).check(space)
    with pytest.raises(EvoPressError, match="limits has"):
        Budget(6, 3.0, "", (Limit(3),)).check(space)


def test_a_tied_space_in_another_currency_has_the_whole_one_in_it_too() -> None:
    levels = tuple(Level(f"{bits} bits", bits, str(bits), 10 * bits, "quant") for bits in (4, 2))
    names = [f"model.layers.0.mlp.experts.{expert}.down_proj" for expert in range(2)]
    space = Space("quant", tuple(Unit(name, 0, "experts.down_proj", 1, levels) for name in names))
    one = tied(space, None, experts=True).priced(CURRENCIES["bytes"])
    assert one.cost((0,)) == one.whole.cost((0, 0)) == 80
