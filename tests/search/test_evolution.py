import json
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from toy_search import SETTINGS

from evopress.errors import EvoPressError
from evopress.search.constraint import EXCHANGES
from evopress.search.evolution import Evolution, SearchSettings
from evopress.search.strategy import run_search
from evopress.units import Budget, Genome, Level, Limit, Space, Unit

SIZES = (8, 3, 3, 1, 1, 8, 3, 3, 1, 1, 8, 8)


def evolution_of(space: Space, budget: Budget, settings: SearchSettings = SETTINGS, seed: int = 0) -> Evolution:
    rng_initial, rng_mutation = np.random.default_rng(seed).spawn(2)
    return Evolution(space, budget, settings, rng_initial=rng_initial, rng_mutation=rng_mutation)


class Linear:
    """Each unit's error grows with its level, by a factor of its own; nothing is drawn."""

    def __init__(self, num_units: int, seed: int = 0) -> None:
        self.weights = np.random.default_rng(seed).lognormal(size=num_units)

    def __call__(self, genomes: Sequence[Genome], *, tokens: int) -> list[float]:
        return [float(self.weights @ np.array(genome)) for genome in genomes]


class Noisy(Linear):
    """The same on minibatches: noise drawn from a generator of its own, smaller with more tokens, the same for a stage."""

    def __init__(self, num_units: int, seed: int = 0) -> None:
        super().__init__(num_units, seed)
        self.rng = np.random.default_rng(seed + 1)

    def __call__(self, genomes: Sequence[Genome], *, tokens: int) -> list[float]:
        noisy = self.weights * self.rng.lognormal(sigma=tokens**-0.5, size=len(self.weights))
        return [float(noisy @ np.array(genome)) for genome in genomes]


def records_of(evolution: Evolution, fitness) -> list[dict]:
    records: list[dict] = []
    run_search(evolution, fitness, on_generation=lambda record: records.append(record.to_dict()))
    return records


@pytest.mark.parametrize("exchange", sorted(EXCHANGES))
@pytest.mark.parametrize("bits", [2.5, 4.0])
def test_the_parent_never_gets_worse_under_a_fixed_fitness(quant_space, budget_of, exchange, bits):
    space = quant_space(SIZES)
    budget, fitness = budget_of(space, bits), Linear(len(SIZES))
    for seed in range(4):
        genomes: list[Genome] = []
        settings = replace(SETTINGS, exchange=exchange)
        best = run_search(
            evolution_of(space, budget, settings, seed), fitness, on_generation=lambda r, g=genomes: g.append(r.genome)
        )
        values = fitness(genomes, tokens=1)
        assert values == sorted(values, reverse=True)
        assert values[-1] < values[0]
        assert genomes[-1] == best
        assert len(genomes) == SETTINGS.generations + 1
        assert all(space.cost(space.check(genome)) <= budget.total for genome in genomes)


@pytest.mark.parametrize("bits", [2.5, 4.0])
def test_equal_seeds_give_equal_runs_whatever_is_drawn_in_between(quant_space, budget_of, bits):
    space = quant_space(SIZES)
    budget = budget_of(space, bits)

    class Interfering(Noisy):
        def __call__(self, genomes, *, tokens):
            np.random.default_rng(9).normal(size=tokens)
            return super().__call__(genomes, tokens=tokens)

    first = records_of(evolution_of(space, budget), Noisy(len(SIZES)))
    assert first == records_of(evolution_of(space, budget), Interfering(len(SIZES)))
    assert first != records_of(evolution_of(space, budget, seed=1), Noisy(len(SIZES)))


@pytest.mark.parametrize("bits", [2.5, 4.0])
@pytest.mark.parametrize("stop", [0, 1, 5, 12])
def test_a_restored_run_goes_on_as_if_uninterrupted(quant_space, budget_of, bits, stop):
    space = quant_space(SIZES)
    budget, fitness = budget_of(space, bits), Linear(len(SIZES))
    whole = records_of(evolution_of(space, budget), fitness)

    records: list[dict] = []
    interrupted = evolution_of(space, budget)
    if interrupted.initial_record is not None:
        records.append(interrupted.initial_record.to_dict())
    while len(records) < stop:
        question = interrupted.ask()
        record = interrupted.tell(fitness(question.genomes, tokens=question.tokens))
        records += [record.to_dict()] if record else []
    state = json.loads(json.dumps(interrupted.state()))
    if not interrupted.finished:
        interrupted.ask()  # killed in the middle of a generation

    resumed = evolution_of(space, budget, seed=77)
    resumed.restore(state)
    assert records + records_of(resumed, fitness) == whole


