"""Experts that a model keeps in one parameter [E, ...], each as linears of its own.

A mixture-of-experts layer of transformers holds the weights of all E experts together and multiplies them in one call. Here every
expert's slice is a linear that looks at the same memory, and the layer's forward calls them one after another: what watches a
linear, puts a level in its place or takes it back then works on experts as on any other. Linears are no submodules, so that the
model's parameters and its checkpoint stay what they are; `gathered` writes their weights back for an export.

Shapes: T tokens, k experts for each, d hidden size, i inner size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from evopress.errors import EvoPressError

_CHOSEN = ("num_experts_per_tok", "top_k_experts", "moe_topk")
UP, DOWN = ("gate_up_proj", "up_proj"), "down_proj"
_LOOPED: dict[type, type] = {}


class ExpertLinear(nn.Linear):
    """An expert's projection, a look at a slice of the layer's parameter."""

    count: int
    """Of the layer's experts."""

    routed: tuple[Tensor, int] | None = None
    """Which tokens came last, int64 [t], and of how many."""

    def __init__(self, weight: Tensor, bias: Tensor | None, *, count: int) -> None:
        nn.Module.__init__(self)
        self.count = count
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))


def is_fused(module: nn.Module) -> bool:
    """Tell whether a module holds experts in a form that is known: [E, out, in], or [E, in, out], with or without biases."""
    parts = getattr(module, DOWN, None), getattr(module, _up(module), None)
    if not all(isinstance(part, nn.Parameter) and part.ndim == 3 for part in parts):
        return False
    return _is_sorted(module) or (hasattr(module, "is_transposed") and not getattr(module, "has_post_expert_norm", False))


def expert_names(module: nn.Module) -> list[str]:
    """Return the names of all experts' linears, inside the module that holds them."""
    return [f"{expert}.{name}" for expert in range(len(getattr(module, DOWN))) for name in (_up(module), DOWN)]


def chosen_share(config: Any, count: int) -> float:
    """Return how many of `count` experts a token is sent to, as a share, by a language model's config; 1 where it does not say."""
    found = (getattr(config, key, None) for key in _CHOSEN)
    return min(next((k for k in found if isinstance(k, int)), count), count) / count


def kind_of(name: str, linear: nn.Module) -> str:
    """Return the last part of a linear's name, of an expert's with the name of what holds it: "experts.down_proj"."""
    *outer, last = name.split(".")
    return f"{outer[-2]}.{last}" if isinstance(linear, ExpertLinear) else last


def named_linear(block: nn.Module, name: str) -> nn.Module | None:
    """Return a block's module of a name, an expert's linear too; None: there is none."""
    try:
        return block.get_submodule(name)
    except AttributeError:
        outer, _, inner = name.rpartition(".")
        holder, _, expert = outer.rpartition(".")
        try:
            linears = linears_of(block.get_submodule(holder))
        except AttributeError:
            return None
        return linears.get(f"{expert}.{inner}")


def linears_of(module: nn.Module) -> dict[str, ExpertLinear]:
    """Return the linears of a module that `loop` has changed, by their names inside it; of any other nothing."""
    return vars(module).get("expert_linears", {})


def parameters_of(module: nn.Module) -> list[nn.Parameter]:
    """Return a module's parameters, and those of its experts' linears."""
    experts = [parameter for each in module.modules() for linear in linears_of(each).values() for parameter in linear.parameters()]
    return [*module.parameters(), *experts]


def loop(model: nn.Module) -> None:
    """Let all experts of a model be called one after another; what they compute stays the same but for rounding."""
    for module in model.modules():
        if is_fused(module) and not linears_of(module):
            object.__setattr__(module, "expert_linears", {name: _linear(module, name) for name in expert_names(module)})
            module.__class__ = _looped(type(module))
    look_again(model)  # those of a model that was looped before, and moved or loaded anew since


