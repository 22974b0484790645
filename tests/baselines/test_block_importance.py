import itertools
import math
from contextlib import nullcontext

import pytest
import torch
from block_scores_literal import boundary_states, literal_scores
from torch.nn.functional import cosine_similarity

from evopress.baselines.block_importance import ACTIVATION_SCORES, RANKINGS, measure_spans, removal_order, windows
from evopress.errors import EvoPressError

FAMILIES = ("llama", "qwen3", "phi3", "gemma2", "gemma3_text", "opt")
BLOCKS = [(i, i + 1) for i in range(4)]
PAIRS = [(0, 2), (2, 4)]


class Linear:
    """Stands in for a BlockModel: one-dimensional embeddings of two components, and blocks that are 2 x 2 matrices."""

    def __init__(self, *matrices):
        self.blocks = [torch.tensor(matrix, dtype=torch.float32) for matrix in matrices]
        self.runs = []

    def embed(self, ids):
        return torch.stack([ids.float(), torch.zeros(ids.shape)], dim=-1)

    def on_device(self, index):
        return nullcontext()

    def run(self, index, hidden):
        self.runs.append((index, len(hidden)))
        return hidden @ self.blocks[index].T


KEEP, DOUBLE, TURN = [[1, 0], [0, 1]], [[2, 0], [0, 2]], [[0, -1], [1, 0]]
IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])  # embeddings of these lengths, 3.5 in the mean


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_span_equals_the_literal_scores(model_type, tiny_blocks, tokens):
    blocks = tiny_blocks(model_type, num_blocks=3)
    ids = tokens(5, 20)
    spans = list(itertools.combinations(range(4), 2))
    expected = literal_scores(blocks, ids, spans)
    for batch_tokens in (1, 40, 4096):
        scores = measure_spans(blocks, ids, spans, batch_tokens=batch_tokens)
        assert list(scores) == list(ACTIVATION_SCORES)
        for name, values in scores.items():
            assert values == pytest.approx(expected[name], rel=2e-5, abs=1e-6), name


def test_the_last_block_is_scored_before_the_final_norm(tiny_blocks, tokens):
    blocks = tiny_blocks("llama", num_blocks=2)
    blocks.decoder.norm.weight.data.mul_(torch.linspace(-3, 3, 32))
    ids = tokens(1, 16)
    states = torch.from_numpy(boundary_states(blocks, ids[0]))
    after_norm = blocks.finish(states[2].float())
    similarity = measure_spans(blocks, ids, [(1, 2)])["cosine_similarity"][0]
    assert similarity == pytest.approx(float(cosine_similarity(states[1], states[2], dim=-1).mean()), rel=1e-5)
    assert abs(similarity - float(cosine_similarity(states[1].float(), after_norm, dim=-1).mean())) > 0.1


def test_blocks_that_do_nothing_or_turn_or_double_have_known_scores():
    model = Linear(KEEP, DOUBLE, TURN, TURN)
    scores = measure_spans(model, IDS, [*BLOCKS, (0, 2), (1, 4), (2, 4)])
    assert scores["cosine_similarity"] == pytest.approx([1, 1, 0, 0, 1, -1, -1], abs=1e-6)
    assert scores["norm_ratio"] == pytest.approx([0, 0.5, math.sqrt(2), math.sqrt(2), 0.5, 1.5, 2], abs=1e-6)
    l2 = [0, 3.5, 7 * math.sqrt(2), 7 * math.sqrt(2), 3.5, 10.5, 14]  # the last two blocks see lengths of 7
    assert scores["l2"] == pytest.approx(l2, abs=1e-5)
    assert scores["l2_normalized"] == pytest.approx([0, 0, math.sqrt(2), math.sqrt(2), 0, 2, 2], abs=1e-6)


def test_means_are_over_tokens_not_batches():
    ids = torch.tensor([[1, 1], [1, 1], [10, 10]])
    for batch_tokens in (2, 4, 6):
        assert measure_spans(Linear(DOUBLE), ids, [(0, 1)], batch_tokens=batch_tokens)["l2"] == pytest.approx([4.0])


def test_a_block_runs_once_per_batch_and_only_up_to_the_last_span():
    model = Linear(KEEP, DOUBLE, TURN, KEEP)
    measure_spans(model, IDS, [(0, 1), (0, 2), (0, 3), (1, 3), (2, 3)], batch_tokens=3)
    assert model.runs == [(0, 1), (1, 1), (2, 1)] * 2
    assert measure_spans(model, IDS, []) == {name: [] for name in ACTIVATION_SCORES}


