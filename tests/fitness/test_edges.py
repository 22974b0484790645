"""Boundaries of measuring at which one place off would go unseen elsewhere: found by changing lines one at a time."""

from __future__ import annotations

import math

import numpy as np
import torch

from evopress.data.minibatch import Minibatch
from evopress.fitness import archive as archive_module
from evopress.fitness.archive import Archive
from evopress.fitness.measures import KLDivergence, NegativeLogLikelihood
from evopress.fitness.minibatch import MinibatchFitness
from evopress.fitness.population import PopulationEvaluator, measure_parts, measure_sequences
from evopress.levels.refine import is_better


def test_a_perplexity_that_no_number_holds_is_infinite():
    class Told:
        def fitnesses(self, genomes, minibatch, *, alone, measure):
            return [800.0, 1.0]

    class Alone:
        def alone(self, num_sequences, length):
            return True

    text, base, rng = torch.zeros(4, 8, dtype=torch.int64), torch.zeros(4, 8, 2), np.random.default_rng(0)
    fitness = MinibatchFitness(Alone(), text, rng=rng, base=base, measure=NegativeLogLikelihood(), archive=Told())
    assert fitness([(0,), (1,)], tokens=8) == [math.inf, math.e]


def test_levels_beyond_those_of_the_database_are_not_archived(tmp_path):
    archive, asked = Archive(tmp_path / "archive.jsonl", {}, [3, 3]), []
    for _ in range(2):
        archive.fitnesses([(3, 0)], Minibatch((3, 1), (4, 4)), alone=True, measure=lambda those: asked.append(those) or [1.0])
    assert len(asked) == 2 and not (tmp_path / "archive.jsonl").exists()


def test_an_archive_stays_below_its_greatest_size(tmp_path, monkeypatch):
    path = tmp_path / "archive.jsonl"

    def ask(genome):
        Archive(path, {}, [3]).fitnesses([genome], Minibatch((3, 1), (4, 4)), alone=True, measure=lambda those: [1.0])

    ask((0,))
    size = path.stat().st_size
    monkeypatch.setattr(archive_module, "_MOST_BYTES", size + 10)
    ask((1,))
    assert path.stat().st_size == size


def test_two_genomes_that_share_a_forward_are_not_alone(live_model):
    live = live_model("llama", num_blocks=2)
    assert PopulationEvaluator(live, max_tokens_in_flight=63).alone(2, 16)
    assert not PopulationEvaluator(live, max_tokens_in_flight=64).alone(2, 16)


def test_chunks_end_where_parts_do(live_model, tokens):
    live, ids = live_model("llama", num_blocks=2), tokens(4, 16, seed=3)
    evaluator = PopulationEvaluator(live)
    genomes = [(1,) * len(live.space), (2,) * len(live.space)]
    base = evaluator.final_states([None], ids)[1][0]
    parts = measure_parts(evaluator, genomes, ids, base, KLDivergence(), chunk_tokens=7, apart=2)
    alone = measure_sequences(evaluator, genomes, ids, base, KLDivergence())
    expected = torch.stack([alone[:, 0, :2].sum(-1), alone[:, 0, 2:].sum(-1)])
    torch.testing.assert_close(parts[:, :, 0], expected, rtol=1e-4, atol=1e-6)


def test_weights_that_make_no_number_never_stay():
    for before in (None, math.nan, math.inf):
        assert not is_better(math.nan, before) and not is_better(math.inf, before) and is_better(1.0, before)
