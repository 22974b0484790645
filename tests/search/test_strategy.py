"""Strategies by ask and tell: what any of them is asked for, and what the registry says of one that is not there."""

from __future__ import annotations

import json

import numpy as np
import pytest
from random_search import RandomSearch

from evopress.errors import EvoPressError
from evopress.search.evolution import Evolution, EvolutionStrategy, SearchSettings
from evopress.search.initial import initial_candidates
from evopress.search.strategies import STRATEGIES, strategy_of
from evopress.search.strategy import Asks, Attribution, Problem, Question, run_search

SETTINGS = SearchSettings(5, 4, [2, 1], [8, 16], 3, 8, 3, "min_uniform", "size")


def problem_of(space, budget, seed: int = 0) -> Problem:
    rng_initial, rng_mutation = np.random.default_rng(seed).spawn(2)
    return Problem(space, budget, (), rng_initial=rng_initial, rng_mutation=rng_mutation)


def sums(genomes, *, tokens):
    return [float(np.arange(1, len(genome) + 1) @ np.array(genome)) for genome in genomes]


def test_the_paper_s_search_is_the_default_and_takes_the_numbers_of_search() -> None:
    assert strategy_of(None) == EvolutionStrategy() == strategy_of(EvolutionStrategy())
    assert EvolutionStrategy().searching(SETTINGS) is SETTINGS
    assert "evolution" in STRATEGIES


def test_a_strategy_that_is_not_there_is_told_with_the_choices() -> None:
    with pytest.raises(EvoPressError, match=r"^search\.strategy\.name=annealing is unknown: choose one of evolution"):
        strategy_of({"name": "annealing"})


def test_a_name_over_another_strategy_s_settings_is_refused() -> None:
    with pytest.raises(EvoPressError, match="choose it with search/strategy=evolution"):
        strategy_of({"name": "evolution"})
    with pytest.raises(EvoPressError, match="names no strategy"):
        strategy_of("evolution")


@pytest.mark.parametrize("generations", [0, 5])
def test_what_evolution_says_it_asks_is_what_it_asks(quant_space, budget_of, generations) -> None:
    space = quant_space((8, 3, 3, 8, 3, 3, 8, 8))
    settings = SearchSettings(generations, 4, SETTINGS.survivors, SETTINGS.tokens, 3, 8, 3, "min_uniform", "size")
    asked = [0]

    def counting(genomes, *, tokens):
        asked[0] += len(genomes) * tokens
        return sums(genomes, tokens=tokens)

    strategy = settings.make(problem_of(space, budget_of(space, 2.5)))
    run_search(strategy, counting)
    assert asked[0] == sum(ask.cost for ask in settings.asks())
    assert not any(ask.times for ask in settings.asks(strategy.state()))


def test_half_a_search_has_what_is_left_to_ask(quant_space, budget_of) -> None:
    space = quant_space((8, 3, 3, 8, 3, 3, 8, 8))
    strategy = SETTINGS.make(problem_of(space, budget_of(space, 2.5)))
    assert isinstance(strategy, Evolution)
    while strategy.generation < 3:
        question = strategy.ask()
        strategy.tell(sums(question.genomes, tokens=question.tokens))
    assert SETTINGS.asks(strategy.state()) == [Asks("search.tokens", 8, 4, 3), Asks("search.tokens", 16, 3, 3)]


def test_a_forward_and_backward_token_counts_as_three() -> None:
    assert Asks("x", 100, times=2, attribution=True).cost == 600
    assert Asks("x", 100, times=2, attribution=True).cost_where(modules=True) == 1000, "one more way back"
    assert [Asks("x", 100, of_modules=True).cost_where(modules=modules) for modules in (False, True)] == [0, 100]
    assert Asks("x", 100, candidates=5, times=2).cost == 1000


class Attributing:
    """Asks one attribution and takes the unit that holds most."""

    initial_record, finished, generation, parent, non_finite = None, False, 0, (0, 0), 0

    def ask(self):
        return Attribution((0, 0), 64)

    def tell(self, answer):
        self.finished, self.parent = True, tuple(int(value == max(answer[0])) for value in answer[0])


def test_an_attribution_is_answered_by_its_own_function() -> None:
    asked = []

    def attribute(question):
        asked.append(question)
        return [[1.0, 2.0]]

    assert run_search(Attributing(), sums, attribute=attribute) == (0, 1)
    assert asked == [Attribution((0, 0), 64, sequences=16)]


def test_an_attribution_that_nobody_answers_is_one_sentence() -> None:
    with pytest.raises(EvoPressError, match="needs attributions, which this fitness does not provide"):
        run_search(Attributing(), sums)


def test_a_strategy_of_another_kind_runs_and_goes_on_by_the_same_calls(quant_space, budget_of) -> None:
    space = quant_space((8, 3, 3, 8, 3, 3, 8, 8))
    budget, records = budget_of(space, 2.5), []
    whole = run_search(
        RandomSearch(generations=6).make(problem_of(space, budget)), sums, on_generation=lambda r: records.append(r.to_dict())
    )
    cut = RandomSearch(generations=6).make(problem_of(space, budget))
    for _ in range(3):
        question = cut.ask()
        assert isinstance(question, Question)
        cut.tell(sums(question.genomes, tokens=question.tokens))
    later = RandomSearch(generations=6).make(problem_of(space, budget, seed=9))
    later.restore(json.loads(json.dumps(cut.state())))
    assert run_search(later, sums) == whole
    assert [record["details"] for record in records] == [{"drawn": 4}, *[{"drawn": 5}] * 6]
    assert {record["cost"] <= budget.total for record in records} == {True}
    assert initial_candidates(space, budget, num_candidates=1, rng=np.random.default_rng(0))[0] != whole
