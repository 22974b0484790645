"""The fitness of the search: a measure's mean over a fresh minibatch, the same for all candidates of a stage."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from evopress.data.minibatch import draw
from evopress.errors import EvoPressError
from evopress.fitness.measures import Measure, NegativeLogLikelihood
from evopress.fitness.population import Evaluator, measure_sums
from evopress.progress import track
from evopress.units import Genome


class MinibatchFitness:
    """Scores genomes on text; every call draws its own minibatch.

    Holds the base model's last hidden state of every sequence, not its logits: d numbers a token, not V.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        sequences: Tensor,
        *,
        rng: np.random.Generator,
        base: Tensor,
        measure: Measure,
        chunk_tokens: int = 256,
    ) -> None:
        """Take the text and the base model's targets.

        Args:
            sequences: token ids int64 [N, L].
            base: the base model's last hidden states [N, L, d], from `base_states`.
            rng: draws the minibatches and nothing else; its state is part of the search's state.
            measure: a measure with one number per token.
        """
        self.evaluator = evaluator
        self.sequences = sequences
        self.rng = rng
        self.measure = measure
        self.chunk_tokens = chunk_tokens
        self.base = base

    def __call__(self, genomes: Sequence[Genome], *, tokens: int) -> list[float]:
        """Return one fitness per genome, in nats per token (the perplexity fitness in perplexity), on `tokens` fresh tokens."""
        minibatch = draw(len(self.sequences), self.sequences.shape[1], tokens=tokens, rng=self.rng)
        total = torch.zeros(len(genomes), dtype=torch.float64)
        count = 0
        for indices, length in minibatch.groups():
            rows = list(indices)
            ids = self.sequences[rows, :length]
            sums, n = measure_sums(self.evaluator, genomes, ids, self.base[rows], self.measure, chunk_tokens=self.chunk_tokens)
            total += sums[:, 0]
            count += n
        means = (total / count).tolist()
        if isinstance(self.measure, NegativeLogLikelihood):
            return [math.exp(mean) if mean < 700 else math.inf for mean in means]
        return means


def base_states(evaluator: Evaluator, sequences: Tensor, *, batch_tokens: int) -> Tensor:
    """Return the dense model's last hidden states [N, L, d] in its dtype, in host memory.

    Raises: EvoPressError if one is not finite.
    """
    batch = max(batch_tokens // sequences.shape[1], 1)
    parts = []
    for start in track(range(0, len(sequences), batch), "last hidden states of the dense model"):
        _, states = evaluator.final_states([None], sequences[start : start + batch])
        if not bool(torch.isfinite(states[0]).all()):
            raise EvoPressError(
                f"the dense model's hidden states are not finite on sequences {start} to {start + batch - 1}: "
                "use model.dtype=bfloat16 or float32"
            )
        parts.append(states[0].cpu())
    return torch.cat(parts)
