"""Scores by gradients: as by the whole model's own, one sequence after the other."""

from __future__ import annotations

import pytest
import torch
from gradients_literal import first_order_plainly, fisher_plainly

from evopress.fitness.gradients import first_order, fisher, gradient_scores
from evopress.fitness.minibatch import base_states
from evopress.fitness.population import PopulationEvaluator


@pytest.fixture(scope="module")
def case(live_model, tokens):
    live, ids = live_model("llama", num_blocks=2), tokens(3, 12, seed=5)
    return live, ids, base_states(PopulationEvaluator(live), ids, batch_tokens=48)


def test_first_order_scores_are_those_of_the_gradient_of_all_sequences(case, weights_digest) -> None:
    live, ids, base = case
    genome, before = tuple((1 + 2 * i) % 3 for i in range(len(live.space))), weights_digest(live.blocks.model)
    (found,) = gradient_scores(live, genome, [genome], ids, base, first_order, chunk_tokens=7).tolist()
    assert found == pytest.approx(first_order_plainly(live, genome, ids), rel=2e-4)
    assert weights_digest(live.blocks.model) == before and min(found) > 0


def test_fisher_scores_of_all_levels_come_of_one_pass_through_the_dense_model(case) -> None:
    live, ids, base = case
    genomes = [(level,) * len(live.space) for level in range(3)]
    found = gradient_scores(live, None, genomes, ids, base, fisher) * (ids.shape[1] - 1)
    for genome, scores in zip(genomes, found.tolist(), strict=True):
        assert scores == pytest.approx(fisher_plainly(live, genome, ids), rel=2e-4)
    apart = sum(gradient_scores(live, None, genomes, ids[[i]], base[[i]], fisher) for i in range(3))
    assert torch.allclose(apart * (ids.shape[1] - 1), found, rtol=1e-4)
