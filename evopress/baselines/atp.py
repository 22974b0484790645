"""The linear ramp of ATP: the sparsity of blocks rises from the first to the last in equal steps.

Source: ATP (arXiv:2502.14770): sparsities are an arithmetic progression around the target, whose common difference is found in a
few trials. Differs from it: the mean is weighted by the blocks' weights.
"""

from __future__ import annotations

from dataclasses import dataclass

from evopress.baselines.baseline import Problem
from evopress.baselines.block_sparsity import BlockSparsity, Candidate

TRIALS = 9
"""The ramp reaches 10, 20, … 90% of the way from the target to the nearer of 0 and 1."""


@dataclass(frozen=True)
class LinearRamp(BlockSparsity):
    """The best ramp."""

    name = "atp"
    num_candidates = TRIALS

    def candidates(self, problem: Problem) -> list[Candidate]:
        """See `BlockSparsity`."""
        count, target = len(problem.blocks.blocks), problem.budget.target
        steepest = min(target, 1 - target)
        reaches = [trial / (TRIALS + 1) * steepest for trial in range(1, TRIALS + 1)]
        return [Candidate([-float(block) for block in range(count)], reach, f"λ = {reach:.3g}") for reach in reaches]
