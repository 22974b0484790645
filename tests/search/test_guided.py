"""The guided search: its two steps against their slow twins, the search on problems whose best genome is known, and killed runs."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from guided_literal import best_of_all, shrunk

from evopress.errors import EvoPressError
from evopress.search.evolution import SearchSettings
from evopress.search.guided_settings import GuidedStrategy
from evopress.search.sensitivity import sensitivities
from evopress.search.strategy import Attribution, Expansion, Problem, Question, run_search
from evopress.units import Budget, Genome, Level, Limit, Space, Unit, is_module

EVOLUTION = SearchSettings(9, 4, [2, 1], [8, 16], 3, 8, 3, "min_uniform", "any")
NUMBERS = GuidedStrategy(rounds=5, attribution_tokens=64, attribution_sequences=8, screen_tokens=32, changes=[3, 1])


class Additive:
    """The fitness is Σ c_u e_u(l_u), of which a unit's attribution is twice its part; both with noise, if any."""

    def __init__(self, space: Space, *, noise: float = 0.0, seed: int = 0, interaction: float = 0.0) -> None:
        rng = np.random.default_rng(seed)
        self.space = space
        self.errors = [
            [4.0 ** -int(level.key) * factor for level in unit.levels]
            for unit, factor in zip(space.units, rng.uniform(0.5, 2, len(space)), strict=True)
        ]
        self.weights = rng.lognormal(sigma=1.0, size=len(space))
        self.noise, self.interaction, self.rng = noise, interaction, np.random.default_rng(seed + 1)
        self.asked: list[Any] = []

    def parts(self, genome: Genome) -> np.ndarray:
        return self.weights * np.array([errors[level] for errors, level in zip(self.errors, genome, strict=True)])

    def exact(self, genome: Genome) -> float:
        parts = self.parts(genome)
        return float(parts.sum() + self.interaction * parts.sum() ** 2)

    def __call__(self, genomes, *, tokens):
        self.asked.append((len(genomes), tokens))
        shared = self.noise * self.rng.normal()
        return [self.exact(genome) * (1 + shared) for genome in genomes]

    def attribute(self, question: Attribution) -> list[Any]:
        self.asked.append(question)
        noise = self.noise * self.rng.normal(size=(question.sequences, len(self.space)))
        if isinstance(question, Expansion):
            return [
                [
                    [change * (1 + each) for change in of_unit]
                    for each, of_unit in zip(row, self.changes(question.genome), strict=True)
                ]
                for row in noise
            ]
        return (2 * self.parts(question.genome) * (1 + noise)).tolist()

    def changes(self, genome: Genome) -> list[list[float]]:
        """What moving each unit alone to each level changes; NaN for levels that it has not."""
        here, longest = self.exact(genome), max(map(len, self.errors))
        moved = [[(*genome[:u], level, *genome[u + 1 :]) for level in range(len(errors))] for u, errors in enumerate(self.errors)]
        return [[self.exact(each) - here for each in of_unit] + [math.nan] * (longest - len(of_unit)) for of_unit in moved]


def problem_of(space, budget, errors, *, seed: int = 0, starts=()) -> Problem:
    rng_initial, rng_mutation = np.random.default_rng(seed).spawn(2)
    return Problem(space, budget, errors, rng_initial=rng_initial, rng_mutation=rng_mutation, starts=starts)


def run(strategy, toy) -> tuple[Genome, list[dict]]:
    records: list[dict] = []
    best = run_search(strategy, toy, attribute=toy.attribute, on_generation=lambda record: records.append(record.to_dict()))
    return best, records


@pytest.mark.parametrize("seed", range(5))
def test_shrinkage_is_as_the_note_has_it(seed) -> None:
    rng = np.random.default_rng(seed)
    kinds = ["q"] * 4 + ["v"] * 5 + ["down"] * 3
    held = rng.lognormal(size=12) * (1 + 0.4 * rng.normal(size=(6, 12)))
    errors = rng.uniform(0.01, 0.2, size=12)
    assert sensitivities(held, errors, kinds) == pytest.approx(shrunk(held.tolist(), errors.tolist(), kinds), rel=1e-9)


def test_what_is_certain_is_kept_and_what_is_noise_is_the_kind_s() -> None:
    errors, kinds = np.full(4, 0.1), ["q"] * 4
    certain = np.tile([1.0, 2.0, 3.0, 2.0], (8, 1))
    assert sensitivities(certain, errors, kinds) == pytest.approx([5, 10, 15, 10])
    rng = np.random.default_rng(0)
    noise = 2.0 + rng.normal(size=(8, 4))
    found = sensitivities(noise, errors, kinds)
    assert np.ptp(found) < 0.5 * np.ptp(noise.mean(axis=0) / errors / 2)
    assert found.mean() == pytest.approx(noise.mean() / 0.2, rel=1e-2)


