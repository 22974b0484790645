"""Experts that no token is sent to: of what a router chooses by, those that are dropped have minus infinity.

A token then goes to the best of those that stay, with the weights that it would have if the others had never been there. The
routers of transformers are some thirty classes. What they share is a product with one matrix, a row for each expert, and a choice
of the largest: both are found by watching a router while it runs, so that no table of classes is needed.

Shapes: E experts, d numbers that the router looks at.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from evopress.errors import EvoPressError
from evopress.models.experts import DOWN, linears_of

if TYPE_CHECKING:
    from evopress.models.blocks import BlockModel

_PRODUCTS = (nn.functional.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm)
_CHOICES = (torch.topk, Tensor.topk)
_COUNT = re.compile(r"(moe_)?(num|n)_(local_|routed_)?experts")
"""The field of a configuration that says how many experts a layer has."""
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
_FAR = 1e4
"""How far below all others the check puts an expert's logit."""


@dataclass(frozen=True)
class ExpertLayer:
    """A layer of experts and its router, by their names inside a block."""

    name: str
    """Of the module that holds the experts: "mlp.experts"."""
    router: str
    """Of the module beside it that has the matrix [E, d], or has it inside."""
    count: int
    """E."""

    @property
    def holder(self) -> str:
        """Name of the module that both are in."""
        return self.name.rpartition(".")[0]

    def matrix(self, block: nn.Module) -> nn.Parameter:
        """Return the router's matrix [E, d]."""
        return next(each for each in block.get_submodule(self.router).parameters() if _is_matrix(each, self.count))


def expert_layer(block: nn.Module) -> ExpertLayer | None:
    """Return a block's layer of experts; None: it has none, or not one alone with one router beside it."""
    layers = [name for name, module in block.named_modules() if linears_of(module)]
    if len(layers) != 1:
        return None
    holder, _, own = layers[0].rpartition(".")
    count = len(getattr(block.get_submodule(layers[0]), DOWN))
    inside = block.get_submodule(holder).named_parameters()
    found = [name.split(".")[0] for name, each in inside if _is_matrix(each, count) and not name.startswith(f"{own}.")]
    named = len(found) == 1 and found[0] in dict(block.get_submodule(holder).named_children())
    return ExpertLayer(layers[0], f"{holder}.{found[0]}".strip("."), count) if named else None


def _is_matrix(parameter: Tensor, count: int) -> bool:
    return parameter.ndim == 2 and parameter.shape[0] == count


