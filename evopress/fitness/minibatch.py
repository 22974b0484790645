"""The fitness of the search: a measure's mean over a fresh minibatch, the same for all candidates of a stage."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from evopress.data.minibatch import Minibatch, draw, draw_equal
from evopress.errors import EvoPressError
from evopress.fitness.archive import Archiving, NoArchive
from evopress.fitness.attribution import attribute, expand
from evopress.fitness.measures import Measure, NegativeLogLikelihood
from evopress.fitness.population import Evaluator, measure_parts, walked_together
from evopress.progress import track
from evopress.ranks import batch_within_share, collective, launched, map_shards, shard, size, stack_shards
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
        known_as: Any = None,
    ) -> None:
        """Take the text and the base model's targets.

        Args:
            sequences: token ids int64 [N, L].
            base: the base model's last hidden states [N, L, d], from `base_states`.
            rng: draws the minibatches and nothing else; its state is part of the search's state.
            measure: a measure with one number per token.
            max_tokens_in_flight: of attributions, and what several processes share; the evaluator has its own.
            archive: of what was measured before; None: everything is measured.
            known_as: see `ranks.Known`.
        """
        self.known_as = known_as
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

    @collective
    def _means(self, genomes: Sequence[Genome], minibatch: Minibatch) -> list[float]:
        """Return the measure's mean over a minibatch for every genome."""
        parts = list(self._parts(minibatch))
        # Where there are fewer parts than processes, these share the genomes too.
        columns = min(max(size() // len(parts), 1), len(genomes))
        work = [_Work(*part, shard(len(genomes), of=columns, number=column)) for part in parts for column in range(columns)]
        found = [sums for mine in map_shards(work, lambda mine: self._sums(genomes, mine)) for sums in mine]
        total = torch.zeros(len(genomes), dtype=torch.float64)
        for (rows, length, of), sums in zip(work, found, strict=True):
            if not bool(torch.isfinite(sums).all()):
                worst = genomes[of[int(torch.isfinite(sums).all(1).int().argmin())]]
                self._explain(worst, list(rows), self.sequences[list(rows), :length])
            total[of.start : of.stop] += sums[:, 0]
        return (total / sum(len(rows) * (length - 1) for rows, length in parts)).tolist()

    def _parts(self, minibatch: Minibatch) -> Iterator[tuple[tuple[int, ...], int]]:
        """Yield rows that are measured together, and how many tokens of each: a group, or one process's least share of it."""
        for rows, length in minibatch.groups():
            most = batch_within_share(len(rows), max(self.max_tokens_in_flight // length, 1)) if launched() else len(rows)
            yield from ((rows[start : start + most], length) for start in range(0, len(rows), most))

    def _sums(self, genomes: Sequence[Genome], work: Sequence[_Work]) -> list[Tensor]:
        """Return the measure's sums, float64 [genomes, measures], of each part; those of one length in one walk over the blocks."""
        found: list[Tensor] = []
        for (length, of), alike in groupby(work, key=lambda each: (each.length, each.of)):
            parts = [each.rows for each in alike]
            rows = [row for part in parts for row in part]
            found += measure_parts(
                self.evaluator,
                genomes[of.start : of.stop],
                self.sequences[rows, :length],
                self.base[rows],
                self.measure,
                chunk_tokens=self.chunk_tokens,
                apart=len(parts[0]) if launched() else None,
            )
        return found

    def attribute(self, genome: Genome, *, tokens: int, sequences: int) -> list[list[float]]:
        """Return what each unit holds of a genome's fitness on sequences of fresh text, floats [sequences][units].

        The fitness here is the measure's mean, in nats per token also where the fitness is the perplexity. The sequences are drawn
        without replacement and all cut to one length.

        Args:
            tokens: of all sequences together, at most.
            sequences: into which they are divided, at least, as far as there are so many.

        Raises: EvoPressError if a number is not finite.
        """
        rows, length = self._equal(tokens, sequences)
        uniform = self._uniform(rows, length) if self.evaluator.live.modules_in(0) else None
        return self.archive.attribution(
            genome, rows, length, lambda: self._gone_back(attribute, genome, rows, length, uniform), drawn=uniform
        ).tolist()

    def expand(
        self, genome: Genome, *, tokens: int, sequences: int, counts: Sequence[int] | None = None
    ) -> list[list[list[float]]]:
        """Return what moving each unit alone to each of its levels adds to a genome's fitness, to second order.

        On sequences of fresh text, drawn as those of `attribute`: floats [sequences][units][levels], NaN where it is not known.

        Args and errors: as `attribute`, where no module can be dropped.
            counts: how many of each unit's levels are asked about, the first ones: the model may have further ones, of baselines;
                None: all.
        """
        rows, length = self._equal(tokens, sequences)
        return self._gone_back(partial(expand, counts=counts), genome, rows, length, self._uniform(rows, length)).tolist()

    def _equal(self, tokens: int, sequences: int) -> tuple[list[int], int]:
        """Draw rows of the text without replacement, and the length that all are cut to."""
        drawn = draw_equal(*self.sequences.shape, tokens=tokens, sequences=sequences, rng=self.rng)
        return list(drawn.indices), drawn.lengths[0]

    def _uniform(self, rows: Sequence[int], length: int) -> np.ndarray:
        """Draw what draws a label for every predicted token of rows, [rows, length - 1]."""
        return self.rng.random((len(rows), length - 1))

    @collective
    def _gone_back(
        self, walk: Callable[..., Tensor], genome: Genome, rows: Sequence[int], length: int, uniform: np.ndarray | None
    ) -> np.ndarray:
        """Return what `attribute` or `expand`, the walk back, finds of a genome on the first tokens of some rows, [rows, ...]."""
        most = batch_within_share(len(rows), max(self.max_tokens_in_flight // length, 1))
        parts = [slice(start, start + most) for start in range(0, len(rows), most)]

        def walked(mine: Sequence[slice]) -> Tensor:
            those = slice(mine[0].start, mine[-1].stop)
            return walk(
                self.evaluator.live,
                genome,
                self.sequences[rows[those], :length],
                self.base[rows[those]],
                self.measure,
                uniform=None if uniform is None else torch.from_numpy(uniform[those]),
                max_tokens_in_flight=most * length,
                chunk_tokens=self.chunk_tokens,
            )

        return stack_shards(parts, walked).numpy()

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


@collective
def base_states(evaluator: Evaluator, sequences: Tensor, *, batch_tokens: int) -> Tensor:
    """Return the dense model's last hidden states [N, L, d] in its dtype, in host memory.

    Raises: EvoPressError if one is not finite.
    """
    batch = batch_within_share(len(sequences), max(batch_tokens // sequences.shape[1], 1))

    together = walked_together(evaluator.live.blocks, 1, sequences.shape[1], batch)

    def states(starts: Sequence[int]) -> Tensor:
        parts, end = [], min(starts[-1] + batch, len(sequences))
        for start in track(range(starts[0], end, together), "last hidden states of the dense model"):
            ids = sequences[start : min(start + together, end)]
            _, (found,) = evaluator.final_states([None], ids, apart=batch if launched() or together > batch else None)
            if not bool(torch.isfinite(found).all()):
                blocks = evaluator.live.blocks
                what, row = blocks.where_non_finite(ids) or ("the last hidden states", 0)
                raise EvoPressError(
                    f"the dense model's hidden states are not finite on sequences {start} to {start + len(found) - 1}, "
                    f"first {what} on sequence {start + row}: {blocks.advice}"
                )
            parts.append(found.cpu())
        return torch.cat(parts)

    return stack_shards(range(0, len(sequences), batch), states)


class _Work(NamedTuple):
    """Some first tokens of rows, on which some genomes are measured."""

    rows: tuple[int, ...]
    length: int
    of: range
    """Which genomes."""
