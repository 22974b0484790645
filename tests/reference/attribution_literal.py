"""Attributions the plain way: the whole model, one sequence at a time, gradients of its weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from evopress.fitness.measures import Measure
from evopress.levels.live import LiveModel
from evopress.levels.modules import modules_of
from evopress.models.experts import named_linear
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
        parameter = named_linear(model, unit.name).weight
        parameter.data = weight.to(dtype)
        parameters.append(parameter.requires_grad_())
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
        for parameter in parameters:  # experts' too, which are none of the model's
            parameter.grad = None
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


def expand_plainly(live: LiveModel, genome: Genome, ids: Tensor, measure: Measure, uniform: Tensor) -> Tensor:
    """Return ⟨∂ loss / ∂W_u, Q' - Q⟩ + ½ ⟨∂ log likelihood of drawn labels / ∂W_u, Q' - Q⟩² per token, [b, units, levels]."""
    pairs = weights_at(live, genome)
    longest = max(len(unit.levels) for unit in live.space.units)
    others = [
        [weight for weight, _ in weights_at(live, tuple(min(level, len(unit.levels) - 1) for unit in live.space.units))]
        for level in range(longest)
    ]
    model, parameters = model_at(live, [level for level, _ in pairs], dtype=torch.float32)
    found = torch.full((len(ids), len(pairs), longest), torch.nan, dtype=torch.float64)
    for row, sequence in enumerate(ids.split(1)):
        derivatives = torch.autograd.grad(loss_of(model, live, sequence, measure), parameters)
        logq, drawn = drawn_labels(model, sequence, uniform[row])
        scores = torch.autograd.grad(sum(q[label] for q, label in zip(logq, drawn, strict=True)), parameters)
        for unit, (derivative, score, (here, _)) in enumerate(zip(derivatives, scores, pairs, strict=True)):
            for level in range(len(live.space.units[unit].levels)):
                step = others[level][unit] - here
                found[row, unit, level] = (derivative * step).sum() + (score * step).sum() ** 2 / len(drawn) / 2
    return found


def drawn_labels(model: torch.nn.Module, sequence: Tensor, uniform: Tensor) -> tuple[Tensor, list[int]]:
    """Return the log probabilities [l - 1, V] of a sequence [1, l], and a label drawn from each by a number in [0, 1)."""
    logq = torch.log_softmax(model(input_ids=sequence, use_cache=False).logits[0, :-1], dim=-1)
    return logq, [
        next(i for i, heaped in enumerate(q.exp().double().cumsum(0).tolist()) if heaped > float(u) or i == len(q) - 1)
        for q, u in zip(logq.detach(), uniform, strict=True)
    ]


ADDING = {
    "falcon": ("self_attention", "mlp"),
    "gemma2": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "opt": ("self_attn", "fc2"),
}
"""What adds to the residual stream, where it is not the attention and the MLP themselves."""
CALLED = ("self_attn", "conv", "linear_attn"), ("mlp", "feed_forward")
"""What these are called, of which a block has one each."""


def gated(live: LiveModel, genome: Genome, *, dtype: torch.dtype) -> tuple[torch.nn.Module, dict[int, Tensor]]:
    """Return a copy of the model with its weights at a genome, and a gate on what each unit of modules adds: 1 kept, 0 dropped.

    The weights in dropped modules are the dense ones.
    """
    model, units = copy.deepcopy(live.blocks.model).to(dtype), live.space.units
    family = live.blocks.family
    gates = {
        i: torch.tensor(float(not unit.levels[genome[i]].drops), dtype=dtype, requires_grad=True)
        for i, unit in enumerate(units)
        if modules_of(unit)
    }
    for i, unit in enumerate(units):
        if i not in gates and not live.space.is_gone(genome, i):
            model.get_submodule(unit.name).weight.data = live.levels.read(i, genome[i]).decode().to(dtype)

    def through(gate: Tensor) -> Any:
        def hook(module: torch.nn.Module, args: object, output: Any) -> Any:
            return (output[0] * gate, *output[1:]) if isinstance(output, tuple) else output * gate

        return hook

    layers = model.get_submodule(f"{family.decoder}.{family.blocks}")
    for i, gate in gates.items():
        for block, kind in modules_of(units[i]):
            layer, of_kind = layers[block], kind == "mlp"
            names = [name for name in CALLED[of_kind] if hasattr(layer, name)]
            name = ADDING[model.config.model_type][of_kind] if model.config.model_type in ADDING else names[0]
            layer.get_submodule(name).register_forward_hook(through(gate))
    return model, gates


def gates_plainly(live: LiveModel, genome: Genome, ids: Tensor, measure: Measure, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first derivative of the loss in every gate's s = 1 - gate, and the squared score of drawn labels, [b, units]."""
    first, second = torch.zeros(2, len(ids), len(live.space), dtype=torch.float64)
    for row, sequence in enumerate(ids.split(1)):
        model, gates = gated(live, genome, dtype=torch.float32)
        found = torch.autograd.grad(loss_of(model, live, sequence, measure), list(gates.values()))
        logq, drawn = drawn_labels(model, sequence, uniform[row])
        likelihood = sum(q[label] for q, label in zip(logq, drawn, strict=True))
        scores = torch.autograd.grad(likelihood, list(gates.values()))
        for unit, derivative, score in zip(gates, found, scores, strict=True):
            first[row, unit], second[row, unit] = -derivative, score**2 / len(drawn)
    return first, second


def gate_by_differences(live: LiveModel, genome: Genome, ids: Tensor, measure: Measure, unit: int, *, step: float) -> float:
    """Return the central difference of the loss in one gate's s, in float64, on one sequence [1, l]."""
    model, gates = gated(live, genome, dtype=torch.float64)

    def loss(by: float) -> float:
        with torch.no_grad():
            gates[unit].sub_(by)
            value = float(loss_of(model, live, ids, measure))
            gates[unit].add_(by)
        return value

    return (loss(step) - loss(-step)) / (2 * step)
