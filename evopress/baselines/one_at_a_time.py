"""One at a time: the KL divergence of the model with one weight at a level and all others dense, measured for every level.

Source: what `auto_quantize` of NVIDIA's ModelOpt measures with `method="kl_div"`; here an integer program on it.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from evopress.baselines.allocation import TOGETHER, Allocator, levels_of_weights, measured_alone
from evopress.baselines.baseline import Pass, Planned, Problem
from evopress.data.minibatch import Minibatch


@dataclass(frozen=True)
class OneAtATime(Allocator):
    """The genome with the least sum of what each weight's level adds by itself."""

    tokens: int = 512
    """Search tokens of each measurement, at most."""
    name = "one_at_a_time"

    def passes(self, plan: Planned) -> list[Pass]:
        """See `Baseline`."""
        count = sum(levels_of_weights(plan.space))
        return [Pass(count, min(self.tokens, plan.search_tokens), together=TOGETHER, shared=self.name)]

    def values(
        self, problem: Problem, minibatch: Minibatch, ids: Tensor, kept: MutableMapping[str, Any]
    ) -> list[list[float | None]]:
        """See `Allocator`."""
        return measured_alone(problem, ids, kept)