def test_no_sensitivity_is_without_a_floor_and_units_without_error_get_their_kind_s() -> None:
    held = np.tile([4.0, -2.0, 0.0, -1.0, -1.0], (4, 1))
    found = sensitivities(held, np.array([0.1, 0.1, 0.0, 0.1, 0.1]), ["q", "q", "q", "v", "v"])
    assert bool((found > 0).all())
    assert found[1] == pytest.approx(0.1 * found[2]) and found[2] == pytest.approx(5.0)  # 2 / 0.2 / 2
    assert found[3] == found[4] < 1e-2 * found[2]
    assert sensitivities(np.zeros((4, 2)), np.zeros(2), ["q", "v"]).tolist() == [0.5, 0.5], "nothing is known: plain errors"


@pytest.mark.parametrize("bits", [2.5, 3.0])
@pytest.mark.parametrize("seed", range(4))
def test_on_an_additive_problem_it_ends_at_the_best_genome(quant_space, budget_of, seed, bits) -> None:
    space = quant_space((3, 1, 1, 3, 3, 1), bits=(4, 3, 2), kinds=("q", "v", "v", "q", "q", "v"))
    toy, budget = Additive(space, seed=seed), budget_of(space, bits)
    numbers = replace(NUMBERS, changes=[])
    best, records = run(numbers.searching(EVOLUTION).make(problem_of(space, budget, toy.errors)), toy)
    values = [[w * e for e in errors] for w, errors in zip(toy.weights, toy.errors, strict=True)]
    expected = best_of_all(space.prices, budget.total, values)
    assert toy.exact(best) == pytest.approx(expected, rel=1e-9)
    assert len(records) <= 3, "one round to find it, one that finds nothing better"
    assert records[-1]["accepted"] is False and all(record["cost"] <= budget.total for record in records)


def test_a_round_asks_one_attribution_and_one_screen_and_counts_three_for_one(quant_space, budget_of) -> None:
    space = quant_space((3, 1, 1, 3, 3, 1) * 2, kinds=("q", "v", "v", "q", "q", "v") * 2)
    toy, budget = Additive(space), budget_of(space, 2.5)
    settings = NUMBERS.searching(EVOLUTION)
    _, records = run(settings.make(problem_of(space, budget, toy.errors)), toy)
    attribution, screen = toy.asked[:2]
    assert attribution == Attribution(tuple(records[0]["genome"]), 64, 8)
    proposals = records[1]["details"]["proposals"]
    assert screen == (1 + len(proposals), 32)
    assert [proposal["most_changes"] for proposal in proposals] == [None, 3], "one change alone saves nothing"
    assert all(p["changes"] <= (p["most_changes"] or len(space)) for p in proposals) and all(p["expected"] < 0 for p in proposals)
    assert records[1]["tokens"] == 3 * 64 + 32 * (1 + len(proposals))
    assert records[1]["evaluations"] == 2 + len(proposals)
    assert records[1]["switches"] == [
        [i, a, b] for i, (a, b) in enumerate(zip(records[0]["genome"], records[1]["genome"], strict=True)) if a != b
    ]
    assert records[1]["details"]["held"] == pytest.approx(toy.parts(tuple(records[0]["genome"])), abs=1e-8)
    assert records[0]["fitness"] is None and "details" not in records[0]
    spent = sum(ask.cost for ask in settings.asks())
    assert records[-1]["tokens"] <= spent == 5 * (3 * 64 + 4 * 32)


def test_where_the_free_solution_is_worse_few_changes_win(quant_space, budget_of) -> None:
    space = quant_space((1,) * 12, bits=(4, 3, 2), kinds=("q",) * 12)
    toy, budget = Additive(space), budget_of(space, 3.0)
    start = (1,) * 12

    def far_is_bad(genomes, *, tokens):
        return [
            toy.exact(genome) + (1.0 if sum(a != b for a, b in zip(genome, start, strict=True)) > 3 else 0.0) for genome in genomes
        ]

    records = []
    numbers = replace(NUMBERS, rounds=1)
    run_search(
        numbers.searching(EVOLUTION).make(problem_of(space, budget, toy.errors)),
        far_is_bad,
        attribute=toy.attribute,
        on_generation=records.append,
    )
    assert records[0].genome == start and records[1].accepted
    few = next(p for p in records[1].details["proposals"] if p["most_changes"] == 3)
    assert len(records[1].switches) == few["changes"] == 2, "one up, one down"


