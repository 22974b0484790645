"""ALPS: a unit's mask and its kept weights found together, by the alternating direction method of multipliers (ADMM).

Where SparseGPT decides on one block of columns after the other and never looks back, this moves the whole unit's mask as long as
that lowers the error tr((W - V) H (W - V)ᵀ): V = D + U splits into weights D that keep the count and a dual U where D is pruned,
and the best unrestricted weights near D - U pull both along. The dual of a pruned weight is its slope over ρ, so a pruned weight
that would be missed more than a kept one takes its place.

R rows, C columns. All weights here are times the square root of H's diagonal, so that a weight's square is what its own loss costs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from evopress.compress.sparse import lowest

WALK = 0.5
"""ρ of the walk: H's diagonal is 1, and a small ρ lets the mask move far."""
FIRST_STEPS, STEPS = 6, 2
"""Steps of the walk for the first count, from the dense weight, and for each further one, from the last."""
FINISH = (0.7, 1.0)
"""ρ of the steps that bring what is yielded to rest; the walk goes on from before them."""
RELAXATION = 1.6
"""Share of each step that is taken, in (0, 2)."""


def regularized(H: Tensor) -> tuple[Tensor, dict[float, Tensor]]:
    """Return the scale of each column and the inverses of the scaled H + ρI that `walk` needs, by ρ.

    Args: H float32 [C, C], positive definite; left as it is.

    Returns: scale float32 [C], the square root of H's diagonal; inverses float32 [C, C].
    """
    scale = H.diagonal().sqrt()
    inverses = {}
    for rho in (WALK, *FINISH):
        shifted = (H / scale).div_(scale.unsqueeze(1))
        shifted.diagonal().add_(rho)
        inverses[rho] = torch.cholesky_inverse(torch.linalg.cholesky(shifted))
    return scale, inverses


def walk(W: Tensor, scale: Tensor, inverses: Mapping[float, Tensor], counts: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """Prune a weight to one count after the other, each from where the last one led.

    Source: ALPS (arXiv:2406.07831), Algorithm 1. Differs from it: over-relaxed; a few steps at each of three ρ instead of a
    schedule that ends when the mask rests; neighbouring counts share their way; no conjugate gradients at the end, which take
    longer than further steps for the same gain (experiments/LOG.md).

    Args:
        W: weight, float32 [R, C]; left as it is.
        scale, inverses: of its damped Hessian, see `regularized`.
        counts: weights to keep, descending, each in 1..size - 1.

    Yields: the pruned weight float32 [R, C] and its mask bool [R, C], true where a weight is kept.
    """
    W = W * scale
    split, pruned = W, torch.zeros_like(W, dtype=torch.bool)
    for index, count in enumerate(counts):
        for _ in range(STEPS if index else FIRST_STEPS):
            split, pruned = _step(W, split, pruned, inverses[WALK], WALK, count)
        rho, last, out = WALK, split, pruned
        for tighter in FINISH:
            last = torch.where(out, last * (rho / tighter), last)  # the dual is a slope over ρ
            rho = tighter
            last, out = _step(W, last, out, inverses[rho], rho, count)
        yield last.masked_fill(out, 0.0).div_(scale), ~out


def _step(W: Tensor, split: Tensor, pruned: Tensor, inverse: Tensor, rho: float, count: int) -> tuple[Tensor, Tensor]:
    """Take one step of ADMM.

    Args: split: weights D where kept and their dual U where pruned, float32 [R, C]; inverse: of H + ρI, float32 [C, C].

    Returns: the new split and the new mask, bool [R, C], true where a weight is pruned.
    """
    towards = torch.where(pruned, -split, split).sub_(W)  # D - U - W
    best = torch.addmm(W, towards, inverse, alpha=rho)  # the minimum of tr((W - X) H (W - X)ᵀ) + ρ ‖X - D + U‖²
    split = torch.where(pruned, split, (1.0 - RELAXATION) * split).add_(best, alpha=RELAXATION)
    pruned = lowest(torch.abs(split, out=best).reshape(-1), split.numel() - count).reshape(split.shape)
    return split, pruned
