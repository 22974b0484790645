import numpy as np
import pytest
import torch
from measures_literal import kl_divergence, negative_log_likelihood

from evopress.data.minibatch import draw
from evopress.errors import EvoPressError
from evopress.fitness.measures import KLDivergence, NegativeLogLikelihood, TopkKL
from evopress.fitness.minibatch import MinibatchFitness, base_states
from evopress.fitness.plain import PlainEvaluator
from evopress.fitness.population import PopulationEvaluator


@pytest.fixture(scope="module")
def live(live_model):
    return live_model("llama", num_blocks=4)


@pytest.fixture(scope="module")
def sequences(tokens):
    return tokens(10, 16, seed=3)


@pytest.fixture(scope="module")
def base(live, sequences):
    return base_states(PopulationEvaluator(live), sequences, batch_tokens=48)


@pytest.fixture(scope="module")
def genomes(live):
    return [(level,) * len(live.space) for level in (2, 0, 1)] + [(0, 1, 2, 1) * 7]


class RecordingEvaluator(PopulationEvaluator):
    """Keeps the ids it was asked to evaluate."""

    def __init__(self, live):
        super().__init__(live)
        self.asked = []

    def final_states(self, genomes, ids, **options):
        self.asked.append((len(genomes), ids))
        return super().final_states(genomes, ids, **options)


def make(live, sequences, base, *, seed=0, measure=None, evaluator=None):
    return MinibatchFitness(
        evaluator or PopulationEvaluator(live),
        sequences,
        base=base,
        rng=np.random.default_rng(seed),
        measure=measure or KLDivergence(),
        chunk_tokens=13,
    )


def logits(live, genome, ids):
    with live.applied(genome), torch.no_grad():
        return live.blocks.model(input_ids=ids, use_cache=False).logits.double()


def test_base_states_are_the_dense_models_whatever_the_batches(live, sequences, base):
    with torch.no_grad():
        expected = live.blocks.decoder(input_ids=sequences, use_cache=False).last_hidden_state
    torch.testing.assert_close(base, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(base_states(PlainEvaluator(live), sequences, batch_tokens=1), expected, rtol=1e-4, atol=1e-5)


def test_base_states_that_are_not_finite_are_refused(tiny_blocks, live, sequences):
    from evopress.levels.live import LiveModel

    blocks = tiny_blocks("llama", num_blocks=4)
    broken = LiveModel(blocks, live.levels)
    blocks.model.get_input_embeddings().weight.data[int(sequences[3, 2])] = float("nan")
    with pytest.raises(EvoPressError, match=r"not finite on sequences \d to \d"):
        base_states(PopulationEvaluator(broken), sequences, batch_tokens=32)


@pytest.mark.parametrize("num_tokens", [16, 20, 33, 64, 160])
def test_every_call_scores_all_genomes_on_exactly_the_tokens_of_one_minibatch(live, sequences, base, genomes, num_tokens):
    evaluator = RecordingEvaluator(live)
    scored = make(live, sequences, base, seed=5, evaluator=evaluator)(genomes, tokens=num_tokens)
    expected = draw(10, 16, tokens=num_tokens, rng=np.random.default_rng(5))
    assert len(scored) == len(genomes)
    assert all(count == len(genomes) for count, _ in evaluator.asked)
    assert sum(ids.numel() for _, ids in evaluator.asked) == expected.num_tokens == num_tokens - (num_tokens % 16 == 1)
    for (_, ids), mine in zip(evaluator.asked, expected.tensors(sequences), strict=True):
        assert torch.equal(ids, mine)


@pytest.mark.parametrize("num_tokens", [20, 64])
def test_the_kl_fitness_is_the_mean_over_all_predicted_tokens(live, sequences, base, genomes, num_tokens):
    scored = make(live, sequences, base, seed=1)(genomes, tokens=num_tokens)
    parts = draw(10, 16, tokens=num_tokens, rng=np.random.default_rng(1)).tensors(sequences)
    for genome, mine in zip(genomes, scored, strict=True):
        values = []
        for ids in parts:
            p, q = logits(live, None, ids)[:, :-1], logits(live, genome, ids)[:, :-1]
            values.append(kl_divergence(p.flatten(0, 1), q.flatten(0, 1)))
        assert mine == pytest.approx(float(torch.cat(values).mean()), rel=1e-3)


def test_the_perplexity_fitness_is_the_perplexity(live, sequences, base, genomes):
    scored = make(live, sequences, base, seed=1, measure=NegativeLogLikelihood())(genomes, tokens=40)
    parts = draw(10, 16, tokens=40, rng=np.random.default_rng(1)).tensors(sequences)
    for genome, mine in zip(genomes, scored, strict=True):
        values = [negative_log_likelihood(logits(live, genome, ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()) for ids in parts]
        assert mine == pytest.approx(float(torch.cat(values).mean().exp()), rel=1e-4)


@pytest.mark.parametrize("measure", [KLDivergence(), TopkKL(10), NegativeLogLikelihood()])
def test_the_plain_evaluator_gives_the_same_numbers(measure, live, sequences, base, genomes):
    fast = make(live, sequences, base, measure=measure)(genomes, tokens=50)
    plain = make(live, sequences, base, measure=measure, evaluator=PlainEvaluator(live))(genomes, tokens=50)
    assert fast == pytest.approx(plain, rel=1e-4)
    assert np.argmin(fast) == np.argmin(plain)


def test_calls_draw_afresh_and_the_generators_state_says_what(live, sequences, base, genomes):
    fitness = make(live, sequences, base)
    first = fitness(genomes, tokens=40)
    state = fitness.rng.bit_generator.state
    second = fitness(genomes, tokens=40)
    assert first != second
    other = make(live, sequences, base, seed=99)
    other.rng.bit_generator.state = state
    assert other(genomes, tokens=40) == second
    again = make(live, sequences, base)
    assert again(genomes[:1], tokens=40) == pytest.approx(first[:1], rel=1e-4)  # the same text, whoever is scored


def test_the_dense_model_has_no_divergence(live, sequences, base):
    assert make(live, sequences, base)([None], tokens=100) == pytest.approx([0.0], abs=1e-5)
    assert make(live, sequences, base, measure=TopkKL())([None], tokens=100) == pytest.approx([0.0], abs=1e-5)


def test_more_tokens_than_there_are_is_a_sentence(live, sequences, base, genomes):
    with pytest.raises(EvoPressError, match="161 tokens cannot be drawn from 160"):
        make(live, sequences, base)(genomes, tokens=161)
