"""Scores of levels the plain way: the whole model's own gradients, all sequences one after the other."""

from __future__ import annotations

import copy
from typing import Any

import torch
from attribution_literal import loss_of, model_at, weights_at
from torch import Tensor

from evopress.fitness.measures import KLDivergence, NegativeLogLikelihood
from evopress.levels.live import LiveModel
from evopress.models.experts import named_linear
from evopress.units import Genome


def first_order_plainly(live: LiveModel, genome: Genome, ids: Tensor) -> list[float]:
    """Return Σ |∂/∂W ∘ (Q - W)| of every unit at a genome, of the mean loss over a sequence, summed over sequences."""
    pairs = weights_at(live, genome)
    model, parameters = model_at(live, [level for level, _ in pairs], dtype=torch.float32)
    for sequence in ids.split(1):
        loss_of(model, live, sequence, NegativeLogLikelihood()).backward()
    return [
        float(sum(abs(float(g) * float(d)) for g, d in zip(p.grad.flatten(), (level - dense).flatten(), strict=True)))
        for p, (level, dense) in zip(parameters, pairs, strict=True)
    ]


def fisher_plainly(live: LiveModel, genome: Genome, ids: Tensor) -> list[float]:
    """Return Σ (∂/∂y)² ∘ ((Q - W) x)² of every unit in the dense model, y its output, over all tokens, of the summed loss."""
    pairs, model = weights_at(live, genome), copy.deepcopy(live.blocks.model).float().requires_grad_()
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for unit in live.space.units:

        def keep(module: Any, inputs: Any, output: Any, name: str = unit.name) -> None:
            output.retain_grad()
            seen[name] = inputs[0].detach(), output

        named_linear(model, unit.name).register_forward_hook(keep)
    found = [0.0] * len(pairs)
    for sequence in ids.split(1):
        (loss_of(model, live, sequence, NegativeLogLikelihood()) * (ids.shape[1] - 1)).backward()
        for i, (unit, (level, dense)) in enumerate(zip(live.space.units, pairs, strict=True)):
            inputs, outputs = seen[unit.name]
            for x, g in zip(inputs[0], outputs.grad[0], strict=True):
                found[i] += float(((g * ((level - dense).float() @ x)) ** 2).sum())
    return found


def kl_alone_plainly(live: LiveModel, unit: int, weight: Tensor, ids: Tensor) -> float:
    """Return the KL divergence to the dense model of one that has this weight in one unit."""
    weights = [dense for _, dense in weights_at(live, (0,) * len(live.space))]
    weights[unit] = weight
    model, _ = model_at(live, weights, dtype=torch.float32)
    with torch.no_grad():
        return float(sum(loss_of(model, live, sequence, KLDivergence()) for sequence in ids.split(1)) / len(ids))
