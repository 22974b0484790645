"""AlphaPruning: blocks whose weights have spectra with lighter tails are pruned more; inside a block the sparsity is uniform.

Source: AlphaPruning (arXiv:2410.10912). A weight's score is the exponent α of a power law in the tail of the eigenvalues of WᵀW, by
Hill's estimator; a block's is the mean of its weights'. Sparsity is linear in it, from (1 - τ) to (1 + τ) times the target. Differs
from it: the target is met by shifting all sparsities, there by scaling them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from evopress.baselines.baseline import Problem, remembered
from evopress.baselines.block_sparsity import BlockSparsity, Candidate
from evopress.models.blocks import BlockModel
from evopress.progress import track

TAUS = (0.1, 0.2, 0.3, 0.4, 0.5)
"""τ of the trials."""
_BINS = 100


@dataclass(frozen=True)
class AlphaPruning(BlockSparsity):
    """The best spread of sparsities by the tails of spectra; text only chooses the spread."""

    name = "alphapruning"
    num_candidates = len(TAUS)

    def candidates(self, problem: Problem) -> list[Candidate]:
        """See `BlockSparsity`."""
        blocks, kept, scores = problem.blocks, problem.kept(self.name, {}), []
        for index in track(range(len(blocks.blocks)), "spectra of the blocks' weights"):
            exponent = remembered(problem, kept, str(index), partial(_mean_exponent, blocks, index))
            scores.append(-math.inf if exponent is None else -exponent)  # what is not finite is null in the file
        return [Candidate(scores, tau * problem.budget.target, f"τ = {tau:g}") for tau in TAUS]


def tail_exponent(W: Tensor) -> float:
    """Return α of p(λ) ∝ λ^-α in the tail of the eigenvalues of WᵀW, by Hill's estimator: 1 + k / Σ ln(λ / λ_min).

    The tail begins at the peak of the spectrum, the fullest of 100 bins of ln λ.

    Args: W: [R, C], any floating dtype.
    """
    logs = 2 * torch.linalg.svdvals(W.float()).double().cpu().clamp(min=1e-30).log()
    start, width = float(logs.min()), float(logs.max() - logs.min()) / _BINS
    peak = int(torch.histc(logs, bins=_BINS).argmax())
    tail = logs[logs >= start + peak * width]
    excess = float((tail - tail.min()).sum())
    return 1 + len(tail) / excess if excess > 0 else float("inf")


def _mean_exponent(blocks: BlockModel, index: int) -> float:
    """Return the mean of a block's tail exponents."""
    exponents = [tail_exponent(slot.weight.to(blocks.device)) for slot in blocks.slots(index).values()]
    return sum(exponents) / len(exponents)
