"""Fisher scores: (∂ loss / ∂y)² ∘ ((Q - W) x)², summed over tokens and outputs, in the dense model.

Source: `auto_quantize` of NVIDIA's ModelOpt: the second order of the loss in a layer's output y = W x, the Fisher information's
diagonal in the place of the Hessian. One pass serves all levels.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from evopress.baselines.allocation import Allocator, by_unit, key_of, levels_everywhere, scored
from evopress.baselines.baseline import Pass, Planned, Problem, remembered
from evopress.data.minibatch import Minibatch
from evopress.fitness.gradients import fisher


@dataclass(frozen=True)
class Fisher(Allocator):
    """The genome with the least sum of Fisher scores."""

    tokens: int = 16384
    """Search tokens that go forward and backward, at most."""
    name = "fisher"

    def passes(self, plan: Planned) -> list[Pass]:
        """See `Baseline`."""
        tokens, errors = min(self.tokens, plan.search_tokens), len(levels_everywhere(plan.space))
        return [Pass(1, tokens, on_search_text=True, backward=True, errors=errors, shared=self.name)]

    def values(self, problem: Problem, minibatch: Minibatch, ids: Tensor, kept: MutableMapping[str, Any]) -> list[list[float]]:
        """See `Allocator`."""
        levels, together = levels_everywhere(problem.space), max(problem.batch_tokens // ids.shape[1], 1)
        key = key_of(problem.space, levels)
        scores = remembered(problem, kept, key, lambda: scored(problem, None, levels, minibatch, fisher, together=together))
        return by_unit(problem.space, scores)
