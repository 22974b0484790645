"""KL divergence of a model whose first blocks are settled, so that only what comes after them is computed.

The hidden states that enter the first open block are held; a candidate for it runs from there to the end.

Shapes: N sequences of L tokens, d hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from evopress.fitness.measures import Measure, per_token
from evopress.levels.live import Live, block_at, part_held
from evopress.levels.refine import Weights
from evopress.ranks import batch_within_share, on_all_ranks, shard
from evopress.units import Genome


class SuffixLoss:
    """Judges weights of one block after another; see `Judge`. Of several processes each has its share of the text."""

    def __init__(
        self,
        live: Live,
        genome: Genome,
        sequences: Tensor,
        *,
        base: Tensor,
        measure: Measure,
        max_tokens_in_flight: int = 4096,
        chunk_tokens: int = 256,
        fused: bool = False,
    ) -> None:
        """Take the text.

        Args:
            sequences: token ids int64 [N, L].
            base: the dense model's last hidden states [N, L, d].
            measure: a measure with one number per token.
        """
        self.live, self.genome, self.measure = live, genome, measure
        self.chunk_tokens, self.fused = chunk_tokens, fused
        self._count = sequences[:, 1:].numel()
        batch = batch_within_share(len(sequences), max(max_tokens_in_flight // sequences.shape[1], 1))
        mine = shard(-(-len(sequences) // batch))
        own = slice(mine.start * batch, mine.stop * batch)
        self.sequences, self.base = sequences[own], base[own]
        self._parts = [slice(start, start + batch) for start in range(0, len(self.sequences), batch)]
        self._states = torch.empty(*self.sequences.shape, live.blocks.hidden_size, dtype=live.blocks.dtype)
        on_all_ranks(self._embed)

    def _embed(self) -> None:
        live, embedding = self.live, self.live.blocks.embedding_part
        with part_held(live, embedding, None if embedding is None else live.levels_in(self.genome, embedding)):
            for those in self._parts:
                self._states[those] = live.blocks.embed(self.sequences[those]).to(self._states.device)

    def loss(self, index: int, weights: Weights) -> float:
        """Return the mean of the measure over all predicted tokens; see `Judge`."""
        return sum(chunk for found in on_all_ranks(lambda: self._sums(index, weights)) for chunk in found) / self._count

    def _sums(self, index: int, weights: Weights) -> list[float]:
        """Return the measure's sums over the chunks of this process's text."""
        states, head = self._states, self.live.blocks.head_part
        for later in range(index, len(self.live.blocks.blocks)):
            left = torch.empty_like(states) if states is self._states else states
            self._run(later, weights if later == index else {}, states, left)
            states = left
        return self._measure(states, weights if index == head else {})

    def advance(self, index: int, weights: Weights) -> None:
        """See `Judge`."""
        on_all_ranks(lambda: self._run(index, weights, self._states, self._states))

    def _run(self, index: int, weights: Weights, states: Tensor, into: Tensor) -> None:
        blocks = self.live.blocks
        with block_at(self.live, index, self.genome, weights):
            for those in self._parts:
                into[those] = blocks.run(index, states[those].to(blocks.device), fused=self.fused).to(into.device)

    @torch.no_grad()
    def _measure(self, states: Tensor, weights: Weights) -> list[float]:
        blocks = self.live.blocks
        dense = head = blocks.head()
        if (part_of_head := blocks.head_part) is not None:
            with block_at(self.live, part_of_head, self.genome, weights):
                head = blocks.head()
        sums = []
        for those in self._parts:
            hidden = blocks.finish(states[those].to(blocks.device))[:, :-1].flatten(0, 1)
            base = self.base[those][:, :-1].flatten(0, 1)
            labels = self.sequences[those][:, 1:].reshape(-1).to(blocks.device)
            for start in range(0, len(labels), self.chunk_tokens):
                chunk = slice(start, start + self.chunk_tokens)
                reference = self.measure.reference(base[chunk].to(blocks.device), labels[chunk], dense)
                sums.append(per_token(self.measure, hidden[chunk], reference, head)[0].sum(dtype=torch.float64))
        return torch.stack(sums).tolist() if sums else []