@contextmanager
def together(model: nn.Module) -> Iterator[None]:
    """Let a model's experts be called as transformers does, for a moment."""
    looped = [(module, type(module)) for module in model.modules() if linears_of(module)]
    try:
        for module, kind in looped:
            module.__class__ = kind.__bases__[0]
        yield
    finally:
        for module, kind in looped:
            module.__class__ = kind


def look_again(model: nn.Module) -> None:
    """Let all experts' linears look at what their layers' parameters are now, which may have been moved."""
    for module in model.modules():
        for name, linear in linears_of(module).items():
            weight, bias = _slices(module, name)
            linear.weight.data = weight
            if linear.bias is not None and bias is not None:
                linear.bias.data = bias


@contextmanager
def calls_of_experts(model: nn.Module) -> Iterator[list[tuple[nn.Module, tuple[Any, ...], dict[str, Any], Tensor]]]:
    """Note what layers of experts that are looped are called with, and what they return."""
    calls: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any], Tensor]] = []

    def note(layer: nn.Module, given: tuple[Any, ...], named: dict[str, Any], made: Tensor) -> None:
        calls.append((layer, given, named, made.clone()))  # what comes after may add to it in place

    looped = [module for module in model.modules() if linears_of(module)]
    handles = [module.register_forward_hook(note, with_kwargs=True) for module in looped]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def gathered(*blocks: nn.Module) -> Iterator[None]:
    """Hold blocks, or a whole model, with the weights that their experts' linears have now in their layers' parameters."""
    before: list[tuple[nn.Parameter, Tensor]] = []
    try:
        for module in chain.from_iterable(block.modules() for block in blocks):
            linears = linears_of(module)
            for part in (_up(module), DOWN) if linears else ():
                weights = [linear.weight.data for name, linear in linears.items() if name.endswith(f".{part}")]
                parameter = getattr(module, part)
                if all(weight.data_ptr() == _slices(module, f"{e}.{part}")[0].data_ptr() for e, weight in enumerate(weights)):
                    continue
                before.append((parameter, parameter.data))
                parameter.data = torch.stack([weight.T if _transposed(module) else weight for weight in weights])
        yield
    finally:
        for parameter, data in before:
            parameter.data = data


def _up(module: nn.Module) -> str:
    return next((name for name in UP if name in module._parameters), UP[0])


def _is_sorted(module: nn.Module) -> bool:
    """Tell whether a layer is handed all tokens for every expert, [E · T, d], as Llama 4's is."""
    return type(module).__name__ == "Llama4TextExperts"


def _transposed(module: nn.Module) -> bool:
    return _is_sorted(module) or bool(getattr(module, "is_transposed", False))


def _slices(module: nn.Module, name: str) -> tuple[Tensor, Tensor | None]:
    expert, _, part = name.partition(".")
    weight = getattr(module, part).data[int(expert)]
    bias = getattr(module, f"{part}_bias", None) if getattr(module, "has_bias", False) else None
    return weight.T if _transposed(module) else weight, None if bias is None else bias.data[int(expert)]


def _linear(module: nn.Module, name: str) -> ExpertLinear:
    return ExpertLinear(*_slices(module, name), count=len(getattr(module, DOWN)))


def _looped(kind: type) -> type:
    """Return a class of experts whose forward is a loop; its name is the original's."""
    if kind not in _LOOPED:
        _LOOPED[kind] = type(kind.__name__, (kind,), {"forward": _forward, "__module__": kind.__module__})
    return _LOOPED[kind]


