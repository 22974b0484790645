"""Attributions the plain way: the whole model, one sequence at a time, gradients of its weights."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from evopress.fitness.measures import Measure
from evopress.levels.live import LiveModel
from evopress.units import Genome


def weights_at(live: LiveModel, genome: Genome) -> list[tuple[Tensor, Tensor]]:
    """Return the weight of every unit at its level, and the dense one."""
    slots = [slot for part in live.blocks.parts for slot in live.blocks.slots(part).values()]
    dense = [slot.weight.clone() for slot in slots]
    with live.applied(genome):
        return list(zip([slot.weight.clone() for slot in slots], dense, strict=True))


def model_at(live: LiveModel, weights: list[Tensor], *, dtype: torch.dtype) -> tuple[torch.nn.Module, list[torch.nn.Parameter]]:
    """Return a copy of the model with these weights in its units, and their parameters."""
    model = copy.deepcopy(live.blocks.model).to(dtype)
    parameters = []
    for unit, weight in zip(live.space.units, weights, strict=True):
        parameter = model.get_submodule(unit.name).weight
        parameter.data = weight.to(dtype)
        parameters.append(parameter)
    return model, parameters


def loss_of(model: torch.nn.Module, live: LiveModel, ids: Tensor, measure: Measure) -> Tensor:
    """Return the measure's mean over the predicted tokens of one sequence [1, l], by the whole model's own logits.

    The measure gets logits instead of hidden states: its head is the identity.
    """
    with torch.no_grad():
        base = copy.deepcopy(live.blocks.model).to(model.dtype)(input_ids=ids, use_cache=False).logits[0, :-1]
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
    reference = measure.reference(base, ids[0, 1:], Identity)
    return measure(logits, reference, Identity)[0].mean()


class Identity:
    """A head for logits."""

    @staticmethod
    def logits(hidden: Tensor) -> Tensor:
        return hidden

    scores = logits

    @staticmethod
    def logits_of(hidden: Tensor, tokens: Tensor) -> Tensor:
        return hidden.gather(-1, tokens)


def attribute_plainly(live: LiveModel, genome: Genome, ids: Tensor, measure: Measure) -> Tensor:
    """Return ⟨∂ loss / ∂W_u, Q_u - W_u⟩ on each sequence, [b, units]."""
    pairs = weights_at(live, genome)
    model, parameters = model_at(live, [level for level, _ in pairs], dtype=torch.float32)
    model.requires_grad_()
    rows = []
    for sequence in ids.split(1):
        model.zero_grad()
        loss_of(model, live, sequence, measure).backward()
        rows.append([float((p.grad * (level - dense)).sum()) for p, (level, dense) in zip(parameters, pairs, strict=True)])
    return torch.tensor(rows, dtype=torch.float64)


def attribute_by_differences(live: LiveModel, genome: Genome, ids: Tensor, measure: Measure, unit: int, *, step: float) -> float:
    """Return the central difference of the loss in the scale of one unit's own error, in float64, on one sequence [1, l]."""
    pairs = weights_at(live, genome)

    def loss(scale: float) -> float:
        weights = [level.double() for level, _ in pairs]
        level, dense = pairs[unit]
        weights[unit] = dense.double() + scale * (level.double() - dense.double())
        model, _ = model_at(live, weights, dtype=torch.float64)
        with torch.no_grad():
            return float(loss_of(model, live, ids, measure))

    return (loss(1 + step) - loss(1 - step)) / (2 * step)