def test_a_tie_stays_with_the_current_genome_and_ends_the_rounds(quant_space, budget_of) -> None:
    space = quant_space((1,) * 8, bits=(4, 3, 2), kinds=("q",) * 8)
    toy, budget = Additive(space), budget_of(space, 3.0)
    strategy = NUMBERS.searching(EVOLUTION).make(problem_of(space, budget, toy.errors))
    records = []
    run_search(strategy, lambda genomes, *, tokens: [1.0] * len(genomes), attribute=toy.attribute, on_generation=records.append)
    assert [record.accepted for record in records] == [False, False]
    assert strategy.finished and strategy.parent == (1,) * 8
    assert not any(ask.times for ask in NUMBERS.searching(EVOLUTION).asks(strategy.state()))


def test_a_genome_that_cannot_be_bettered_is_not_screened(quant_space, budget_of) -> None:
    space = quant_space((1,) * 4, bits=(4, 3, 2), kinds=("q",) * 4)
    toy = Additive(space)
    toy.weights, toy.errors = np.ones(4), [[0.1, 0.2, 0.4]] * 4
    best, records = run(NUMBERS.searching(EVOLUTION).make(problem_of(space, budget_of(space, 3.0), toy.errors)), toy)
    assert best == (1,) * 4 and len(records) == 2
    assert [type(asked) for asked in toy.asked] == [Attribution]
    assert records[1]["fitness"] is None and records[1]["details"]["proposals"] == []


def test_sensitivities_are_averaged_over_the_last_rounds(quant_space, budget_of) -> None:
    space = quant_space((1,) * 12, bits=(4, 3, 2), kinds=("q",) * 12)
    toy = Additive(space, noise=0.3, interaction=3.0)
    strategy = replace(NUMBERS, averaged=2).searching(EVOLUTION).make(problem_of(space, budget_of(space, 2.5), toy.errors))
    seen = []
    run_search(strategy, toy, attribute=toy.attribute, on_generation=lambda record: seen.append(strategy.state()["sensitivities"]))
    assert [len(each) for each in seen[:3]] == [0, 1, 2]
    assert all(b[0] == a[-1] for a, b in itertools.pairwise(seen[1:]))


def test_given_starts_are_chosen_from_on_the_screen_s_tokens(quant_space, budget_of) -> None:
    space = quant_space((1,) * 8, bits=(4, 3, 2), kinds=("q",) * 8)
    toy, budget = Additive(space, seed=3), budget_of(space, 3.0)
    order = np.argsort(-toy.weights)
    start = tuple(0 if unit in order[:4] else 2 for unit in range(8))
    settings = NUMBERS.searching(EVOLUTION)
    strategy = settings.make(problem_of(space, budget, toy.errors, starts=(start,)))
    assert strategy.initial_record is None and strategy.ask() == Question(((1,) * 8, start), 32, stage=-1)
    _, records = run(strategy, toy)
    assert tuple(records[0]["genome"]) == min(((1,) * 8, start), key=toy.exact) and records[0]["fitness"] is not None
    with pytest.raises(EvoPressError, match="does not keep the budget"):
        settings.make(problem_of(space, budget, toy.errors, starts=((0,) * 8,)))


@pytest.mark.parametrize("after", [0, 4])
def test_evolution_goes_on_from_the_genome_that_was_found(quant_space, budget_of, after) -> None:
    space = quant_space((3, 1, 1, 3, 3, 1) * 2, kinds=("q", "v", "v", "q", "q", "v") * 2)
    toy, budget = Additive(space, interaction=2.0), budget_of(space, 2.5)
    settings = replace(NUMBERS, generations_after=after).searching(EVOLUTION)
    best, records = run(settings.make(problem_of(space, budget, toy.errors)), toy)
    rounds = 1 + max(record["generation"] for record in records if "details" in record)
    assert [record["generation"] for record in records] == list(range(rounds + after))
    assert all(a["tokens"] <= b["tokens"] and a["evaluations"] <= b["evaluations"] for a, b in itertools.pairwise(records))
    assert records[-1]["tokens"] == sum(3 * a.tokens if isinstance(a, Attribution) else a[0] * a[1] for a in toy.asked)
    assert toy.exact(best) <= toy.exact(tuple(records[rounds - 1]["genome"]))
    assert tuple(records[-1]["genome"]) == best


