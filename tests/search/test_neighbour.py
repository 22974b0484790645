"""Beginning from what was found at another budget: the genome moved, and the sensitivities that go with it."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from evopress.search.evolution import SearchSettings
from evopress.search.guided_settings import GuidedStrategy
from evopress.search.neighbour import genomes_from_neighbour, moved
from evopress.search.strategy import Attribution, Neighbour, Problem, Question, run_search
from evopress.units import Budget, Level, Limit, Space, Unit

EVOLUTION = SearchSettings(2, 4, [1], [8], 3, 8, 3, "min_uniform", "any")


def problem_of(space, budget, errors, neighbour=None, *, seed: int = 0) -> Problem:
    rng_initial, rng_mutation = np.random.default_rng(seed).spawn(2)
    return Problem(space, budget, errors, rng_initial=rng_initial, rng_mutation=rng_mutation, neighbour=neighbour)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("bits", [2.5, 3.5])
def test_a_genome_is_moved_by_the_least_that_its_units_lose_or_the_most_that_they_gain(quant_space, budget_of, seed, bits) -> None:
    space, budget = quant_space((2, 1, 1, 2, 3), bits=(4, 3, 2)), None
    budget = budget_of(space, bits)
    rng = np.random.default_rng(seed)
    values = [np.sort(rng.uniform(size=3)).tolist() for _ in range(5)]
    genome = (1, 0, 2, 1, 1)
    down = space.cost(genome) > budget.total
    legal = [
        other
        for other in itertools.product(range(3), repeat=5)
        if budget.met_by(space, other) and all(b >= a if down else b <= a for a, b in zip(genome, other, strict=True))
    ]
    found = moved(space, budget, genome, values)
    total = lambda genome: sum(of_unit[level] for of_unit, level in zip(values, genome, strict=True))  # noqa: E731
    assert found in legal and total(found) == pytest.approx(min(map(total, legal)))


def test_modules_are_dropped_and_taken_back_at_random_within_every_limit() -> None:
    keep = (Level("keep", 1, "keep", 0, "drop"), Level("drop", 0, "drop", 0, "drop"))
    units = tuple(Unit(f"blocks.{i}.{kind}", i, kind, 1, keep) for i in range(6) for kind in ("attention", "mlp"))
    space = Space("drop", units)
    genome = tuple(int(i in (4, 7)) for i in range(12))
    for kept in (5, 3, 6):
        budget = Budget(2 * kept, 0.5, "depth sparsity", tuple(Limit(kept, kind=kind) for kind in ("attention", "mlp")))
        found = genomes_from_neighbour(problem_of(space, budget, (), Neighbour(genome)))
        assert found and all(budget.met_by(space, each) and space.cost(each) == budget.total for each in found)
        if kept == 3:
            assert len(found) > 1 and all(each[4] and each[7] for each in found), "what was dropped stays dropped"
        assert (found == (genome,)) is (kept == 5)


def test_evolution_begins_from_it_too(quant_space, budget_of) -> None:
    space = quant_space((1,) * 6, bits=(4, 3, 2))
    errors = [[0.1, 0.2, 0.4]] * 5 + [[0.1, 0.5, 2.0]]
    neighbour = Neighbour((0, 0, 0, 1, 1, 0))
    question = EVOLUTION.make(problem_of(space, budget_of(space, 3.0), errors, neighbour)).ask()
    assert isinstance(question, Question) and question.stage == -1
    assert question.genomes[0] == (1,) * 6 and question.genomes[1][5] == 0 and len(question.genomes) == 2


def test_the_guided_search_takes_sensitivities_over_and_averages_them_with_its_own(quant_space, budget_of) -> None:
    space = quant_space((1,) * 8, bits=(4, 3, 2), kinds=("q",) * 8)
    errors = [[0.02, 0.08, 0.3]] * 8
    weights = np.array([1.0, 2, 4, 8, 16, 32, 64, 128])
    settings = GuidedStrategy(rounds=1, attribution_tokens=64, attribution_sequences=8, screen_tokens=32, changes=[3]).searching(
        EVOLUTION
    )
    learnt = {"sensitivities": [weights.tolist(), (4 * weights).tolist()]}
    neighbour = Neighbour((2, 2, 2, 1, 0, 0, 0, 0), learnt)
    budget = budget_of(space, 3.0)
    strategy = settings.make(problem_of(space, budget, errors, neighbour))
    question = strategy.ask()
    best = (2, 2, 2, 1, 1, 0, 0, 0)
    assert question.genomes == ((1,) * 8, best), "uniform, and both of the others are the same one here"
    assert strategy.tell([2.0, 1.0]).genome == best
    state = strategy.state()
    assert np.allclose(state["sensitivities"], [2 * weights])
    asked = strategy.ask()
    assert isinstance(asked, Attribution)
    strategy.tell([[0.1] * 8] * 8)
    if not strategy.finished:
        strategy.tell([1.0] * len(strategy.ask().genomes))
    assert len(strategy.state()["sensitivities"]) == 2

    again = settings.make(problem_of(space, budget, errors))
    again.restore(state)  # goes on without the neighbour
    assert again.ask() == asked
    plain = settings.make(problem_of(space, budget, errors, replace(neighbour, state={})))
    run_search(plain, lambda genomes, *, tokens: [1.0] * len(genomes), attribute=lambda question: [[0.1] * 8] * 8)
    assert len(plain.state()["sensitivities"]) == 1


def test_modules_are_moved_by_what_dropping_them_was_found_to_add() -> None:
    keep = (Level("keep", 1, "keep", 0, "drop"), Level("drop", 0, "drop", 0, "drop"))
    space = Space("drop", tuple(Unit(f"blocks.{i}.mlp", i, "mlp", 1, keep) for i in range(6)))
    neighbour = Neighbour((0, 1, 0, 0, 0, 0), {"sensitivities": [[5.0, 1, 3, 2, 4, 6]]})
    settings = GuidedStrategy(rounds=1, attribution_tokens=64, attribution_sequences=8, screen_tokens=32).searching(EVOLUTION)
    strategy = settings.make(problem_of(space, Budget(3, 0.5, "depth sparsity"), (), neighbour))
    assert strategy.parent == (0, 1, 1, 1, 0, 0) and strategy.initial_record is not None, (
        "no way down from the whole model is needed"
    )