def test_a_finished_run_is_restored_finished_and_can_be_prolonged(quant_space, budget_of):
    space = quant_space(SIZES)
    budget, fitness = budget_of(space, 2.5), Linear(len(SIZES))
    first = evolution_of(space, budget)
    records_of(first, fitness)
    again = evolution_of(space, budget, seed=1)
    again.restore(first.state())
    assert again.finished
    assert again.parent == first.parent
    longer = evolution_of(space, budget, replace(SETTINGS, generations=15))
    longer.restore(first.state())
    assert [record["generation"] for record in records_of(longer, fitness)] == [13, 14, 15]


def test_a_state_of_another_search_is_refused(quant_space, budget_of):
    space = quant_space(SIZES)
    state = evolution_of(space, budget_of(space, 2.5)).state()
    other = evolution_of(space, budget_of(space, 2.5), replace(SETTINGS, num_offspring=9))
    with pytest.raises(EvoPressError, match="num_offspring 8 there, 9 here"):
        other.restore(state)
    with pytest.raises(EvoPressError, match="budget"):
        evolution_of(space, budget_of(space, 2.75)).restore(state)
    with pytest.raises(EvoPressError, match="schema None"):
        other.restore({})
    with pytest.raises(EvoPressError, match=r"num_offspring '\\n' there") as told:
        other.restore({**state, "settings": {**state["settings"], "num_offspring": "\n"}})
    assert "\n" not in str(told.value)


def test_a_uniform_start_is_recorded_without_evaluation(quant_space, budget_of):
    space = quant_space(SIZES)
    records = records_of(evolution_of(space, budget_of(space, 4)), Linear(len(SIZES)))
    first = records[0]
    assert first["generation"] == 0
    assert first["genome"] == [2] * len(SIZES)
    assert first["fitness"] is None
    assert first["stages"] == []
    assert first["tokens"] == first["evaluations"] == 0
    assert [record["generation"] for record in records] == list(range(13))


def test_a_mixed_start_is_the_fittest_candidate(quant_space, budget_of):
    space, fitness = quant_space(SIZES), Linear(len(SIZES))
    evolution = evolution_of(space, budget_of(space, 2.5))
    question = evolution.ask()
    assert (question.stage, question.tokens, len(set(question.genomes))) == (-1, 20, 6)
    assert evolution.ask() == question  # asked again, the same question
    values = fitness(question.genomes, tokens=20)
    record = evolution.tell(values)
    assert record is not None
    assert not record.accepted
    assert record.parent_fitness is None
    assert record.switches == ()
    assert record.genome == evolution.parent == question.genomes[int(np.argmin(values))]
    assert (record.fitness, record.tokens, record.evaluations) == (min(values), 120, 6)


def test_a_generation_runs_through_its_stages(quant_space, budget_of):
    space, fitness = quant_space(SIZES), Linear(len(SIZES))
    evolution = evolution_of(space, budget_of(space, 4))
    parent = evolution.parent
    survivors: list[Genome] = []
    for stage, (tokens, candidates) in enumerate([(10, 8), (40, 4), (160, 3)]):
        question = evolution.ask()
        assert (question.stage, question.tokens, len(question.genomes)) == (stage, tokens, candidates)
        assert (parent in question.genomes) == (stage == 2)
        if stage:
            assert question.genomes[-len(survivors) :] == tuple(survivors)
        values = fitness(question.genomes, tokens=tokens)
        survivors = [question.genomes[i] for i in np.argsort(values, kind="stable")[: SETTINGS.survivors[stage]]]
        record = evolution.tell(values)
        assert (record is None) == (stage < 2)
    assert record is not None
    assert record.genome == survivors[0]
    assert record.parent_fitness == values[0]
    assert record.accepted == (record.genome != parent)
    assert record.tokens == 8 * 10 + 4 * 40 + 3 * 160
    assert record.evaluations == 15
    rebuilt = list(parent)
    for unit, before, after in record.switches:
        assert rebuilt[unit] == before
        rebuilt[unit] = after
    assert tuple(rebuilt) == record.genome
    assert record.cost == space.cost(record.genome)


@pytest.mark.parametrize("survivors", [(1, 1), (2, 1), (1,)])
def test_the_parent_joins_the_last_stage_by_position_and_wins_ties(quant_space, budget_of, survivors):
    space = quant_space(SIZES)
    settings = replace(SETTINGS, survivors=list(survivors), tokens=[8] * len(survivors), generations=3)
    evolution = evolution_of(space, budget_of(space, 4), settings)
    parent = evolution.parent
    while not evolution.finished:
        question = evolution.ask()
        assert (parent in question.genomes) == (question.stage == len(survivors) - 1)
        record = evolution.tell([1.0] * len(question.genomes))
        assert record is None or (not record.accepted and record.genome == parent and record.switches == ())


