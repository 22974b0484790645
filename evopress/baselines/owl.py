"""The OWL baseline: blocks with more outliers are pruned less; inside a block the sparsity is uniform.

Source: OWL (arXiv:2310.05175) as the paper uses it (section 4.2): the same sparsity for all units of a block, and of the grid of
λ and M the pair with the best perplexity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from torch import Tensor

from evopress.baselines.baseline import Problem
from evopress.baselines.block_sparsity import BlockSparsity, Candidate
from evopress.compress.wanda import wanda_scores

LAMBDAS = (0.02, 0.05, 0.08, 0.1, 0.2)
"""λ of the paper's grid: greatest deviation from the target, in sparsity."""
MULTIPLES = (3.0, 5.0, 7.0, 10.0)
"""M of the paper's grid: an outlier is above M times the mean."""
GRID = tuple(product(LAMBDAS, MULTIPLES))
"""All pairs (λ, M), in the order of the authors' files."""


@dataclass(frozen=True)
class Owl(BlockSparsity):
    """OWL's best genome over the paper's grid; the outlier ratios come from the Hessians that the run's database left behind."""

    name = "owl"
    num_candidates = len(GRID)

    def candidates(self, problem: Problem) -> list[Candidate]:
        """See `BlockSparsity`."""
        blocks, hessians = problem.blocks, problem.hessians()
        ratios = []
        for index in range(len(blocks.blocks)):
            stored, slots = hessians.read(index), blocks.slots(index)
            H = [stored.hessians[stored.owners[name]] for name in slots]
            ratios.append(outlier_ratios([slot.weight for slot in slots.values()], H))
        columns = dict(zip(MULTIPLES, zip(*ratios, strict=True), strict=True))
        return [Candidate(columns[multiple], lambda_, f"λ = {lambda_:g}, M = {multiple:g}") for lambda_, multiple in GRID]


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
