"""Level errors the direct way: the whole model's own forward, activations kept, outputs compared."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from evopress.models.blocks import BlockModel


def captured_inputs(blocks: BlockModel, index: int, tokens: Tensor) -> dict[str, Tensor]:
    """Return what enters each linear of block `index` over whole forwards, one sequence at a time, [tokens, C]."""
    inputs: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs.setdefault(name, []).append(args[0].reshape(-1, args[0].shape[-1]).clone())

        return hook

    handles = [linear.register_forward_pre_hook(keep(name)) for name, linear in blocks.linears(index).items()]
    try:
        with torch.no_grad():
            for sequence in tokens:
                blocks.model(input_ids=sequence[None], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.cat(parts) for name, parts in inputs.items()}


def output_errors(
    blocks: BlockModel, tokens: Tensor, decode: Callable[[int, int], Tensor], *, propagate: int | None, num_levels: int
) -> list[list[float]]:
    """Return ‖XW - XŴ‖² / ‖XW‖² in float64 for every unit and level; earlier blocks are at level `propagate`, or dense.

    Args: decode: unit index and level index to the decoded weight.
    """
    errors: list[list[float]] = []
    dense = []
    for index in range(len(blocks.blocks)):
        first = len(errors)
        inputs = captured_inputs(blocks, index, tokens)
        for i, (name, linear) in enumerate(blocks.linears(index).items()):
            X, W = inputs[name].double(), linear.weight.detach().double()
            reference = (X @ W.T).square().sum()
            outputs = [X @ (W - decode(first + i, level).double()).T for level in range(num_levels)]
            errors.append([float(E.square().sum() / reference) for E in outputs])
        if propagate is not None:
            for i, linear in enumerate(blocks.linears(index).values()):
                dense.append((linear, linear.weight.data))
                linear.weight.data = decode(first + i, propagate)
    for linear, weight in dense:
        linear.weight.data = weight
    return errors
