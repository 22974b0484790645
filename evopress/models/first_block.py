"""The first block of a model whose weights are not there, with random ones: what tells how fast a machine is with it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from evopress.models import attention
from evopress.models.blocks import BlockModel, by_blocks
from evopress.models.outline import built, find_family
from evopress.units import BLOCKS

_PERIOD = 65_537
"""Of the random numbers, which are repeated: drawing all takes longer than what is measured with them."""


def first_block(
    config: Mapping[str, Any], *, dtype: torch.dtype, device: torch.device, include: Sequence[str] = (BLOCKS,), most_bytes: int
) -> BlockModel | None:
    """Return the model that a config.json describes with its first block alone; None where that takes more than `most_bytes`.

    Raises: EvoPressError if its blocks cannot be called.
    """
    model, family = built(config), find_family(config)
    del model.get_submodule(family.prefix)[1:]  # type: ignore[operator]
    if sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize > most_bytes:
        return None
    made: dict[int, nn.Parameter] = {}  # tied weights are one
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fresh = nn.Parameter(_random(parameter.shape, dtype).to(device), requires_grad=False)
                module._parameters[name] = made.setdefault(id(parameter), fresh)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype, device=device)
    if family.plain_attention and attention.suits(device, dtype):
        model.set_attn_implementation(attention.register())  # type: ignore[operator]
    with by_blocks(family):
        return BlockModel(model.eval(), replace(family, by_block=family.by_block[:1]), device=device, include=include)


def _random(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return ones for a vector, as norms have, else small numbers."""
    if len(shape) < 2:
        return torch.ones(shape, dtype=dtype)
    count = math.prod(shape)
    numbers = torch.randn(min(_PERIOD, count), generator=torch.Generator().manual_seed(0)).mul_(0.02).to(dtype)
    return numbers.repeat(-(-count // len(numbers)))[:count].reshape(tuple(shape))
