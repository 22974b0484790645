"""Measure genomes on text that no search has seen: KL divergence to the dense model, top-1 agreement, perplexity."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evopress.fitness.measures import HeldOut
from evopress.fitness.population import Evaluator, measure_sums
from evopress.progress import track
from evopress.units import Genome


@dataclass(frozen=True)
class Scores:
    """A genome's measurements on one data set."""

    kl: float
    """Nats per token, KL(dense ‖ compressed)."""
    perplexity: float
    top1_agreement: float
    """Share of tokens whose most likely next token is the dense model's."""
    num_tokens: int
    """Predicted tokens."""


def measure_held_out(
    evaluator: Evaluator,
    genomes: Sequence[Genome | None],
    sequences: Tensor,
    *,
    batch_tokens: int = 4096,
    chunk_tokens: int = 256,
    what: str = "evaluating",
) -> list[Scores]:
    """Measure genomes (None: the dense model) on sequences, all of them on the same tokens.

    Args:
        sequences: token ids int64 [N, L].
        batch_tokens: tokens per pass of the population over the blocks.
    """
    measure = HeldOut()
    batch = max(batch_tokens // sequences.shape[1], 1)
    sums = torch.zeros(len(genomes), len(measure.names), dtype=torch.float64)
    count = 0
    for start in track(range(0, len(sequences), batch), what):
        # The dense model comes first, so that its last hidden states are the base of the others' KL divergence.
        part, n = measure_sums(
            evaluator, [None, *genomes], sequences[start : start + batch], None, measure, chunk_tokens=chunk_tokens
        )
        sums += part[1:]
        count += n
    return [
        Scores(kl=max(kl, 0.0), perplexity=math.exp(nll) if nll < 700 else math.inf, top1_agreement=top1, num_tokens=count)
        for kl, nll, top1 in (sums / max(count, 1)).tolist()
    ]


def scores_by_data_set(
    evaluator: Evaluator,
    genomes: Mapping[str, Genome | None],
    data_sets: Mapping[str, Tensor],
    *,
    batch_tokens: int,
    chunk_tokens: int,
) -> dict[str, dict[str, Scores]]:
    """Measure named genomes on named data sets: name to data set to scores."""
    scores: dict[str, dict[str, Scores]] = {name: {} for name in genomes}
    for data_set, sequences in data_sets.items():
        results = measure_held_out(
            evaluator,
            list(genomes.values()),
            sequences,
            batch_tokens=batch_tokens,
            chunk_tokens=chunk_tokens,
            what=f"evaluating on {data_set}",
        )
        for name, result in zip(genomes, results, strict=True):
            scores[name][data_set] = result
    return scores
