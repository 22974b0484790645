"""Paired racing: the clearly worse drop out, what is saved goes to the close ones, and doubt is for the current genome."""

from __future__ import annotations

import numpy as np
import pytest

from evopress.errors import EvoPressError
from evopress.search.racing import Race, RaceRules


def race_of(levels, *, tokens=8 * 16, noise=0.0, shared=1.0, seed=0, rules=None) -> Race:
    """Run a race of candidates of these fitnesses to its end, with noise of their own and noise that they share."""
    rng = np.random.default_rng(seed)
    race = Race([(i,) for i in range(len(levels))], tokens=tokens * len(levels), rules=rules or RaceRules())
    while not race.finished:
        asked = race.ask()
        assert asked.tokens == 16 and race.ask() == asked
        common = shared * rng.normal()
        race.tell([levels[genome[0]] + common + noise * rng.normal() for genome in asked.genomes])
    return race


def test_noise_that_all_share_does_not_keep_anybody_in() -> None:
    race = race_of([1.0, 0.5, 2.0, 0.9], noise=0.01, shared=10.0)
    assert race.winner == 1 and race.report()["parts"] == [3, 3, 3, 3]
    assert race.tokens == 4 * 3 * 16 and race.evaluations == 12
    assert [round(mean - race.means[1], 1) for mean in race.means] == [0.5, 0.0, 1.5, 0.4]


def test_what_is_saved_is_spent_on_the_close_ones() -> None:
    race = race_of([1.0, 1.0, *[5.0] * 6], noise=0.05, seed=2)
    parts = race.report()["parts"]
    assert parts[2:] == [3] * 6 and parts[0] == parts[1] > 8
    assert race.tokens <= 8 * 8 * 16 and race.tokens + 2 * 16 > 8 * 8 * 16
    assert race.record().tokens == 16 * parts[0] and race.record().num_candidates == 8


def test_a_winner_within_its_error_does_not_take_the_place_of_the_current_genome() -> None:
    def wins(accept: float) -> int:
        rules = RaceRules(race_margin=9.0, race_accept=accept)
        return sum(race_of([1.0, 1.0], noise=1.0, seed=seed, rules=rules).winner for seed in range(60))

    assert wins(0.0) > 20 > wins(1.0) > wins(3.0)
    assert all(race_of([1.0, 1.0], seed=seed).winner == 0 for seed in range(3)), "a tie stays"
    assert race_of([1.0, 0.9], noise=0.01).winner == 1
    assert race_of([0.9, 1.0], noise=0.01).winner == 0


def test_what_is_not_finite_drops_out_at_once() -> None:
    race = Race([(0,), (1,), (2,)], tokens=96, rules=RaceRules())
    race.tell([1.0, float("nan"), 0.5])
    assert [genome[0] for genome in race.ask().genomes] == [0, 2] and race.lost == 1
    race.tell([float("inf"), 0.5])
    assert race.finished and race.winner == 2
    with pytest.raises(EvoPressError, match="not a finite number"):
        race.tell([float("nan")])
    with pytest.raises(EvoPressError, match="2 numbers for 1 genomes"):
        race.tell([1.0, 1.0])


def test_a_current_genome_that_dropped_out_is_replaced_by_whoever_wins() -> None:
    winners = []
    for accept in (1.0, 2.0, 3.0):
        rules = RaceRules(race_margin=2.0, race_accept=accept)
        winners.append([race_of([1.0, 1.0, 1.0], noise=0.5, seed=seed, rules=rules).winner for seed in range(40)])
    one, two, three = winners
    assert two == three and sum(map(bool, one)) > sum(map(bool, two)) > 0, "above the margin it does what the margin does"


@pytest.mark.parametrize("wrong", [{"race_parts": 2}, {"race_margin": -1.0}, {"race_accept": float("nan")}])
def test_rules_out_of_range_are_refused(wrong) -> None:
    with pytest.raises(EvoPressError, match=rf"search\.strategy\.{next(iter(wrong))}="):
        RaceRules(**wrong)


def test_its_record_says_what_all_spent() -> None:
    race = race_of([1.0, 1.0, *[5.0] * 6], noise=0.05, seed=2)
    stage = race.record()
    assert stage.spent == race.tokens < stage.tokens * stage.num_candidates
