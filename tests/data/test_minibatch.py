import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evopress.data.minibatch import Minibatch, draw
from evopress.errors import EvoPressError


@given(st.data(), st.integers(1, 20), st.integers(2, 9), st.integers(0, 2**32))
def test_draws_exactly_the_tokens_without_replacement(data, num_sequences, sequence_length, seed):
    tokens = data.draw(st.integers(2, num_sequences * sequence_length))
    minibatch = draw(num_sequences, sequence_length, tokens=tokens, rng=np.random.default_rng(seed))
    one_left = tokens % sequence_length == 1
    assert minibatch.num_tokens == tokens - one_left
    assert len(set(minibatch.indices)) == len(minibatch.indices) == len(minibatch.lengths)
    assert all(0 <= index < num_sequences for index in minibatch.indices)
    assert set(minibatch.lengths[:-1]) <= {sequence_length}
    assert 2 <= minibatch.lengths[-1] <= sequence_length
    groups = minibatch.groups()
    assert 1 <= len(groups) <= 2
    assert sum((indices for indices, _ in groups), ()) == minibatch.indices
    assert sum(len(indices) * length for indices, length in groups) == minibatch.num_tokens


def test_tensors_are_whole_sequences_and_first_tokens_of_the_last():
    sequences = torch.arange(40).view(5, 8)
    whole, cut = Minibatch(indices=(3, 0, 4), lengths=(8, 8, 3)).tensors(sequences)
    assert torch.equal(whole, sequences[[3, 0]])
    assert torch.equal(cut, sequences[4:5, :3])


def test_single_sequence_may_be_cut():
    minibatch = draw(4, 8, tokens=5, rng=np.random.default_rng(0))
    assert minibatch.groups() == [(minibatch.indices, 5)]


def test_every_sequence_is_drawn_and_cut_about_equally_often():
    rng = np.random.default_rng(0)
    drawn, cut = np.zeros(5), np.zeros(5)
    for _ in range(2000):
        minibatch = draw(5, 4, tokens=6, rng=rng)
        drawn[list(minibatch.indices)] += 1
        cut[minibatch.indices[-1]] += 1
    assert np.all(abs(drawn / 2000 - 0.4) < 0.05) and np.all(abs(cut / 2000 - 0.2) < 0.05)


def test_equal_seeds_give_equal_minibatches():
    assert draw(50, 8, tokens=99, rng=np.random.default_rng(7)) == draw(50, 8, tokens=99, rng=np.random.default_rng(7))


def test_too_many_tokens_are_refused_with_both_numbers():
    with pytest.raises(EvoPressError, match=r"41 tokens.*40"):
        draw(5, 8, tokens=41, rng=np.random.default_rng(0))


@pytest.mark.parametrize(("sequence_length", "tokens"), [(8, 1), (8, 0), (1, 4), (8, -3)])
def test_minibatch_that_predicts_nothing_is_refused(sequence_length, tokens):
    with pytest.raises(EvoPressError, match="predicts nothing"):
        draw(5, sequence_length, tokens=tokens, rng=np.random.default_rng(0))