@pytest.mark.parametrize("options", [{}, {"predicted_offspring": 0.5}, {"selection": "racing"}])
def test_a_search_whose_genome_evolution_cannot_move_ends_with_it(quant_space, budget_of, caplog, options) -> None:
    space = quant_space((1, 2, 4))  # no two units of one size
    toy, budget = Additive(space), budget_of(space, 3.0)
    plain, alone = run(NUMBERS.searching(EVOLUTION).make(problem_of(space, budget, toy.errors)), toy)
    settings = replace(NUMBERS, generations_after=4, **options).searching(replace(EVOLUTION, exchange="size"))
    strategy = settings.make(problem_of(space, budget, toy.errors))
    best, records = run(strategy, toy)
    assert best == plain and len(records) == len(alone) and strategy.finished
    again = settings.make(problem_of(space, budget, toy.errors))
    again.restore(json.loads(json.dumps(strategy.state())))
    assert again.finished and again.parent == best
    assert [line.split(":")[:2] for line in caplog.messages] == [
        ["search", " it ends after its rounds, since no evolution goes on from what they found"]
    ] * 2
    assert 'exchange "size"' in caplog.text


OPTIONS = {
    "second_order_rounds": 2,
    "second_order_changes": [2, 1],
    "selection": "racing",
    "race_parts": 4,
    "delta_rounds": 2,
    "delta_tokens": 8,
    "predicted_offspring": 0.5,
}


@pytest.mark.parametrize(("options", "stop"), [*(({}, stop) for stop in range(9)), *((OPTIONS, stop) for stop in range(1, 9))])
def test_a_search_that_is_killed_after_any_generation_ends_with_the_same_genome(quant_space, budget_of, options, stop) -> None:
    space = quant_space((3, 1, 1, 3, 3, 1) * 2, kinds=("q", "v", "v", "q", "q", "v") * 2)
    budget, settings = budget_of(space, 2.5), replace(NUMBERS, generations_after=4, **options).searching(EVOLUTION)
    toy = Additive(space, noise=0.2, interaction=2.0)
    whole, records = run(settings.make(problem_of(space, budget, toy.errors)), toy)
    assert len(records) > 6

    again, states = Additive(space, noise=0.2, interaction=2.0), []
    cut = settings.make(problem_of(space, budget, toy.errors))

    def stopping(record):
        states.append((record.generation, cut.state(), again.rng.bit_generator.state))
        if record.generation == min(stop, len(records) - 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_search(cut, again, attribute=again.attribute, on_generation=stopping)
    generation, state, noise = states[-1]
    later = settings.make(problem_of(space, budget, toy.errors, seed=7))
    later.restore(json.loads(json.dumps(state)))
    third = Additive(space, noise=0.2, interaction=2.0)
    third.rng.bit_generator.state = noise
    best, rest = run(later, third)
    assert best == whole and rest == records[generation + 1 :]
    left = sum(ask.cost_where(modules=False, units=len(space)) for ask in settings.asks(state))
    assert left >= records[-1]["tokens"] - records[generation]["tokens"]


def test_a_finished_search_goes_on_when_more_is_asked_for(quant_space, budget_of) -> None:
    space = quant_space((3, 1, 1, 3, 3, 1) * 2, kinds=("q", "v", "v", "q", "q", "v") * 2)
    toy, budget = Additive(space, interaction=2.0), budget_of(space, 2.5)
    short = replace(NUMBERS, rounds=1).searching(EVOLUTION).make(problem_of(space, budget, toy.errors))
    run(short, toy)
    longer = replace(NUMBERS, rounds=3, generations_after=2).searching(EVOLUTION)
    strategy = longer.make(problem_of(space, budget, toy.errors))
    strategy.restore(json.loads(json.dumps(short.state())))
    assert strategy.generation == 2 and not strategy.finished
    _, records = run(strategy, toy)
    assert records[-1]["generation"] >= 4

    with pytest.raises(EvoPressError, match=r"screen_tokens 32 there, 16 here"):
        replace(NUMBERS, screen_tokens=16).searching(EVOLUTION).make(problem_of(space, budget, toy.errors)).restore(short.state())


def test_rounds_of_every_kind_are_gone_on_with_and_the_plan_says_how_many(quant_space, budget_of) -> None:
    space = quant_space((3, 1, 1, 3, 3, 1) * 2, kinds=("q", "v", "v", "q", "q", "v") * 2)
    toy, budget = Additive(space, noise=0.2, interaction=2.0), budget_of(space, 2.5)
    numbers = replace(NUMBERS, rounds=1, second_order_rounds=1, second_order_changes=[2], delta_rounds=1, delta_tokens=8)
    short = numbers.searching(EVOLUTION).make(problem_of(space, budget, toy.errors))
    _, records = run(short, toy)
    assert [set(record.get("details", {})) & {"held", "second_order", "deltas"} for record in records[1:]] == [
        {"held"},
        {"second_order"},
        {"deltas"},
    ]
    state = json.loads(json.dumps(short.state()))
    assert state["rounds"] == 3 and not state["settled"] and state["expansions"] == [1, not records[2]["accepted"]]
    assert not any(ask.times for ask in numbers.searching(EVOLUTION).asks(state))

    longer = replace(numbers, rounds=2).searching(EVOLUTION)
    strategy = longer.make(problem_of(space, budget, toy.errors))
    strategy.restore(state)
    assert isinstance(strategy.ask(), Attribution) and not isinstance(strategy.ask(), Expansion)
    assert [ask.times for ask in longer.asks(state) if ask.attribution and not ask.initial] == [1]

    with pytest.raises(ValueError, match="of its kinds more"):
        longer.make(problem_of(space, budget, toy.errors)).restore(state | {"rounds": 1})


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"rounds": -1}, "search.strategy.rounds=-1"),
        ({"attribution_sequences": 1}, "search.strategy.attribution_sequences=1"),
        ({"changes": [3, 0]}, "search.strategy.changes="),
        ({"averaged": 0}, "search.strategy.averaged=0"),
        ({"selection": "best"}, "search.strategy.selection=best is unknown: choose one of mean, racing"),
        ({"second_order_rounds": -1}, "search.strategy.second_order_rounds=-1"),
        ({"second_order_tokens": 3}, "search.strategy.second_order_tokens=3"),
        ({"second_order_changes": [0]}, "search.strategy.second_order_changes="),
        ({"second_order_rounds": 1, "rounds": 0}, "search.strategy.second_order_rounds=1 needs at least one attribution round"),
        ({"race_parts": 1}, "search.strategy.race_parts=1"),
        ({"delta_tokens": 3}, "search.strategy.delta_tokens=3"),
        ({"predicted_offspring": 1.5}, "search.strategy.predicted_offspring=1.5"),
    ],
)
def test_numbers_out_of_range_are_refused(changed, sentence) -> None:
    with pytest.raises(EvoPressError, match=sentence.replace(".", r"\.")):
        replace(NUMBERS, **changed).searching(EVOLUTION)


