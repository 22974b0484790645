"""First-order gradient scores: |∂ loss / ∂W ∘ (Q - W)|, summed over the weight, in the model that has the level everywhere.

Source: AutoScheme of AutoRound (its DeltaLoss, arXiv:2512.04746), with its batches of 8 sequences, on levels of any kind.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from evopress.baselines.allocation import SEQUENCES, Allocator, by_unit, key_of, levels_everywhere, scored
from evopress.baselines.baseline import Pass, Planned, Problem, remembered
from evopress.data.minibatch import Minibatch
from evopress.fitness.gradients import first_order
from evopress.progress import track
from evopress.units import Genome


@dataclass(frozen=True)
class FirstOrder(Allocator):
    """The genome with the least sum of first-order scores."""

    tokens: int = 4096
    """Search tokens that go forward and backward at every level, at most."""
    name = "first_order"

    def passes(self, plan: Planned) -> list[Pass]:
        """See `Baseline`."""
        count = len(levels_everywhere(plan.space))
        return [Pass(count, min(self.tokens, plan.search_tokens), on_search_text=True, backward=True, shared=self.name)]

    def values(self, problem: Problem, minibatch: Minibatch, ids: Tensor, kept: MutableMapping[str, Any]) -> list[list[float]]:
        """See `Allocator`."""
        scores = []
        for genome in track(levels_everywhere(problem.space), "scores by gradients, levels"):

            def measure(genome: Genome = genome) -> list[float]:
                return scored(problem, genome, [genome], minibatch, first_order, together=SEQUENCES)[0]

            scores.append(remembered(problem, kept, key_of(problem.space, [genome]), measure))
        return by_unit(problem.space, scores)
