import copy
import math

import pytest
import torch
from measures_literal import acceptance_rate, flips, kl_divergence, negative_log_likelihood, top1_agreement

from evopress.evaluation.heldout import MEANS, MEASURES, Scores, measure_held_out, scores_by_data_set
from evopress.fitness import population
from evopress.fitness.minibatch import base_states
from evopress.fitness.plain import PlainEvaluator
from evopress.fitness.population import PopulationEvaluator
from evopress.reporting import tables


@pytest.fixture(scope="module", params=["llama", "gemma2", "opt"])
def live(request, live_model):
    return live_model(request.param, num_blocks=4)


def genomes_of(live):
    n = len(live.space)
    return [(0,) * n, (2,) * n, tuple(i % 3 for i in range(n)), None]


def whole_model_logits(live, genome, sequences):
    """Run the model's own forward in float64 on the very weights of a genome."""
    with live.applied(genome):
        model = copy.deepcopy(live.blocks.model).double()
    with torch.no_grad():
        return model(input_ids=sequences, use_cache=False).logits


@pytest.mark.parametrize("kind", [PopulationEvaluator, PlainEvaluator])
def test_scores_are_those_of_the_whole_model(kind, live, tokens):
    sequences = tokens(7, 20, seed=11)
    labels = sequences[:, 1:].flatten()
    base = whole_model_logits(live, None, sequences)[:, :-1].flatten(0, 1)
    scores = measure_held_out(kind(live), genomes_of(live), sequences, batch_tokens=60, chunk_tokens=17)
    for genome, mine in zip(genomes_of(live), scores, strict=True):
        logits = whole_model_logits(live, genome, sequences)[:, :-1].flatten(0, 1)
        assert mine.num_tokens == 7 * 19
        assert mine.kl == pytest.approx(float(kl_divergence(base, logits).mean()), rel=1e-3, abs=1e-5)
        assert mine.perplexity == pytest.approx(math.exp(negative_log_likelihood(logits, labels).mean()), rel=1e-4)
        assert mine.top1_agreement == pytest.approx(float(top1_agreement(base, logits).mean()), abs=1.01 / mine.num_tokens)
        assert mine.acceptance_rate == pytest.approx(float(acceptance_rate(base, logits).mean()), rel=1e-4)
        assert mine.flips == pytest.approx(float(flips(base, logits, labels).mean()), abs=1.01 / mine.num_tokens)
    assert scores[-1].kl == pytest.approx(0.0, abs=1e-5)
    assert (scores[-1].top1_agreement, scores[-1].flips) == (1.0, 0.0)
    assert 1 - 1e-5 < scores[-1].acceptance_rate <= 1
    assert scores[0].kl < scores[1].kl


def test_scores_are_printed_without_those_of_every_sequence():
    scores = Scores.of(torch.rand(len(MEASURES), 200, dtype=torch.float64), 31)
    assert len(scores.by_sequence["kl"]) == 200
    assert repr(scores).startswith(f"Scores(kl={scores.kl!r}, perplexity=") and "by_sequence" not in repr(scores)


def test_batches_and_chunks_change_nothing_but_rounding(live, tokens):
    sequences = tokens(5, 12, seed=12)
    evaluator = PopulationEvaluator(live)
    expected = measure_held_out(evaluator, genomes_of(live), sequences, batch_tokens=10_000, chunk_tokens=10_000)
    for batch_tokens, chunk_tokens in ((1, 1), (24, 5), (60, 128)):
        mine = measure_held_out(evaluator, genomes_of(live), sequences, batch_tokens=batch_tokens, chunk_tokens=chunk_tokens)
        for a, b in zip(mine, expected, strict=True):
            assert (a.kl, a.perplexity) == pytest.approx((b.kl, b.perplexity), rel=1e-4, abs=1e-6)
            assert a.num_tokens == b.num_tokens


def test_a_genomes_scores_do_not_depend_on_its_company(live, tokens):
    sequences = tokens(4, 12, seed=13)
    evaluator = PopulationEvaluator(live)
    together = measure_held_out(evaluator, genomes_of(live), sequences)
    for genome, scores in zip(genomes_of(live), together, strict=True):
        alone = measure_held_out(evaluator, [genome], sequences)[0]
        assert (alone.kl, alone.perplexity) == pytest.approx((scores.kl, scores.perplexity), rel=1e-4, abs=1e-6)


