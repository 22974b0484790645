"""The OWL baseline: blocks with more outliers are pruned less; inside a block the sparsity is uniform.

Source: OWL (arXiv:2310.05175) as the paper uses it (section 4.2): the same sparsity for all units of a block, and of the grid of
λ and M the pair with the best perplexity.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

import numpy as np
from torch import Tensor

from evopress.compress.sparse import kept_at
from evopress.compress.wanda import wanda_scores
from evopress.errors import EvoPressError

LAMBDAS = (0.02, 0.05, 0.08, 0.1, 0.2)
"""λ of the paper's grid: greatest deviation from the target, in sparsity."""
MULTIPLES = (3.0, 5.0, 7.0, 10.0)
"""M of the paper's grid: an outlier is above M times the mean."""
GRID = tuple(product(LAMBDAS, MULTIPLES))
"""All pairs (λ, M), in the order of the authors' files."""


def outlier_ratios(weights: Sequence[Tensor], hessians: Sequence[Tensor], multiples: Sequence[float] = MULTIPLES) -> list[float]:
    """Return a block's outlier ratio for each M: the share of |w| · ‖x‖ above M times their mean.

    The mean and the share go over all weights of the block together. Scores are float32, their sum float64.

    Args:
        weights: all linear weights of one block, [R, C] each, any floating dtype.
        hessians: the Hessian of each one's input, float32 [C, C], from the same sequences.
        multiples: values of M.
    """
    scores = [wanda_scores(W.to(H.device).float(), H) for W, H in zip(weights, hessians, strict=True)]
    size = sum(score.numel() for score in scores)
    mean = sum(float(score.double().sum()) for score in scores) / size
    return [sum(int((score > M * mean).sum()) for score in scores) / size for M in multiples]


def block_sparsities(ratios: Sequence[float], sizes: Sequence[Sequence[int]], *, sparsity: float, lambda_: float) -> list[float]:
    """Map outlier ratios to one sparsity per block: s - r + mean(r), r = 2λ · (ratio - min) / (max - min).

    The mean is weighted by the blocks' weights, so the average over weights is s. Differs from the authors' code where that leaves
    [0, 1): there sparsities are clipped to 0 below, and above so that the block's smallest unit keeps one weight; mean(r) is
    replaced by the one number with which the clipped sparsities average s. Equal ratios give s everywhere.

    Args:
        ratios: outlier ratio of every block.
        sizes: weights of the units of every block.
        sparsity: target s in (0, 1).
        lambda_: λ, greatest deviation, 0 or more.

    Raises: EvoPressError if λ is negative, a ratio is not finite, or s is above what these clipped sparsities can average.
    """
    if not lambda_ >= 0.0:
        raise EvoPressError(f"OWL's lambda {lambda_:g} must be 0 or more: the paper's grid is {', '.join(map(str, LAMBDAS))}")
    ratio = np.asarray(ratios, dtype=np.float64)
    if len(ratio) != len(sizes) or not np.isfinite(ratio).all():
        raise EvoPressError(
            f"OWL's outlier ratios {list(ratios)} must be one finite number for each of {len(sizes)} blocks: check the model's "
            "activations on the calibration text"
        )
    share = np.array([sum(block) for block in sizes], dtype=np.float64)
    share /= share.sum()
    most = np.array([1.0 - 1.0 / min(block) for block in sizes])
    if sparsity > share @ most:
        raise EvoPressError(f"sparsity={sparsity:g} leaves units without a weight: choose at most {share @ most:g}")
    spread = ratio.max() - ratio.min()
    r = 2.0 * lambda_ * (ratio - ratio.min()) / spread if spread else np.zeros_like(ratio)
    low = high = float(share @ r)
    if (sparsity - r + low < 0.0).any() or (sparsity - r + high > most).any():
        low, high = -1.0, 1.0 + float(r.max())  # all blocks clipped to 0, all to most
        for _ in range(100):  # halving ends at the resolution of a double
            middle = (low + high) / 2.0
            if share @ np.clip(sparsity - r + middle, 0.0, most) < sparsity:
                low = middle
            else:
                high = middle
    return [float(value) for value in np.clip(sparsity - r + high, 0.0, most)]


def owl_kept(ratios: Sequence[float], sizes: Sequence[Sequence[int]], *, sparsity: float, lambda_: float) -> list[list[int]]:
    """Return the weights that every unit of every block keeps, as many in all as uniform sparsity keeps.

    Each unit gets its block's share rounded down; the weights then missing go one each to the units that lost the largest fractions
    and are not full yet.

    Args, errors: as `block_sparsities`.
    """
    sparsities = block_sparsities(ratios, sizes, sparsity=sparsity, lambda_=lambda_)
    flat = [size for block in sizes for size in block]
    ideal = [(1.0 - s) * size for s, block in zip(sparsities, sizes, strict=True) for size in block]
    kept = [min(math.floor(x), size) for x, size in zip(ideal, flat, strict=True)]
    missing = sum(kept_at(size, sparsity) for size in flat) - sum(kept)
    order = sorted(range(len(flat)), key=lambda i: kept[i] - ideal[i])
    while missing:  # a unit is off by a weight and a half at most, so a few turns end it
        step = 1 if missing > 0 else -1
        open_units = [i for i in (order if step > 0 else order[::-1]) if 0 <= kept[i] + step <= flat[i]]
        assert open_units, "the uniform target keeps more weights than there are"
        for i in open_units[: abs(missing)]:
            kept[i] += step
        missing -= step * min(abs(missing), len(open_units))
    units = iter(kept)
    return [[next(units) for _ in block] for block in sizes]