def test_an_empty_block_goes_first_under_every_activation_score(tiny_blocks, tokens):
    blocks = tiny_blocks("llama", num_blocks=4)
    for linear in (blocks.blocks[2].self_attn.o_proj, blocks.blocks[2].mlp.down_proj):
        linear.weight.data.zero_()
    scores = measure_spans(blocks, tokens(4, 16), BLOCKS)
    for name, ranking in RANKINGS.items():
        if ranking.score in scores:
            assert removal_order(name, scores[ranking.score])[0] == 2, name


def test_scores_of_a_half_precision_model_are_close_and_leave_it_as_it_was(tiny_blocks, tokens, weights_digest):
    ids = tokens(4, 16)
    exact = measure_spans(tiny_blocks("llama", num_blocks=4), ids, BLOCKS)
    half = tiny_blocks("llama", num_blocks=4, dtype="bfloat16")
    before = weights_digest(half.model)
    for name, values in measure_spans(half, ids, BLOCKS).items():
        assert values == pytest.approx(exact[name], rel=0.03), name
    assert weights_digest(half.model) == before


def test_most_expendable_first():
    values = [0.2, 0.9, 0.5, 0.9, 0.1]
    highest = {name for name in RANKINGS if removal_order(name, values) == (1, 3, 2, 0, 4)}
    lowest = {name for name in RANKINGS if removal_order(name, values) == (4, 0, 2, 1, 3)}
    assert highest == {"shortgpt", "sliding_window"}
    assert lowest == {"weight_subcloning", "shortened_llama", "shortened_llama_kl", "l2", "l2_normalized"}


def test_excluded_spans_never_go_and_scores_that_are_not_finite_go_last():
    assert removal_order("shortgpt", [0.2, 0.9, 0.5, 0.9], excluded=[1, 2]) == (3, 0)
    assert removal_order("shortened_llama", [math.inf, 12.0, math.nan, 9.0]) == (3, 1, 0, 2)
    assert removal_order("shortgpt", [math.nan, 0.1, math.inf, -0.5]) == (1, 3, 0, 2)


def test_windows_are_runs_of_whole_spans_without_an_excluded_one():
    assert windows(BLOCKS, 3) == {(0, 3): (0, 1, 2), (1, 4): (1, 2, 3)}
    assert windows(BLOCKS, 2, excluded={0}) == {(1, 3): (1, 2), (2, 4): (2, 3)}
    assert windows(PAIRS, 1, excluded={0}) == {(2, 4): (1,)}
    assert windows(PAIRS, 2) == {(0, 4): (0, 1)}
    assert windows([(0, 1), (2, 3), (3, 4)], 2) == {(2, 4): (1, 2)}  # block 1 is no unit


def test_the_best_window_changes_the_residual_stream_least():
    """Two half turns undo each other: together they are the better removal, one by one the worst."""
    half_turn, third = [[-1, 0], [0, -1]], [[0.5, -math.sqrt(0.75)], [math.sqrt(0.75), 0.5]]
    model = Linear(third, half_turn, half_turn, third)
    found = windows(BLOCKS, 2)
    scores = measure_spans(model, IDS, [*BLOCKS, *found])["cosine_similarity"]
    assert scores == pytest.approx([0.5, -1, -1, 0.5, -0.5, 1, -0.5], abs=1e-6)
    order = removal_order("sliding_window", scores[len(BLOCKS) :])
    assert list(found.values())[order[0]] == (1, 2)
    assert removal_order("shortgpt", scores[: len(BLOCKS)])[:2] == (0, 3)


@pytest.mark.parametrize(("count", "excluded"), [(3, [1, 2]), (5, []), (1, [0, 1, 2, 3])])
def test_no_window_is_refused(count, excluded):
    with pytest.raises(EvoPressError, match=rf"no {count} consecutive units of 4 .*leave sliding_window out"):
        windows(BLOCKS, count, excluded=excluded)


def test_bad_spans_and_activations_are_refused(tiny_blocks, tokens):
    blocks = tiny_blocks("llama", num_blocks=2)
    for span in ((1, 3), (-1, 1), (1, 1)):
        with pytest.raises(EvoPressError, match=r"does not exist: expected 0 <= start < stop <= 2"):
            measure_spans(blocks, tokens(1, 4), [span])
    blocks.blocks[1].mlp.down_proj.weight.data.fill_(math.inf)
    with pytest.raises(EvoPressError, match=r"before or after block 1 are not finite.*float32"):
        measure_spans(blocks, tokens(1, 4), [(0, 1), (1, 2)])
