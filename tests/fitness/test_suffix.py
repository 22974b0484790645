"""A loss measured from a block on is that of the whole model, bit for bit whatever was computed before."""

import pytest
import torch

from evopress.fitness.measures import KLDivergence
from evopress.fitness.minibatch import base_states
from evopress.fitness.population import PopulationEvaluator, measure_sums
from evopress.fitness.suffix import SuffixLoss


@pytest.fixture
def judged(live_model, tokens):
    live = live_model("llama", num_blocks=4)
    ids = tokens(6, 32, seed=5)
    evaluator = PopulationEvaluator(live, max_tokens_in_flight=64)
    base = base_states(evaluator, ids, batch_tokens=64)

    def whole(genome) -> float:
        sums, count = measure_sums(evaluator, [genome], ids, base, KLDivergence())
        return float(sums[0, 0] / count)

    def made(genome, **changes) -> SuffixLoss:
        return SuffixLoss(live, genome, ids, base=base, measure=KLDivergence(), **({"max_tokens_in_flight": 64} | changes))

    return live, whole, made


def test_without_new_weights_it_is_the_genomes(judged, weights_digest):
    live, whole, made = judged
    before = weights_digest(live.blocks.model)
    genome = tuple(i % 3 for i in range(len(live.space)))
    suffix = made(genome)
    losses = []
    for index in range(4):
        losses.append(suffix.loss(index, {}))
        suffix.advance(index, {})
    assert losses == [losses[0]] * 4, "what was settled is not computed again, and is the same"
    assert losses[0] == pytest.approx(whole(genome), rel=1e-5)
    assert weights_digest(live.blocks.model) == before


def test_new_weights_are_in_their_block_alone(judged):
    live, whole, made = judged
    worst, best = (2,) * len(live.space), (0,) * len(live.space)
    per_block = len(live.space) // 4
    suffix = made(worst)
    for index in range(4):
        units = range(index * per_block, (index + 1) * per_block)
        weights = {live.space.units[i].name: live.levels.read(i, 0).decode() for i in units}
        mixed = best[: (index + 1) * per_block] + worst[(index + 1) * per_block :]
        assert suffix.loss(index, weights) == pytest.approx(whole(mixed), rel=1e-5)
        part = dict(list(weights.items())[:1])  # of one unit; the others stay at the genome
        alone = list(best[: index * per_block] + worst[index * per_block :])
        alone[index * per_block] = 0
        assert suffix.loss(index, part) == pytest.approx(whole(tuple(alone)), rel=1e-5)
        suffix.advance(index, weights)
    assert whole(best) < whole(worst)


def test_batches_and_chunks_change_rounding_only(judged):
    live, _, made = judged
    genome = (1,) * len(live.space)
    losses = [
        made(genome, max_tokens_in_flight=tokens, chunk_tokens=chunk).loss(0, {}) for tokens, chunk in ((32, 7), (10**6, 10**6))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert torch.isfinite(torch.tensor(losses)).all()
