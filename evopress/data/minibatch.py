"""Minibatches of exactly n tokens: what one stage of selection scores its candidates on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from evopress.errors import EvoPressError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Minibatch:
    """Which sequences were drawn, and how many first tokens of each are used."""

    indices: tuple[int, ...]
    """Row of each sequence, in the order drawn; no row twice."""
    lengths: tuple[int, ...]
    """Tokens used of each; all but the last are whole sequences."""

    @property
    def num_tokens(self) -> int:
        """Tokens in all, the first of every sequence included, which has no prediction."""
        return sum(self.lengths)

    def groups(self) -> list[tuple[tuple[int, ...], int]]:
        """Return (indices, length) of the whole sequences and of the one that is cut: one or two groups."""
        num_cut = int(self.lengths[-1] != self.lengths[0])
        num_whole = len(self.indices) - num_cut
        groups = [(self.indices[:num_whole], self.lengths[0])]
        if num_cut:
            groups.append((self.indices[num_whole:], self.lengths[-1]))
        return groups

    def tensors(self, sequences: Tensor) -> list[Tensor]:
        """Take the minibatch out of sequences, int64 [N, L]: one tensor [b, length] for each group."""
        return [sequences[list(indices), :length] for indices, length in self.groups()]


def draw_equal(num_sequences: int, sequence_length: int, *, tokens: int, sequences: int, rng: np.random.Generator) -> Minibatch:
    """Draw sequences without replacement, all cut to one length.

    Args:
        num_sequences: sequences to draw from, N.
        sequence_length: tokens of each, L.
        tokens: tokens to draw, at most.
        sequences: into which they are divided, at least, as far as there are so many.

    Raises: EvoPressError if a sequence has fewer than 2 tokens.
    """
    count = min(max(sequences, -(-tokens // sequence_length)), num_sequences)
    length = min(tokens // count, sequence_length)
    if length < 2:
        raise EvoPressError(f"{tokens} tokens of {count} sequences predict nothing: ask for at least 2 of each")
    rows = rng.choice(num_sequences, size=count, replace=False).tolist()
    return Minibatch(indices=tuple(rows), lengths=(length,) * count)


def draw(num_sequences: int, sequence_length: int, *, tokens: int, rng: np.random.Generator) -> Minibatch:
    """Draw sequences without replacement, the last one cut to its first tokens, until `tokens` tokens are drawn.

    Source: the authors' code (paper, section 3: minibatches of multi-step selection). Differs from it in two cases.
    A last sequence of one token would predict nothing (there: NaN), so it is left out and the minibatch has one token
    less. More tokens than there are is an error (there: an endless loop).

    Args:
        num_sequences: sequences to draw from, N.
        sequence_length: tokens of each, L.
        tokens: tokens to draw, 2 to N·L.

    Raises: EvoPressError if `tokens` is out of range.
    """
    available = num_sequences * sequence_length
    if tokens > available:
        raise EvoPressError(
            f"a minibatch of {tokens} tokens cannot be drawn from {available} "
            f"({num_sequences} sequences of {sequence_length}): raise the search tokens or shrink the minibatch"
        )
    if tokens < 2 or sequence_length < 2:
        raise EvoPressError(
            f"a minibatch of {tokens} tokens from sequences of {sequence_length} predicts nothing: give at least 2 of each"
        )
    num_whole, rest = divmod(tokens, sequence_length)
    lengths = [sequence_length] * num_whole
    if rest > 1:
        lengths.append(rest)
    indices = rng.choice(num_sequences, size=len(lengths), replace=False)
    return Minibatch(indices=tuple(int(index) for index in indices), lengths=tuple(lengths))