def _forward(module: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Return what the experts make of hidden states [T, d], from their numbers [T, k] and weights [T, k]."""
    linears, count = linears_of(module), len(module.down_proj)
    if _is_sorted(module):
        parts = hidden_states.view(count, -1, hidden_states.shape[-1])
        return torch.cat([_expert(module, linears, expert, parts[expert], None) for expert in range(count)])
    numbers, weights = (*args, *kwargs.values())[:2]
    total, k = numbers.shape
    order = torch.argsort(numbers.flatten(), stable=True)
    sizes: Sequence[int] = tokens_of(module, hidden_states, numbers).tolist()
    if any(sizes[expert] for expert in vars(module).get("dropped", ())):
        raise EvoPressError(
            f"the router beside this {type(module).__name__} sends a token to a dropped expert: fewer experts are left than its "
            "top-k, or it does not choose by its logits alone; drop fewer, or choose another model"
        )
    # Summed over a token's experts in their order: adding in place would depend on the order of a GPU's threads.
    made, start = hidden_states.new_zeros(total * k, hidden_states.shape[-1]), 0
    for expert, size in enumerate(sizes):
        if size:
            places = order[start : start + size]
            tokens = places // k
            each = _expert(module, linears, expert, hidden_states[tokens], (tokens, total))
            made.index_copy_(0, places, (each * weights.flatten()[places, None]).to(made.dtype))
        start += size
    return made.view(total, k, -1).sum(1)


def held_per_token(module: nn.Module, config: Any) -> int:
    """Return how many numbers a layer holds for each of its tokens at the peak of its forward, if all go to the same experts.

    Args: config: the language model's.
    """
    up, down = _first_linears(module)
    # What all have made; and of one what it is handed, its inner product, that activated and multiplied by its gate, or its output.
    made = (3 if _is_sorted(module) else 1) * _called_per_token(module, config)
    return made * down.out_features + up.in_features + max(2 * up.out_features, down.in_features + down.out_features)


def kept_per_token(module: nn.Module, config: Any) -> int:
    """Return how many numbers a layer keeps of each of its tokens to go back; see `held_per_token`."""
    up, down = _first_linears(module)
    return _called_per_token(module, config) * (up.in_features + 2 * up.out_features + down.out_features)


def _first_linears(module: nn.Module) -> tuple[ExpertLinear, ExpertLinear]:
    linears = linears_of(module)
    return linears[f"0.{_up(module)}"], linears[f"0.{DOWN}"]


def _called_per_token(module: nn.Module, config: Any) -> int:
    """Return how many experts are handed a token."""
    count: int = len(module.down_proj)  # type: ignore[arg-type]
    return count if _is_sorted(module) else round(chosen_share(config, count) * count)


def copied_for_export(model: nn.Module, *, levels: bool, kept: float, fewer: bool) -> int:
    """Return the bytes of copies in which a model's experts are written: `gathered`, cut, and split by transformers.

    Args:
        levels: their weights are levels.
        kept: share of them that stays.
        fewer: some are dropped.
    """
    linears = [(name, linear) for module in model.modules() for name, linear in linears_of(module).items()]
    whole = sum(linear.weight.nbytes for _, linear in linears)
    ups = sum(linear.weight.nbytes for name, linear in linears if name.endswith(f".{UP[0]}"))
    return round(levels * whole + kept * (fewer * whole + ups))


def tokens_of(module: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Return how many tokens a layer hands to each of its experts, int64 [E], from what its forward is given."""
    count = len(module.down_proj)
    if _is_sorted(module):
        return hidden_states.view(count, -1, hidden_states.shape[-1]).any(-1).sum(1)
    numbers: Tensor = (*args, *kwargs.values())[0]
    return torch.bincount(numbers.flatten(), minlength=count)[:count]  # numbers beyond are of no expert


def _expert(module: Any, linears: dict[str, ExpertLinear], expert: int, x: Tensor, routed: tuple[Tensor, int] | None) -> Tensor:
    """Return what one expert makes of the tokens that it is handed, [t, d]."""
    up, down = linears[f"{expert}.{_up(module)}"], linears[f"{expert}.{DOWN}"]
    up.routed = down.routed = routed
    inner = up(x)
    if _is_sorted(module):
        gate, other = inner.chunk(2, dim=-1)
        inner = other * module.act_fn(gate)
    else:
        inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    made: Tensor = down(inner)
    return made