def test_nan_loses_and_nothing_but_nan_is_an_error(quant_space, budget_of):
    space = quant_space(SIZES)
    evolution = evolution_of(space, budget_of(space, 4), replace(SETTINGS, survivors=[1], tokens=[8]))
    question = evolution.ask()
    record = evolution.tell([math.nan] * 8 + [3.0])
    assert record is not None
    assert record.genome == question.genomes[8]
    assert record.accepted
    assert record.to_dict()["parent_fitness"] is None
    evolution.ask()
    with pytest.raises(EvoPressError, match=r"9 candidates in generation 2 on 8 tokens is nan"):
        evolution.tell([math.nan] * 9)


def test_a_fitness_that_loses_a_genome_is_an_error(quant_space, budget_of):
    space = quant_space(SIZES)
    evolution = evolution_of(space, budget_of(space, 4))
    evolution.ask()
    with pytest.raises(EvoPressError, match="7 numbers for 8 genomes"):
        evolution.tell([1.0] * 7)


def test_zero_generations_return_the_initial_genome(quant_space, budget_of):
    space = quant_space(SIZES)
    for bits in (2.5, 4):
        evolution = evolution_of(space, budget_of(space, bits), replace(SETTINGS, generations=0))
        assert len(records_of(evolution, Linear(len(SIZES)))) == 1
        assert evolution.finished


def test_a_space_with_fewer_offspring_than_asked_is_searched(quant_space, budget_of):
    space = quant_space((1, 1))
    evolution = evolution_of(space, budget_of(space, 4), replace(SETTINGS, max_switches=1))
    records = records_of(evolution, Linear(2))
    assert records[1]["stages"][0]["num_candidates"] == 2


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"generations": -1}, "generations=-1 is out of range"),
        ({"num_offspring": 0}, "num_offspring=0 is out of range"),
        ({"num_offspring": 3}, "4 survivors of 3 offspring"),
        ({"initial_candidates": 0}, "initial_candidates=0 is out of range"),
        ({"initial_tokens": 0}, "initial_tokens=0 is out of range"),
        ({"exchange": "sizes"}, "exchange=sizes is unknown"),
        ({"distribution": "poisson"}, "distribution=poisson is unknown"),
        ({"max_switches": 0}, "max_switches=0 is out of range"),
        ({"max_level": 0}, "max_level=0 allows no mutation"),
    ],
)
def test_settings_out_of_range_are_refused(change, sentence):
    with pytest.raises(EvoPressError, match=sentence):
        replace(SETTINGS, **change)


def test_a_budget_that_cannot_be_met_is_refused(quant_space, budget_of):
    space = quant_space(SIZES)
    with pytest.raises(EvoPressError, match="below what"):
        evolution_of(space, budget_of(space, 1.5))


def test_a_start_joins_the_initial_candidates_and_wins_if_it_is_the_fittest():
    space = Space("toy", tuple(Unit(f"u{i}", i, "u", 1, (Level("1", 1, "1", 1), Level("0", 0, "0", 0))) for i in range(12)))
    budget = Budget(6, 0.5, "kept")
    best = (0, 1) * 6
    settings = SearchSettings(0, 1, [1], [1], 4, 1, 1, "constant", "size")

    def evolution(starts):
        return Evolution(
            space, budget, settings, rng_initial=np.random.default_rng(0), rng_mutation=np.random.default_rng(1), starts=starts
        )

    def distance(genomes, *, tokens):
        return [float(sum(a != b for a, b in zip(genome, best, strict=True))) for genome in genomes]

    assert len(evolution(()).ask().genomes) == 4
    assert evolution([best]).ask().genomes[-1] == best
    assert run_search(evolution([best]), distance) == best
    with pytest.raises(EvoPressError, match="more than the budget"):
        evolution([(0,) * 12])


def test_a_start_that_breaks_the_budgets_split_is_refused():
    keep, drop = Level("keep", 1, "keep", 16), Level("drop", 0, "drop", 0)
    units = [Unit(f"{i}.{kind}", i, kind, 4, (keep, drop)) for i in range(3) for kind in ("attention", "mlp")]
    space = Space("drop", tuple(units))
    budget = Budget(4, 1 / 3, "depth sparsity", limits=(Limit(2, kind="attention"), Limit(2, kind="mlp")))
    settings = SearchSettings(3, 2, [1], [8], 2, 8, 1, "constant", "name")
    rngs = {"rng_initial": np.random.default_rng(0), "rng_mutation": np.random.default_rng(1)}
    Evolution(space, budget, settings, **rngs, starts=[(1, 0, 0, 1, 0, 0)])
    with pytest.raises(EvoPressError, match=r"limits of the budget \(2 of attention, 2 of mlp\)"):
        Evolution(space, budget, settings, **rngs, starts=[(1, 0, 1, 0, 0, 0)])