def test_each_name_gets_its_scores_on_each_data_set(live, tokens):
    genomes = dict(zip(("four", "two", "mixed", "dense"), genomes_of(live), strict=True))
    data_sets = {"one": tokens(3, 12, seed=1), "other": tokens(2, 9, seed=2)}
    evaluator = PopulationEvaluator(live)
    table = scores_by_data_set(evaluator, genomes, data_sets, batch_tokens=36, chunk_tokens=128)
    assert list(table) == list(genomes)
    for name, genome in genomes.items():
        assert list(table[name]) == ["one", "other"]
        for data_set, sequences in data_sets.items():
            alone = measure_held_out(evaluator, [genome], sequences)[0]
            mine = table[name][data_set]
            assert mine.num_tokens == sequences[:, 1:].numel()
            assert (mine.kl, mine.perplexity) == pytest.approx((alone.kl, alone.perplexity), rel=1e-4, abs=1e-6)


def test_a_perplexity_beyond_floats_is_infinite(live, tokens):
    head = live.blocks.model.get_output_embeddings().weight
    before = head.data
    try:
        head.data = before * 1e6
        scores = measure_held_out(PopulationEvaluator(live), [None], tokens(2, 12))[0]
    finally:
        head.data = before
    if live.blocks.head().softcap is None:
        assert scores.perplexity == math.inf
    else:
        assert scores.perplexity < math.inf


def test_what_is_kept_of_every_sequence_is_that_sequence_measured_alone(live, tokens):
    sequences = tokens(5, 12, seed=14)
    evaluator = PopulationEvaluator(live)
    scores = measure_held_out(evaluator, genomes_of(live), sequences, batch_tokens=36, chunk_tokens=7)
    for index in range(5):
        alone = measure_held_out(evaluator, genomes_of(live), sequences[index : index + 1])
        for mine, other in zip(scores, alone, strict=True):
            here = {name: mine.by_sequence[name][index] for name in MEASURES}
            assert here == pytest.approx({**other.means(), "nll": math.log(other.perplexity)}, rel=1e-4, abs=1e-6)
    for mine, other in zip(scores, measure_held_out(evaluator, genomes_of(live), sequences[:3]), strict=True):
        part = mine.first(3)
        assert (part.kl, part.perplexity, part.num_tokens) == (
            pytest.approx(other.kl, rel=1e-4, abs=1e-6),
            pytest.approx(other.perplexity, rel=1e-4),
            33,
        )
        assert mine.first(5).kl == pytest.approx(mine.kl, rel=1e-12)


def test_all_that_is_measured_has_a_column() -> None:
    assert list(tables.MEANS) == list(MEANS)


def test_dense_states_at_hand_are_the_base(live, tokens):
    sequences = tokens(5, 12, seed=15)
    evaluator = PopulationEvaluator(live)
    base = base_states(evaluator, sequences, batch_tokens=24)
    expected = measure_held_out(evaluator, genomes_of(live), sequences, batch_tokens=24)
    for mine, other in zip(
        measure_held_out(evaluator, genomes_of(live), sequences, base=base, batch_tokens=24), expected, strict=True
    ):
        assert (mine.kl, mine.perplexity) == pytest.approx((other.kl, other.perplexity), rel=1e-4, abs=1e-6)


def test_blocks_that_are_carried_are_carried_once_for_all_sequences(live_model, tokens, monkeypatch):
    """Not once for each batch: the numbers are the same, to the bit where batches are full."""
    live = live_model()
    sequences, evaluator, last = (
        tokens(6, 12, seed=16),
        PopulationEvaluator(live, max_tokens_in_flight=24),
        len(live.blocks.blocks) - 1,
    )
    base = base_states(evaluator, sequences, batch_tokens=24)
    expected = measure_held_out(evaluator, [None], sequences, base=base, batch_tokens=24, chunk_tokens=7)
    monkeypatch.setattr(live.blocks, "offload", True)
    carried, on_device = [], live.blocks.on_device
    monkeypatch.setattr(live.blocks, "on_device", lambda index, **how: carried.append(index) or on_device(index, **how))
    assert torch.equal(base_states(evaluator, sequences, batch_tokens=24), base)
    found = measure_held_out(evaluator, [None], sequences, base=base, batch_tokens=24, chunk_tokens=7)
    assert carried.count(last) == 2 and found[0].by_sequence == expected[0].by_sequence
    monkeypatch.setattr(population, "MOST_ON_HOST", 1)
    assert torch.equal(base_states(evaluator, sequences, batch_tokens=24), base)
    assert carried.count(last) == 2 + 3