def test_bounds_of_evolution_are_refused() -> None:
    with pytest.raises(EvoPressError, match=r"max_level=2 .* leave them null"):
        NUMBERS.searching(replace(EVOLUTION, max_level=2))


def test_what_the_answers_lack_is_told(quant_space, budget_of) -> None:
    space = quant_space((1,) * 8, bits=(4, 3, 2), kinds=("q",) * 8)
    toy, budget, settings = Additive(space), budget_of(space, 3.0), NUMBERS.searching(EVOLUTION)
    for wrong in ([[1.0] * 8], [[1.0] * 7] * 3, [[float("nan")] * 8] * 3):
        strategy = settings.make(problem_of(space, budget, toy.errors))
        strategy.ask()
        with pytest.raises(EvoPressError, match="the attribution returned"):
            strategy.tell(wrong)
    strategy = settings.make(problem_of(space, budget, toy.errors))
    strategy.tell(toy.attribute(strategy.ask()))
    with pytest.raises(EvoPressError, match="returned 1 numbers for"):
        strategy.tell([1.0])
    with pytest.raises(EvoPressError, match="not a finite number"):
        strategy.tell([float("nan")] * len(strategy.ask().genomes))
    with pytest.raises(EvoPressError, match="there are errors of 0 units but 8 units"):
        settings.make(problem_of(space, budget, ()))
    with pytest.raises(EvoPressError, match=r"the errors of blocks\.2\.q are .* use search/strategy=evolution"):
        settings.make(problem_of(space, budget, [*toy.errors[:2], [1.0, float("nan"), 1.0], *toy.errors[3:]]))


def test_a_proposal_that_is_not_finite_loses_and_is_counted(quant_space, budget_of) -> None:
    space = quant_space((1,) * 12, bits=(4, 3, 2), kinds=("q",) * 12)
    toy, budget = Additive(space), budget_of(space, 3.0)
    strategy = replace(NUMBERS, rounds=1).searching(EVOLUTION).make(problem_of(space, budget, toy.errors))
    strategy.tell(toy.attribute(strategy.ask()))
    values = [2.0, float("nan"), *[1.0] * (len(strategy.ask().genomes) - 2)]
    chosen = strategy.ask().genomes[2]
    record = strategy.tell(values)
    assert (record.genome, record.non_finite, strategy.non_finite) == (chosen, 1, 1)


