"""Two scores of what a level costs by gradients of the loss, without trying it, as other tools have them.

The loss is the negative log-likelihood of the text's next tokens. With y = W x of a unit, Q a level of it, Δ = Q - W and g = ∂/∂y:

first order   Σ |(Σ_t g xᵀ) ∘ Δ|    in the model that has the level everywhere; the inner sum goes over all tokens of a call
              Source: AutoScheme of AutoRound (arXiv:2512.04746).
Fisher        Σ_t Σ g² ∘ (Δ x)²     in the dense model, so that one pass serves all levels
              Source: `auto_quantize` of NVIDIA's ModelOpt, its Fisher information on a layer's outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from evopress.fitness.backward import BackwardPass, Entry
from evopress.fitness.measures import NegativeLogLikelihood
from evopress.levels.live import Live
from evopress.units import Genome

Score = Callable[[Entry, Tensor], Tensor]
"""A number for what a unit saw and an error Δ, [R, C]: spread evenly over the sequences, float64 [sequences]."""


def first_order(entry: Entry, delta: Tensor) -> Tensor:
    """Return the sum of |∂/∂W ∘ Δ|, the gradient being that of all sequences together."""
    return _evenly((entry.of_weight() * delta.float()).abs().sum(), entry)


def fisher(entry: Entry, delta: Tensor) -> Tensor:
    """Return the sum of (∂/∂y)² ∘ (Δ x)² over tokens and outputs."""
    change = nn.functional.linear(entry.entered, delta).float()
    return _evenly((entry.gradient.float() * change).square().sum(dtype=torch.float64), entry)


def _evenly(score: Tensor, entry: Entry) -> Tensor:
    return (score.double() / entry.num_sequences).expand(entry.num_sequences)


def gradient_scores(
    live: Live,
    genome: Genome | None,
    errors_of: Sequence[Genome],
    ids: Tensor,
    base: Tensor,
    score: Score,
    *,
    chunk_tokens: int = 256,
) -> Tensor:
    """Return the score of every unit's level in each of some genomes, by gradients of the model at one; it is dense afterwards.

    Args:
        genome: where gradients are taken; None: in the dense model.
        errors_of: the genomes.
        ids: token ids int64 [b, l], l ≥ 2, which go forward and backward together.
        base: the dense model's last hidden states [b, l', d], l' ≥ l, in host memory.

    Returns: float64 [genomes, units], sums over all sequences, per predicted token of one; 0 for a unit outside the blocks.

    Raises: EvoPressError if one is not finite.
    """
    back = BackwardPass(
        live,
        genome,
        ids,
        base,
        NegativeLogLikelihood(),
        errors_of=errors_of,
        score=score,
        max_tokens_in_flight=ids.numel(),
        chunk_tokens=chunk_tokens,
    )
    return back.run()[0].sum(1)