class _Watched(TorchFunctionMode):
    """Sees what a router multiplies and chooses by; dropped experts get minus infinity in both."""

    def __init__(self, dropped: Tensor, on_product: Callable[[Tensor, Tensor], None] | None) -> None:
        """Take a flag for each expert, bool [E], and what is handed a product's input and output."""
        super().__init__()
        self.dropped, self.on_product = dropped, on_product

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See `TorchFunctionMode`."""
        if func in _CHOICES:
            if args[0].shape[-1] not in (1, len(self.dropped)):
                raise EvoPressError(f"its router chooses among {args[0].shape[-1]} groups of experts first")
            args = (self._masked(args[0]), *args[1:])
        output = func(*args, **(kwargs or {}))
        if func in _PRODUCTS and output.shape[-1] == len(self.dropped):
            if self.on_product is not None:
                self.on_product(args[0], output)
            return self._masked(output)
        return output

    def _masked(self, scores: Tensor) -> Tensor:
        if scores.shape[-1] != len(self.dropped):
            return scores
        return scores.masked_fill(self.dropped.to(scores.device), -torch.inf)


def drop_experts(
    block: nn.Module, layer: ExpertLayer, dropped: Sequence[int], on_product: Callable[[Tensor, Tensor], None] | None = None
) -> None:
    """Let no token of a block be sent to some of its experts, and to those again that were dropped and are not now.

    Args:
        dropped: for every expert whether it is dropped, as 0 or 1; none: all are there.
        on_product: is handed what the router multiplies, and the product, whenever it runs.
    """
    restore_experts(block, layer)
    if not any(dropped) and on_product is None:
        return
    router, mask = block.get_submodule(layer.router), torch.tensor([bool(each) for each in dropped])
    own = router.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with _Watched(mask, on_product):
            return own(*args, **kwargs)

    router.forward = forward
    vars(block.get_submodule(layer.name))["dropped"] = [expert for expert, gone in enumerate(dropped) if gone]


def restore_experts(block: nn.Module, layer: ExpertLayer) -> None:
    """Give a block all its experts back."""
    vars(block.get_submodule(layer.router)).pop("forward", None)
    vars(block.get_submodule(layer.name)).pop("dropped", None)


@torch.no_grad()
def check_routers(blocks: BlockModel) -> None:
    """Drop in every block the expert that a token likes best, and compare with a router whose weights let it be the last choice.

    Raises: EvoPressError if they differ, or a router has no product with its matrix.
    """
    hidden = torch.linspace(-1.0, 1.0, blocks.hidden_size, device=blocks.device).reshape(1, 1, -1).to(blocks.dtype)
    blocks.prepare(1)
    for index, block in enumerate(blocks.blocks):
        if (layer := expert_layer(block)) is not None:
            with blocks.on_device(index):
                try:
                    wrong = _what_differs(blocks, index, layer, hidden)
                except EvoPressError as error:
                    wrong = str(error).partition(":")[0]
            if wrong:
                raise EvoPressError(
                    f"experts of {blocks.family.name} cannot be dropped: without one, {wrong} "
                    f"({blocks.block_name(index)}.{layer.router}); choose another model or method"
                )


def _what_differs(blocks: BlockModel, index: int, layer: ExpertLayer, hidden: Tensor) -> str:
    """Say what is wrong with dropping an expert of a block; nothing: it is as it should be."""
    block, seen = blocks.blocks[index], list[tuple[Tensor, Tensor]]()
    try:
        drop_experts(block, layer, [0] * layer.count, lambda entered, product: seen.append((entered.clone(), product)))
        blocks.run(index, hidden)
        if len(seen) != 1:
            return f"its router has {len(seen)} products with its matrix"
        (entered, product) = seen[0]
        best = int(product.argmax())
        drop_experts(block, layer, [int(expert == best) for expert in range(layer.count)])
        without = blocks.run(index, hidden)
    finally:
        restore_experts(block, layer)
    matrix = layer.matrix(block)
    biases = _biases(block, layer)
    with _given_back(matrix, *biases):
        matrix.data[best] = -_FAR * entered.flatten() / entered.square().sum()
        for bias in biases:
            bias.data.view(-1)[best] = -_FAR
        last = blocks.run(index, hidden)
    return "" if _are_alike(without, last) else "its block computes something else than with a router that never chooses it"


@contextmanager
def _given_back(*tensors: Tensor) -> Iterator[None]:
    """Let tensors be changed in place for a moment."""
    before = [tensor.data.clone() for tensor in tensors]
    try:
        yield
    finally:
        for tensor, data in zip(tensors, before, strict=True):
            tensor.data.copy_(data)


def _are_alike(one: Tensor, other: Tensor) -> bool:
    """Tell whether two outputs of a block differ by no more than rounding explains."""
    scale = max(float(other.abs().max()), 1.0)
    return float((one - other).abs().max()) <= _TOLERANCE[other.dtype] * scale


@torch.no_grad()
def check_fillers(blocks: BlockModel) -> None:
    """Compare in every block what an export fills up with, a row of zeros and the least bias there is, with an expert that is gone.

    Where scores are a softmax over all experts before the bias is added, such as Ernie's, it takes its part of what others have.

    Raises: EvoPressError if they differ.
    """
    ids = torch.arange(64, device=blocks.device)[None] * 7919 % blocks.head().weight.shape[0]
    hidden = blocks.embed(ids)
    blocks.prepare(ids.shape[1])
    for index, block in enumerate(blocks.blocks):
        with blocks.on_device(index):
            if (layer := expert_layer(block)) is not None and not _is_filled_exactly(blocks, index, layer, hidden):
                raise EvoPressError(
                    f"{blocks.family.name} cannot be exported with a different number of experts in each block: its router "
                    "normalises over all experts, so that padding experts would change the output; use method drop with "
                    "method.balanced=true, or leave export out of stages"
                )
            hidden = blocks.run(index, hidden)


def _is_filled_exactly(blocks: BlockModel, index: int, layer: ExpertLayer, hidden: Tensor) -> bool:
    """Tell whether a block computes the same with what fills up in its first expert's place; without biases nothing does."""
    block = blocks.blocks[index]
    if not (biases := _biases(block, layer)):
        return True
    try:
        drop_experts(block, layer, [int(expert == 0) for expert in range(layer.count)])
        without = blocks.run(index, hidden)
    finally:
        restore_experts(block, layer)
    matrix = layer.matrix(block)
    with _given_back(matrix, *biases):
        matrix.data[0] = 0.0
        for bias in biases:
            bias.data.view(-1)[0] = torch.finfo(bias.dtype).min
        return _are_alike(blocks.run(index, hidden), without)


