"""The fitness of the search: a measure's mean over a fresh minibatch, the same for all candidates of a stage."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from evopress.data.minibatch import Minibatch, draw, draw_equal
from evopress.errors import EvoPressError
from evopress.fitness.archive import Archiving, NoArchive
from evopress.fitness.attribution import attribute
from evopress.fitness.measures import Measure, NegativeLogLikelihood
from evopress.fitness.population import Evaluator, measure_sums
from evopress.progress import track
from evopress.units import Genome

logger = logging.getLogger(__name__)


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
        max_tokens_in_flight: int = 4096,
        archive: Archiving | None = None,
    ) -> None:
        """Take the text and the base model's targets.

        Args:
            sequences: token ids int64 [N, L].
            base: the base model's last hidden states [N, L, d], from `base_states`.
            rng: draws the minibatches and nothing else; its state is part of the search's state.
            measure: a measure with one number per token.
            max_tokens_in_flight: of attributions; the evaluator has its own.
            archive: of what was measured before; None: everything is measured.
        """
        self.evaluator = evaluator
        self.sequences = sequences
        self.rng = rng
        self.measure = measure
        self.chunk_tokens = chunk_tokens
        self.max_tokens_in_flight = max_tokens_in_flight
        self.base = base
        self.archive = NoArchive() if archive is None else archive
        self._explained = False

    def __call__(self, genomes: Sequence[Genome], *, tokens: int) -> list[float]:
        """Return one fitness per genome, in nats per token (the perplexity fitness in perplexity), on `tokens` fresh tokens."""
        minibatch = draw(len(self.sequences), self.sequences.shape[1], tokens=tokens, rng=self.rng)
        alone = all(self.evaluator.alone(len(rows), length) for rows, length in minibatch.groups())
        means = self.archive.fitnesses(genomes, minibatch, alone=alone, measure=lambda those: self._means(those, minibatch))
        if isinstance(self.measure, NegativeLogLikelihood):
            return [math.exp(mean) if mean < 700 else math.inf for mean in means]
        return means

    def _means(self, genomes: Sequence[Genome], minibatch: Minibatch) -> list[float]:
        """Return the measure's mean over a minibatch for every genome."""
        total = torch.zeros(len(genomes), dtype=torch.float64)
        count = 0
        for indices, length in minibatch.groups():
            rows = list(indices)
            ids = self.sequences[rows, :length]
            sums, n = measure_sums(self.evaluator, genomes, ids, self.base[rows], self.measure, chunk_tokens=self.chunk_tokens)
            if not bool(torch.isfinite(sums).all()):
                self._explain(genomes[int(torch.isfinite(sums).all(1).int().argmin())], rows, ids)
            total += sums[:, 0]
            count += n
        return (total / count).tolist()

    def attribute(self, genome: Genome, *, tokens: int, sequences: int) -> list[list[float]]:
        """Return what each unit holds of a genome's fitness on sequences of fresh text, floats [sequences][units].

        The fitness here is the measure's mean, in nats per token also where the fitness is the perplexity. The sequences are drawn
        without replacement and all cut to one length.

        Args:
            tokens: of all sequences together, at most.
            sequences: into which they are divided, at least, as far as there are so many.

        Raises: EvoPressError if a number is not finite.
        """
        available, longest = self.sequences.shape
        drawn = draw_equal(available, longest, tokens=tokens, sequences=sequences, rng=self.rng)
        rows, length = list(drawn.indices), drawn.lengths[0]
        live = self.evaluator.live
        uniform = self.rng.random((len(rows), length - 1)) if live.modules_in(0) else None

        def measured() -> np.ndarray:
            return attribute(
                live,
                genome,
                self.sequences[rows, :length],
                self.base[rows],
                self.measure,
                uniform=None if uniform is None else torch.from_numpy(uniform),
                max_tokens_in_flight=self.max_tokens_in_flight,
                chunk_tokens=self.chunk_tokens,
            ).numpy()

        return self.archive.attribution(genome, rows, length, measured, drawn=uniform).tolist()

    def _explain(self, genome: Genome, rows: list[int], ids: Tensor) -> None:
        """Say, the first time, where a genome's numbers stop being finite.

        Raises: EvoPressError if it is the dense model's logits, so that nothing can be measured on these sequences.
        """
        if self._explained:
            return
        self._explained = True
        live = self.evaluator.live
        dense = live.blocks.where_non_finite(ids)
        if dense is not None:
            what, row = dense
            raise EvoPressError(
                f"the dense model's logits are not finite on search sequence {rows[row]}, first {what}: {live.blocks.advice}"
            )
        with live.applied(genome):
            what, row = live.blocks.where_non_finite(ids) or ("the measure itself", 0)
        logger.warning(
            "a candidate's fitness is not finite on search sequence %d, first %s; such candidates lose and are counted",
            rows[row],
            what,
        )


def base_states(evaluator: Evaluator, sequences: Tensor, *, batch_tokens: int) -> Tensor:
    """Return the dense model's last hidden states [N, L, d] in its dtype, in host memory.

    Raises: EvoPressError if one is not finite.
    """
    batch = max(batch_tokens // sequences.shape[1], 1)
    parts = []
    for start in track(range(0, len(sequences), batch), "last hidden states of the dense model"):
        _, states = evaluator.final_states([None], sequences[start : start + batch])
        if not bool(torch.isfinite(states[0]).all()):
            blocks = evaluator.live.blocks
            what, row = blocks.where_non_finite(sequences[start : start + batch]) or ("the last hidden states", 0)
            raise EvoPressError(
                f"the dense model's hidden states are not finite on sequences {start} to {start + len(states[0]) - 1}, "
                f"first {what} on sequence {start + row}: {blocks.advice}"
            )
        parts.append(states[0].cpu())
    return torch.cat(parts)
