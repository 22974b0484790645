"""The archive: the same bits as without it, nothing of another context, and a file that damage and other runs leave usable."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from evopress.data.minibatch import Minibatch
from evopress.fitness.archive import Archive
from evopress.fitness.measures import KLDivergence
from evopress.fitness.minibatch import MinibatchFitness, base_states
from evopress.fitness.plain import PlainEvaluator
from evopress.fitness.population import Evaluator, PopulationEvaluator
from evopress.levels.live import LiveModel
from evopress.units import Genome

ABOUT = {"model": "tiny"}
MINIBATCH = Minibatch((3, 1), (4, 4))


@pytest.fixture(scope="module")
def live(live_model: Callable[..., LiveModel]) -> LiveModel:
    return live_model("llama", num_blocks=4)


@pytest.fixture(scope="module")
def sequences(tokens: Callable[..., Tensor]) -> Tensor:
    return tokens(12, 16, seed=3)


@pytest.fixture(scope="module")
def base(live: LiveModel, sequences: Tensor) -> Tensor:
    return base_states(PopulationEvaluator(live), sequences, batch_tokens=48)


@pytest.fixture(scope="module")
def genomes(live: LiveModel) -> list[Genome]:
    rng = np.random.default_rng(0)
    return [tuple(rng.integers(3, size=len(live.space)).tolist()) for _ in range(5)]


@pytest.fixture
def fitness(live: LiveModel, sequences: Tensor, base: Tensor, tmp_path: Path) -> Callable[..., MinibatchFitness]:
    """Return a fitness whose minibatches are always the same, with the archive in `tmp_path` as it then is, or without one."""

    def make(*, in_flight: int, archived: bool = True, evaluator: Evaluator | None = None) -> MinibatchFitness:
        archive = Archive(tmp_path / "archive.jsonl", ABOUT, [3] * len(live.space)) if archived else None
        evaluator = evaluator or PopulationEvaluator(live, max_tokens_in_flight=in_flight)
        rng = np.random.default_rng(1)
        return MinibatchFitness(evaluator, sequences, base=base, rng=rng, measure=KLDivergence(), archive=archive)

    return make


def computed(fitness: MinibatchFitness) -> int:
    return fitness.evaluator.num_block_tokens


@pytest.mark.parametrize("plain", [False, True])
def test_a_genome_measured_apart_is_taken_from_among_others_to_the_bit(live, fitness, genomes, plain) -> None:
    """100 tokens are six sequences and four tokens of another; a forward has room for one sequence."""
    options = {"in_flight": 5, "evaluator": PlainEvaluator(live, max_tokens_in_flight=40) if plain else None}
    fitness(**options)(genomes[:3], tokens=100)
    later, alone = fitness(**options), fitness(**options, archived=False)
    for those in (genomes[2:], [genomes[4], genomes[0], genomes[4]], genomes):
        later.rng, alone.rng = np.random.default_rng(1), np.random.default_rng(1)
        before = 0 if plain else computed(later)
        assert later(those, tokens=100) == alone(those, tokens=100)
        assert later.rng.bit_generator.state == alone.rng.bit_generator.state
    assert plain or computed(later) == before, "the last ones were all there"


def test_where_genomes_share_a_forward_a_whole_question_must_be_the_same(fitness, genomes) -> None:
    first = fitness(in_flight=256)(genomes, tokens=64)
    later = fitness(in_flight=256)
    assert later(genomes, tokens=64) == first and computed(later) == 0
    for other in (genomes[:4], genomes[::-1]):
        later.rng = np.random.default_rng(1)
        before = computed(later)
        assert later(other, tokens=64) == fitness(in_flight=256, archived=False)(other, tokens=64)
        assert computed(later) > before
    before = computed(later)
    later(genomes, tokens=64)
    assert computed(later) > before, "another minibatch"


def test_what_units_hold_is_kept_too(fitness, genomes) -> None:
    first = fitness(in_flight=64).attribute(genomes[0], tokens=64, sequences=4)
    later = fitness(in_flight=64)
    later.base = None  # would be needed
    assert later.attribute(genomes[0], tokens=64, sequences=4) == first
    assert fitness(in_flight=64, archived=False).attribute(genomes[0], tokens=64, sequences=4) == first


def test_what_units_hold_is_of_the_random_numbers_that_were_drawn_for_it(tmp_path: Path) -> None:
    archive = Archive(tmp_path / "archive.jsonl", ABOUT, [3, 3])
    draws = [np.array([0.25, 0.5]), np.array([0.25, 0.75]), None]
    for number, drawn in enumerate(draws):
        assert (
            archive.attribution((0, 1), [2, 0], 8, lambda number=number: np.full((2, 2), number + 0.1), drawn=drawn)[0, 0]
            == number + 0.1
        )
    again = Archive(tmp_path / "archive.jsonl", ABOUT, [3, 3])
    assert [again.attribution((0, 1), [2, 0], 8, lambda: np.zeros((2, 2)), drawn=drawn)[0, 0] for drawn in draws] == [0.1, 1.1, 2.1]


def value_of(genome: Genome) -> float:
    return sum(genome) / 3


def measuring(seen: list[Genome]) -> Callable[..., list[float]]:
    return lambda those: seen.extend(those) or [value_of(genome) for genome in those]


def ask(archive: Archive, *genomes: Genome, minibatch: Minibatch = MINIBATCH) -> list[Genome]:
    """Ask for genomes, and return those that were measured for it."""
    seen: list[Genome] = []
    assert archive.fitnesses(genomes, minibatch, alone=True, measure=measuring(seen)) == [value_of(genome) for genome in genomes]
    return seen


def test_nothing_is_taken_from_another_context_minibatch_or_space(tmp_path: Path) -> None:
    path = tmp_path / "archive.jsonl"
    ask(Archive(path, ABOUT, [3, 3]), (0, 1), (2, 2))
    again = Archive(path, ABOUT, [3, 3])
    assert ask(again, (2, 2), (0, 1), (0, 1)) == []
    for other in (Minibatch((1, 3), (4, 4)), Minibatch((3,), (4,)), Minibatch((3, 1), (4, 3))):
        assert ask(again, (0, 1), minibatch=other) == [(0, 1)]
    assert ask(Archive(path, {"model": "other"}, [3, 3]), (0, 1)) == [(0, 1)]
    for _ in range(2):
        assert ask(again, (0, 5)) == [(0, 5)], "a level of another database, which a baseline brought"


def test_numbers_that_are_not_finite_are_measured_again(tmp_path: Path) -> None:
    archive = Archive(tmp_path / "archive.jsonl", ABOUT, [3, 3])
    for _ in range(2):
        seen: list[Any] = []

        def measure(those: Any, seen: list[Any] = seen) -> list[float]:
            seen.extend(those)
            return [float("nan") if genome == (0, 0) else 1.0 for genome in those]

        values = archive.fitnesses([(0, 0), (1, 1)], MINIBATCH, alone=True, measure=measure)
        assert np.isnan(values[0]) and values[1] == 1.0 and (0, 0) in seen


def test_damaged_lines_are_skipped_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "archive.jsonl"
    archive = Archive(path, ABOUT, [3, 3])
    for genome in ((0, 0), (1, 1), (2, 2)):
        ask(archive, genome)
    lines = path.read_text().splitlines()
    lines[0] = lines[0].replace('"fitnesses":[0.0]', '"fitnesses":[9.0]')
    path.write_text("\n".join([*lines[:2], lines[2][:30]]))  # one line changed, one cut off
    with caplog.at_level(logging.WARNING):
        again = Archive(path, ABOUT, [3, 3])
    assert "2 damaged lines of" in caplog.text
    assert ask(again, (0, 0), (1, 1), (2, 2)) == [(0, 0), (2, 2)]
    assert ask(Archive(path, ABOUT, [3, 3]), (0, 0), (1, 1), (2, 2)) == [], "what is added stands on a line of its own"


def test_several_runs_may_add_at_once(tmp_path: Path) -> None:
    path = tmp_path / "archive.jsonl"
    runs = [Archive(path, ABOUT, [50, 50]) for _ in range(4)]

    def work(number: int) -> None:
        for level in range(25):
            ask(runs[number], (number, level))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert len(path.read_text().splitlines()) == 100
    assert ask(Archive(path, ABOUT, [50, 50]), *((number, level) for number in range(4) for level in range(25))) == []


def test_a_folder_that_cannot_be_written_to_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "archive.jsonl").mkdir()
    archive = Archive(tmp_path / "archive.jsonl", ABOUT, [3, 3])
    assert ask(archive, (0, 1)) == [(0, 1)] and ask(archive, (0, 1)) == []
    assert caplog.text.count("is left alone") == 1