@pytest.mark.parametrize("seed", range(3))
def test_measured_neighbours_find_what_attributions_do_not_see(quant_space, budget_of, seed) -> None:
    space = quant_space((1,) * 8, bits=(4, 3, 2), kinds=("q",) * 8)
    toy, budget = Additive(space, seed=seed), budget_of(space, 3.0)
    settings = replace(NUMBERS, delta_rounds=3, delta_tokens=8).searching(EVOLUTION)
    strategy = settings.make(problem_of(space, budget, toy.errors))
    records: list[dict] = []
    run_search(
        strategy,
        toy,
        attribute=lambda question: [[0.2] * 8] * 4,  # sees nothing
        on_generation=lambda record: records.append(record.to_dict()),
    )
    measured = [record for record in records if "deltas" in record.get("details", {})]
    before = records[measured[0]["generation"] - 1]["genome"]
    assert measured[0]["accepted"] and toy.exact(tuple(measured[-1]["genome"])) < toy.exact(tuple(before))
    assert len(measured[0]["details"]["deltas"]) == sum(1 + (level == 1) for level in before)
    assert strategy.finished and all(record["cost"] <= budget.total for record in records)
    assert records[-1]["tokens"] <= sum(ask.cost_where(modules=False, units=8) for ask in settings.asks())


@pytest.mark.parametrize("seed", range(3))
def test_rounds_of_second_order_find_what_attributions_do_not_see(quant_space, budget_of, seed) -> None:
    space = quant_space((1,) * 8, bits=(4, 3, 2), kinds=("q",) * 8)
    toy, budget = Additive(space, seed=seed), budget_of(space, 3.0)
    settings = replace(NUMBERS, second_order_rounds=3, second_order_changes=[8, 2]).searching(EVOLUTION)
    strategy = settings.make(problem_of(space, budget, toy.errors))

    def blind(question):
        return toy.attribute(question) if isinstance(question, Expansion) else [[0.2] * 8] * 4

    records: list[dict] = []
    run_search(strategy, toy, attribute=blind, on_generation=lambda record: records.append(record.to_dict()))
    expanded = [record for record in records if record.get("details", {}).get("second_order")]
    asked = [question for question in toy.asked if isinstance(question, Expansion)]
    assert len(expanded) == len(asked) >= 2 and asked[0] == Expansion(asked[0].genome, 128, 16)
    assert expanded[0]["accepted"] and not expanded[-1]["accepted"]
    values = [[w * e for e in errors] for w, errors in zip(toy.weights, toy.errors, strict=True)]
    assert toy.exact(tuple(expanded[-1]["genome"])) == pytest.approx(best_of_all(space.prices, budget.total, values), rel=1e-9)
    spent = expanded[0]["tokens"] - records[expanded[0]["generation"] - 1]["tokens"]
    assert spent == 5 * 128 + 32 * expanded[0]["stages"][0]["num_candidates"]
    assert records[-1]["tokens"] <= sum(ask.cost_where(modules=False, units=8) for ask in settings.asks())


def test_an_expansion_that_is_not_one_is_told(quant_space, budget_of) -> None:
    space = quant_space((1,) * 8, bits=(4, 3, 2), kinds=("q",) * 8)
    toy, budget = Additive(space), budget_of(space, 3.0)
    strategy = replace(NUMBERS, second_order_rounds=1).searching(EVOLUTION).make(problem_of(space, budget, toy.errors))
    while not isinstance(question := strategy.ask(), Expansion):
        strategy.tell(toy(question.genomes, tokens=1) if isinstance(question, Question) else toy.attribute(question))
    for wrong in ([[[0.0] * 3] * 8], [[[0.0] * 2] * 8] * 2, [[[math.inf] * 3] * 8] * 2):
        with pytest.raises(EvoPressError, match="the expansion returned"):
            strategy.tell(wrong)