def _biases(block: nn.Module, layer: ExpertLayer) -> list[Tensor]:
    """Return what is added to what a block's router chooses by."""
    return [each for name, each in _tensors(block.get_submodule(layer.holder)).items() if _is_bias(name, each, layer.count)]


@contextmanager
def without_experts(blocks: BlockModel, dropped: Sequence[Sequence[int]], held: Collection[int] | None = None) -> Iterator[None]:
    """Hold a model as it is written to a checkpoint: without the experts that are dropped, and the routers' rows of them.

    A configuration has one number of experts for all blocks. Where some keep fewer than others, they are filled up with experts of
    zeros, which a bias of the router never chooses; see `check_fillers`.

    Args:
        dropped: for every block whether each of its experts is dropped, as 0 or 1; nothing where it has none.
        held: blocks whose weights are to be right; None: all.

    Raises: EvoPressError as `fewer_experts`.
    """
    kept = {index: [i for i, gone in enumerate(of_block) if not gone] for index, of_block in enumerate(dropped) if of_block}
    fewest, most, count = min(map(len, kept.values())), max(map(len, kept.values())), max(map(len, dropped))
    if fewest == count:
        yield
        return
    model: Any = blocks.model
    config, cut = fewer_experts(model, count, min(most, count - 1), even=fewest == most)
    tensors, whole = _tensors(model), model.config
    block_of = {name: int(name.removeprefix(f"{blocks.family.prefix}.").partition(".")[0]) for name in cut}
    cut = {name: axis for name, axis in cut.items() if held is None or block_of[name] in held}
    before = {name: tensors[name].data for name in cut}
    try:
        for name, axis in cut.items():
            here = kept[block_of[name]]
            places = here + [i for i in range(count) if i not in here][: most - len(here)]
            data = before[name].index_select(axis, torch.tensor(places, device=before[name].device))
            never = torch.finfo(data.dtype).min if _is_bias(name, data, most) else 0.0
            data.narrow(axis, len(here), most - len(here)).fill_(never)
            tensors[name].data = data
        model.config = config if most < count else whole
        yield
    finally:
        model.config = whole
        for name, data in before.items():
            tensors[name].data = data


def fewer_experts(model: Any, count: int, fewer: int, *, even: bool) -> tuple[Any, dict[str, int]]:
    """Return a model's configuration for fewer experts, and by its name what of the model is then smaller, with the axis that is.

    Args:
        model: with or without memory for its weights.
        even: all blocks keep as many.

    Raises: EvoPressError if the configuration cannot say so, or some blocks keep fewer and no bias keeps tokens from what is
        filled up.
    """
    config, tensors = copy.deepcopy(model.config), _tensors(model)
    text, name = config.get_text_config(), model.config.model_type
    for key, value in vars(text).items():
        if _COUNT.fullmatch(key) and value == count:
            setattr(text, key, fewer)
    try:
        with torch.device("meta"):
            smaller = _tensors(type(model)._from_config(type(config).from_dict(config.to_dict())))  # as read from its file
        cut = {}
        for key, tensor in tensors.items():
            axes = [axis for axis, (a, b) in enumerate(zip(tensor.shape, smaller[key].shape, strict=True)) if a != b]
            if axes:
                (cut[key],) = axes
        assert cut, "nothing is smaller"
    except Exception as error:  # whatever an architecture makes of such a configuration
        raise EvoPressError(
            f"{name} cannot be exported with {fewer} of {count} experts in a block, since transformers cannot build it from such a "
            "config: leave export out of stages"
        ) from error
    if not even and not any(_is_bias(key, tensors[key], count) for key in cut):
        raise EvoPressError(
            f"{name} cannot be exported with a different number of experts in each block: its config has one number of experts for "
            "all blocks, and its router no bias to keep tokens from padding experts; use method drop with method.balanced=true, or "
            "leave export out of stages"
        )
    return config, cut


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return all that a model holds, by name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _is_bias(name: str, tensor: Tensor, count: int) -> bool:
    """Tell whether something, a number for each expert, is added to what a router chooses by."""
    return "bias" in name.rpartition(".")[2] and tensor.numel() == count == max(tensor.shape)
