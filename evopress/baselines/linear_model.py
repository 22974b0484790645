"""The linear model: KL ≈ Σ α_u t_u², t_u² = ‖Q - W‖² / ‖W‖² of each weight's level, with coefficients fitted to noise.

Source: the linearity theorem of HIGGS (arXiv:2411.17525): Gaussian noise of known relative size on one weight at a time, all others
dense, and least squares through the origin. What is fitted is the KL divergence.
"""

from __future__ import annotations

import math
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from evopress.baselines.allocation import TOGETHER, Allocator, measured_alone
from evopress.baselines.baseline import Pass, Planned, Problem, remembered
from evopress.data.minibatch import Minibatch
from evopress.data.tokens import tokens_digest
from evopress.errors import EvoPressError
from evopress.levels.noise import NoisyLevels
from evopress.settings import RunSettings
from evopress.units import is_module


@dataclass(frozen=True)
class LinearModel(Allocator):
    """The genome with the least sum of α t²."""

    tokens: int = 512
    """Search tokens of each measurement, at most."""
    sizes: Sequence[float] = (0.01, 0.03, 0.1)
    """t² of the noise that the coefficients are fitted to."""
    name = "linear_model"

    def check(self, run: RunSettings) -> None:
        """See `Baseline`."""
        super().check(run)
        if not self.sizes or not all(0 < size < 1 for size in self.sizes):
            raise EvoPressError(
                f"baselines.options.linear_model.sizes={list(self.sizes)} is out of range: expected relative "
                "errors, between 0 and 1"
            )

    def passes(self, plan: Planned) -> list[Pass]:
        """See `Baseline`."""
        count = len(self.sizes) * sum(not is_module(unit) for unit in plan.space.units)
        return [Pass(count, min(self.tokens, plan.search_tokens), together=TOGETHER, alone=True, shared=self.name)]

    def values(
        self, problem: Problem, minibatch: Minibatch, ids: Tensor, kept: MutableMapping[str, Any]
    ) -> list[list[float | None]]:
        """See `Allocator`."""
        noise = NoisyLevels(problem.space, problem.blocks, self.sizes, seed=int(tokens_digest(ids)[:8], 16))
        measured = measured_alone(problem, ids, kept, levels=noise)
        errors = remembered(problem, kept, "errors", lambda: relative_errors(problem))
        return [
            [] if not of_unit else [None if alpha is None else alpha * error for error in errors[i]]
            for i, of_unit in enumerate(measured)
            for alpha in [coefficient(self.sizes, of_unit)]
        ]


def coefficient(sizes: Sequence[float], measured: Sequence[float | None]) -> float | None:
    """Return α of KL ≈ α t² by least squares through the origin; None if nothing finite was measured."""
    points = [(size, kl) for size, kl in zip(sizes, measured, strict=False) if kl is not None and math.isfinite(kl)]
    return sum(size * kl for size, kl in points) / sum(size**2 for size, _ in points) if points else None


def relative_errors(problem: Problem) -> list[list[float]]:
    """Return ‖Q - W‖² / ‖W‖² of every unit at every level, of all its weights together."""
    space, blocks = problem.space, problem.blocks
    sums, errors = [0.0] * len(space), [[0.0] * len(unit.levels) for unit in space.units]
    numbers = {unit.name: number for number, unit in enumerate(space.whole.units)}
    for part in blocks.parts:
        for slot in blocks.slots(part).values():
            place, W = space.places[slot.name], slot.weight.float()
            sums[place] += float(W.square().sum())
            for level in range(len(errors[place])):
                Q = problem.levels.read(numbers[slot.name], level, W.device).decode()
                errors[place][level] += float((Q.float() - W).square().sum())
    return [[error / norm if norm else 0.0 for error in of_unit] for of_unit, norm in zip(errors, sums, strict=True)]