def test_races_end_as_well_and_cost_no_more(quant_space, budget_of) -> None:
    space = quant_space((3, 1, 1, 3, 3, 1) * 2, kinds=("q", "v", "v", "q", "q", "v") * 2)
    budget, ends = budget_of(space, 2.5), []
    for options in ({}, {"selection": "racing"}):
        toy = Additive(space, interaction=2.0)
        settings = replace(NUMBERS, generations_after=3, screen_tokens=64, **options).searching(EVOLUTION)
        best, records = run(settings.make(problem_of(space, budget, toy.errors)), toy)
        ends.append((toy.exact(best), records[-1]["tokens"]))
        raced = [record for record in records if "race" in record.get("details", {})]
        assert bool(raced) is bool(options)
        for record in raced:
            parts = record["details"]["race"]["parts"]
            assert len(parts) == record["stages"][0]["num_candidates"] and max(parts) >= 3
            assert record["fitness"] <= record["parent_fitness"]
    assert ends[1][0] == pytest.approx(ends[0][0], rel=0.05) and ends[1][1] < ends[0][1]


class WithModules:
    """Additive, where what lies in a dropped module counts for nothing, and the module for what it loses."""

    def __init__(self, space: Space, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.space, self.asked = space, []
        self.modules = [is_module(unit) for unit in space.units]
        self.errors = [
            [0.0, 0.0][: len(unit.levels)] if module else [0.01, 0.1, 0.5]
            for module, unit in zip(self.modules, space.units, strict=True)
        ]
        self.weights = rng.lognormal(size=len(space)) * np.where(self.modules, 2.0, 1.0)

    def parts(self, genome: Genome) -> list[float]:
        return [
            0.0 if self.space.is_gone(genome, u) else self.weights[u] * (level if module else self.errors[u][level])
            for u, (module, level) in enumerate(zip(self.modules, genome, strict=True))
        ]

    def __call__(self, genomes, *, tokens):
        return [sum(self.parts(genome)) for genome in genomes]

    def attribute(self, question: Attribution) -> list[list[float]]:
        self.asked.append(question.genome)
        held = self.parts(question.genome)
        for unit in np.flatnonzero(self.modules):
            inside = sum(held[u] for u, module in enumerate(self.space.inside) if module == unit)
            held[unit] = self.weights[unit] - inside  # what dropping it adds from here on
        return [[2 * value for value in held]] * 4

    def best(self, budget: Budget) -> float:
        genomes = itertools.product(*(range(len(unit.levels)) for unit in self.space.units))
        return min(sum(self.parts(genome)) for genome in genomes if budget.met_by(self.space, genome))


@pytest.mark.parametrize("total", [8, 11, 14, 18])
@pytest.mark.parametrize("seed", range(3))
def test_modules_are_dropped_and_taken_back_beside_weights(joint_space, seed, total) -> None:
    toy, budget = WithModules(joint_space, seed), Budget(total, total / 5, "bits per weight")
    best, records = run(NUMBERS.searching(EVOLUTION).make(problem_of(joint_space, budget, toy.errors)), toy)
    assert all(record["cost"] <= total for record in records)
    assert sum(toy.parts(best)) == pytest.approx(toy.best(budget), rel=1e-9)
    if total < 10:
        assert toy.asked[0] == (0, 0, 2, 2, 2, 2, 2), "none with all modules keeps the budget"
    assert [bool(value) for value in records[1]["details"]["dropping"][:2]] == [not level for level in records[0]["genome"][:2]]


def test_a_search_that_came_down_to_its_budget_goes_on_from_there_when_it_is_killed(joint_space) -> None:
    toy, budget, settings = WithModules(joint_space, 0), Budget(8, 1.6, "bits per weight"), NUMBERS.searching(EVOLUTION)
    strategy, states = settings.make(problem_of(joint_space, budget, toy.errors)), []
    best = run_search(strategy, toy, attribute=toy.attribute, on_generation=lambda record: states.append(strategy.state()))
    asked, toy.asked = toy.asked, []
    later = settings.make(problem_of(joint_space, budget, toy.errors))
    later.restore(json.loads(json.dumps(states[0])))
    assert run(later, toy)[0] == best
    assert asked[0] == (0, 0, 2, 2, 2, 2, 2) and toy.asked == asked[-len(toy.asked) :] and asked[0] not in toy.asked


def without_dropping(space: Space, units) -> Space:
    """Return a space in which some modules must stay."""
    return replace(
        space,
        units=tuple(replace(unit, levels=unit.levels[:1]) if i in units else unit for i, unit in enumerate(space.units)),
    )


@pytest.mark.parametrize("total", [11, 14, 18])
def test_a_module_that_must_stay_holds_nothing_beside_weights(joint_space, total) -> None:
    space = without_dropping(joint_space, [0])
    toy, budget = WithModules(space, 0), Budget(total, total / 5, "bits per weight")
    best, records = run(NUMBERS.searching(EVOLUTION).make(problem_of(space, budget, toy.errors)), toy)
    assert sum(toy.parts(best)) == pytest.approx(toy.best(budget), rel=1e-9)
    asked = [record["details"] for record in records if "held" in record.get("details", {})]
    assert asked and all(details["held"][0] == 0 < details["dropping"][0] for details in asked), "what dropping would add is apart"


def depth_space(count: int) -> Space:
    levels = (Level("keep", 1, "keep", 32, "drop"), Level("drop", 0, "drop", 0, "drop"))
    return Space(
        "drop", tuple(Unit(f"blocks.{i}.{kind}", i, kind, 1, levels) for i in range(count) for kind in ("attention", "mlp"))
    )


@pytest.mark.parametrize(("approach", "measured", "rounds"), [(1, 0, 3), (3, 0, 3), (1, 64, 3), (3, 64, 0)])
def test_what_holds_least_is_dropped_of_each_kind(approach, measured, rounds) -> None:
    space = depth_space(6)
    toy = WithModules(space, 1)
    budget = Budget(6, 0.5, "depth sparsity", (Limit(3, kind="attention"), Limit(3, kind="mlp")))
    settings = replace(NUMBERS, approach=approach, approach_tokens=measured, rounds=rounds).searching(EVOLUTION)
    best, records = run(settings.make(problem_of(space, budget, ())), toy)
    for kind in (0, 1):
        order = np.argsort(toy.weights[kind::2])
        assert [u for u in range(6) if best[2 * u + kind]] == sorted(order[:3].tolist())
    if measured:
        assert records[0]["tokens"] == approach * 64 * 13, "every module, dropped or taken back, beside the model itself"
        return
    assert records[0]["generation"] == 0 and records[0]["tokens"] == approach * 5 * 64
    assert toy.asked[0] == (0,) * 12 and sum(toy.asked[1]) == (6 if approach == 1 else 2)
    assert tuple(records[0]["genome"]) == best and not records[-1]["accepted"]
    assert records[-1]["tokens"] <= sum(ask.cost_where(modules=True) for ask in settings.asks())
    assert not any(ask.initial and ask.times for ask in settings.asks({"rounds": 0, "evolution": None, "settled": False}))


@pytest.mark.parametrize("measured", [0, 64])
@pytest.mark.parametrize("kind", ["module", "block", "pair", "expert"])
def test_modules_that_must_stay_are_left_and_the_best_of_the_others_found(kind, measured) -> None:
    space = depth_space(6)
    if kind != "module":
        space = replace(space, units=tuple(replace(unit, kind=kind, name=f"{i}.{kind}.0") for i, unit in enumerate(space.units)))
    toy = WithModules(space, 1)
    least = np.argsort(toy.weights)[:2].tolist()
    space = toy.space = without_dropping(space, least)
    budget = Budget(8, 1 / 3, "depth sparsity")
    settings = replace(NUMBERS, approach_tokens=measured).searching(EVOLUTION)
    best, records = run(settings.make(problem_of(space, budget, ())), toy)
    assert sum(best) == 4 and not any(best[unit] for unit in least)
    assert sum(toy.parts(best)) == pytest.approx(toy.best(budget), rel=1e-9)
    assert all(record["details"]["held"][unit] == 0 for record in records if "held" in record["details"] for unit in least)


def test_modules_are_told_apart_beside_one_that_holds_nearly_all() -> None:
    space = depth_space(8)
    toy = WithModules(space, 1)
    toy.weights = np.where(np.arange(16) // 2 == 0, 1e3, toy.weights)
    budget = Budget(8, 0.5, "depth sparsity", (Limit(4, kind="attention"), Limit(4, kind="mlp")))
    best, _ = run(replace(NUMBERS, rounds=1).searching(EVOLUTION).make(problem_of(space, budget, ())), toy)
    assert sum(toy.parts(best)) == pytest.approx(toy.best(budget), rel=1e-9)


def test_without_a_round_modules_are_dropped_as_evolution_does() -> None:
    space = depth_space(4)
    toy, budget = WithModules(space, 0), Budget(6, 0.25, "depth sparsity", (Limit(3, kind="attention"), Limit(3, kind="mlp")))
    strategy = replace(NUMBERS, rounds=0).searching(replace(EVOLUTION, exchange="name")).make(problem_of(space, budget, ()))
    question = strategy.ask()
    assert isinstance(question, Question) and all(sum(genome) == 2 for genome in question.genomes)
    run(strategy, toy)
    assert strategy.finished and not toy.asked
