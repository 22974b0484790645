"""The OWL baseline: blocks with more outliers are pruned less; inside a block the sparsity is uniform.

Source: OWL (arXiv:2310.05175) as the paper uses it (section 4.2): the same sparsity for all units of a block, and of the grid of
λ and M the pair with the best perplexity.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from torch import Tensor

from evopress.baselines.baseline import WEIGHTS, Baseline, Pass, Planned, Problem
from evopress.compress.sparse import PruneTo, SparsityLevels, kept_at
from evopress.compress.wanda import wanda_scores
from evopress.errors import EvoPressError
from evopress.settings import RunSettings
from evopress.units import Genome

logger = logging.getLogger(__name__)

LAMBDAS = (0.02, 0.05, 0.08, 0.1, 0.2)
"""λ of the paper's grid: greatest deviation from the target, in sparsity."""
MULTIPLES = (3.0, 5.0, 7.0, 10.0)
"""M of the paper's grid: an outlier is above M times the mean."""
GRID = tuple(product(LAMBDAS, MULTIPLES))
"""All pairs (λ, M), in the order of the authors' files."""


@dataclass(frozen=True)
class Owl(Baseline):
    """OWL's best genome over the paper's grid, in levels of the run's database followed by those of a second one.

    The outlier ratios and the second database, pruned as the first is, come from the Hessians that the first left behind; the best
    of the grid is that with the least perplexity on calibration text.
    """

    tokens: int
    """Calibration tokens whose perplexity chooses."""
    serves = (WEIGHTS,)
    not_counted = "its own levels"

    def check(self, run: RunSettings) -> None:
        """See `Baseline`."""
        if run.method.name != "sparsity":
            raise EvoPressError(f"baseline owl is of method sparsity, not {run.method.name}: leave it out of baselines.names")
        if run.method.include != ["blocks"]:
            raise EvoPressError(
                f"baseline owl divides sparsity over blocks, not over what lies outside them (method.include="
                f"{run.method.include}): leave it out of baselines.names, or include blocks alone"
            )
        if not run.level_db.keep_hessians:
            raise EvoPressError(
                "baseline owl needs the Hessians kept: set level_db.keep_hessians=true, or leave it out of baselines.names"
            )
        if not 2 <= self.tokens <= run.data.calibration_tokens:
            raise EvoPressError(
                f"baselines.owl_tokens={self.tokens} is out of range: expected 2 to data.calibration_tokens="
                f"{run.data.calibration_tokens}; change one of them"
            )

    def passes(self, plan: Planned) -> list[Pass]:
        """See `Baseline`."""
        return [Pass(len(GRID) + 1, self.tokens)]

    def find(self, problem: Problem) -> dict[str, Genome]:
        """See `Baseline`."""
        blocks, hessians, pruner = problem.blocks, problem.hessians(), problem.compressor()
        assert isinstance(pruner, SparsityLevels)
        num_blocks = len(blocks.blocks)
        logger.info("OWL: a grid of %d", len(GRID))
        slots = [blocks.slots(index) for index in range(num_blocks)]
        ratios = []
        for index in range(num_blocks):
            stored = hessians.read(index)
            H = [stored.hessians[stored.owners[name]] for name in slots[index]]
            ratios.append(outlier_ratios([slot.weight for slot in slots[index].values()], H))
        sizes = [[slot.weight.numel() for slot in block.values()] for block in slots]
        names = [name for block in slots for name in block]
        kept_by_pair = []
        for lambda_, multiple in GRID:
            column = MULTIPLES.index(multiple)
            kept = owl_kept([ratio[column] for ratio in ratios], sizes, sparsity=problem.budget.target, lambda_=lambda_)
            kept_by_pair.append([count for block in kept for count in block])
        choices = {name: sorted({kept[i] for kept in kept_by_pair}, reverse=True) for i, name in enumerate(names)}
        levels = problem.add_levels("owl", PruneTo(pruner=pruner, kept=choices))
        genomes = [
            levels.genome_of_last(tuple(choices[name].index(count) for name, count in zip(names, kept, strict=True)))
            for kept in kept_by_pair
        ]
        text = problem.calibration_tokens
        scores = problem.measure(genomes, text[: max(self.tokens // text.shape[1], 1)], what="OWL's grid")
        best = min(range(len(GRID)), key=lambda i: scores[i].perplexity)
        lambda_, multiple = GRID[best]
        logger.info("OWL: λ = %g, M = %g is best on calibration text (perplexity %.2f)", lambda_, multiple, scores[best].perplexity)
        return {"owl": genomes[best]}


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
