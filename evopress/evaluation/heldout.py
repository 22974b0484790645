"""Measure genomes on text that no search has seen: how far their predictions are from the dense model's, and perplexity."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from evopress.fitness.measures import HeldOut
from evopress.fitness.population import Evaluator, measure_sequences, walked_together
from evopress.progress import track
from evopress.ranks import batch_within_share, collective, launched, map_shards
from evopress.units import Genome

MEASURES = HeldOut().names
"""What is kept of every sequence, each a mean over its tokens; perplexity as negative log-likelihood in nats."""
MEANS = tuple(name for name in MEASURES if name != "nll")
"""Those of them that are reported as means over tokens."""


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
    acceptance_rate: float = math.nan
    """Mean of Σ min(p, q): the share of tokens that lossless speculative decoding keeps if this model drafts for the dense one."""
    flips: float = math.nan
    """Share of tokens that either this model or the dense one predicts rightly as the most likely, and the other does not."""
    by_sequence: Mapping[str, tuple[float, ...]] = field(default_factory=dict, compare=False, repr=False)
    """Mean of each of `MEASURES` over every sequence's tokens, so that genomes can be compared sequence by sequence."""

    @classmethod
    def of(cls, sums: Tensor, tokens: int) -> Scores:
        """Make scores of sums over sequences of so many predicted tokens each.

        Args: sums: float64 [measures, N], the measures in the order of `MEASURES`.
        """
        means = dict(zip(MEASURES, (sums.sum(-1) / max(tokens * sums.shape[-1], 1)).tolist(), strict=True))
        return cls(
            kl=max(means["kl"], 0.0),
            perplexity=math.exp(means["nll"]) if means["nll"] < 700 else math.inf,
            top1_agreement=means["top1_agreement"],
            acceptance_rate=min(means["acceptance_rate"], 1.0),
            flips=means["flips"],
            num_tokens=tokens * sums.shape[-1],
            by_sequence={name: tuple(row) for name, row in zip(MEASURES, (sums / max(tokens, 1)).tolist(), strict=True)},
        )

    def means(self) -> dict[str, float]:
        """Return what is reported as a mean over tokens, by name."""
        return {name: getattr(self, name) for name in MEANS}

    def first(self, count: int) -> Scores:
        """Return the scores on the first sequences alone."""
        tokens = self.num_tokens // len(self.by_sequence[MEASURES[0]])
        sums = torch.tensor([self.by_sequence[name][:count] for name in MEASURES], dtype=torch.float64) * tokens
        return Scores.of(sums, tokens)


@collective
def measure_held_out(
    evaluator: Evaluator,
    genomes: Sequence[Genome | None],
    sequences: Tensor,
    *,
    base: Tensor | None = None,
    batch_tokens: int = 4096,
    chunk_tokens: int = 256,
    what: str = "evaluating",
) -> list[Scores]:
    """Measure genomes (None: the dense model) on sequences, all of them on the same tokens.

    Args:
        sequences: token ids int64 [N, L].
        base: the dense model's last hidden states [N, L, d], where they are at hand; None: they are computed on the way.
        batch_tokens: tokens per pass of the population over the blocks, where these lie on the device.
    """
    measure = HeldOut()
    batch = batch_within_share(len(sequences), max(batch_tokens // sequences.shape[1], 1))
    # The dense model comes first where its last hidden states are the base of the others' KL divergence.
    measured, extra = (list(genomes), 0) if base is not None else ([None, *genomes], 1)

    together = walked_together(evaluator.live.blocks, len(measured), sequences.shape[1], batch)

    def sums(starts: Sequence[int]) -> Tensor:
        found, end = [], min(starts[-1] + batch, len(sequences))
        for start in track(range(starts[0], end, together), what):
            those = slice(start, min(start + together, end))
            found.append(
                measure_sequences(
                    evaluator,
                    measured,
                    sequences[those],
                    None if base is None else base[those],
                    measure,
                    chunk_tokens=chunk_tokens,
                    apart=batch if launched() or together > batch else None,
                )[extra:]
            )
        return torch.cat(found, dim=-1)

    found = torch.cat(map_shards(range(0, len(sequences), batch), sums), dim=-1)
    return [Scores.of(each, sequences.shape[1] - 1) for each in found]


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
