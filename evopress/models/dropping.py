"""Let a transformer block skip its attention, its MLP, or both: they then add nothing to the residual stream and are not run.

A module's forward is replaced by one that returns zeros without memory of their own; the norms around it are passed through; a
block without attention and MLP returns what enters it. Their levels are in `levels/modules.py`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from evopress.errors import EvoPressError
from evopress.json_files import shown
from evopress.models.blocks import BlockModel
from evopress.models.families import Family

_OF_THE_MODEL = re.compile(r"(architectures|id2label|label2id|.*_token_ids?|.*_tokens|.*_words_ids|keys_to_ignore_at_inference)")
"""Fields of a configuration that may happen to have as many entries as there are blocks."""


def drop(block: nn.Module, family: Family, *, attention: bool, mlp: bool) -> None:
    """Drop modules of a block, and take back those that were dropped and are not now; weights stay as they are."""
    restore(block, family)
    if attention:
        _replace(block, family.attention, _no_attention)
        for name in family.around_attention:
            _replace(block, name, _pass)
    if mlp:
        _replace(block, family.mlp, _nothing)
        for name in family.around_mlp:
            _replace(block, name, _pass)
    if attention and mlp:
        _replace(block, "", _pass)


def restore(block: nn.Module, family: Family) -> None:
    """Give a block all its modules back."""
    for name in ("", family.attention, family.mlp, *family.around_attention, *family.around_mlp):
        block.get_submodule(name).__dict__.pop("forward", None)


def _replace(block: nn.Module, name: str, forward: Any) -> None:
    block.get_submodule(name).forward = forward


def _pass(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden_states


def _nothing(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden_states.new_zeros(()).expand_as(hidden_states)


def _no_attention(hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    return _nothing(hidden_states), None


def contributions(block: nn.Module, family: Family, run: Callable[[], Any]) -> tuple[str, str]:
    """Name the two modules of a block whose outputs its attention and its MLP add to the residual stream.

    Those are themselves, or norms after them: of each and what is around it, whatever is called last.

    Args: run: runs the block, with all modules there.
    """
    called: list[str] = []
    groups = (family.attention, *family.around_attention), (family.mlp, *family.around_mlp)
    handles = [
        block.get_submodule(name).register_forward_hook(lambda *_, name=name: called.append(name))
        for group in groups
        for name in group
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    attention, mlp = (max(group, key=lambda name: called.index(name) if name in called else -1) for group in groups)
    return attention, mlp


def check_fields(config: Mapping[str, Any], num_blocks: int, family: Family) -> None:
    """Raise EvoPressError if a configuration has a field that may or may not have one entry per block."""
    for key, value in config.items():
        if key in family.per_block or _OF_THE_MODEL.fullmatch(key):
            continue
        if (isinstance(value, (list, tuple)) and len(value) == num_blocks > 1) or _by_block(value, num_blocks):
            raise EvoPressError(
                f"the model's config has {key}={shown(value)}, which may be one entry per block, of {num_blocks} blocks, and so "
                "may have to be cut with them: leave export out of stages, or name it in evopress/models/families.py (per_block)"
            )


def _by_block(value: Any, num_blocks: int) -> bool:
    numbers = {str(number) for number in range(num_blocks)}
    return isinstance(value, Mapping) and bool(value) and all(str(key) in numbers for key in value)


def shortened(config: Any, kept: Sequence[int], num_blocks: int, family: Family) -> Any:
    """Return a model's configuration for the blocks that are kept; those fields are cut that have one entry per block.

    Raises: EvoPressError as `check_fields`.
    """
    check_fields(vars(config), num_blocks, family)
    new = copy.deepcopy(config)
    for key in family.per_block:
        value = getattr(config, key, None)
        if isinstance(value, (list, tuple)):
            setattr(new, key, [value[index] for index in kept if index < len(value)])
        elif isinstance(value, Mapping):
            places = {str(index): place for place, index in enumerate(kept)}
            cut = {type(block)(places[str(block)]): entry for block, entry in value.items() if str(block) in places}
            setattr(new, key, cut)
    full = getattr(config, "max_window_layers", None)  # Qwen: the blocks before it have no sliding window
    if isinstance(full, int) and full < num_blocks:
        new.max_window_layers = sum(index < full for index in kept)
    new.num_hidden_layers = len(kept)
    return new


@contextmanager
def without_dropped(blocks: BlockModel, dropped: Sequence[tuple[int, int]]) -> Iterator[None]:
    """Hold a model as it is written to a checkpoint: blocks that are dropped whole left out, singly dropped modules zeroed.

    A dropped attention or MLP of a block that stays has an output projection of zeros, so that any engine computes what the
    search measured, though not any faster. The blocks that stay are numbered anew, and fields of the configuration with one
    entry per block are cut.

    Args: dropped: for every block whether its attention and its MLP are dropped, as 0 or 1 each.
    """
    family = blocks.family
    kept = [index for index, both in enumerate(dropped) if not all(both)]
    zeroed = [
        blocks.blocks[index].get_submodule(name)
        for index in kept
        for gone, name in zip(dropped[index], (family.attention_output, family.mlp_output), strict=True)
        if gone
    ]
    parameters = [parameter for module in zeroed for parameter in module.parameters()]
    data = [parameter.data for parameter in parameters]
    model: Any = blocks.model
    config, all_blocks = model.config, blocks.decoder.get_submodule(family.blocks)
    try:
        for parameter in parameters:
            parameter.data = torch.zeros_like(parameter.data)
        model.config = shortened(config, kept, len(dropped), family)
        setattr(blocks.decoder, family.blocks, nn.ModuleList(blocks.blocks[index] for index in kept))
        yield
    finally:
        setattr(blocks.decoder, family.blocks, all_blocks)
        model.config = config
        for parameter, before in zip(parameters, data, strict=True):
            parameter.data = before


def check_identity(blocks: BlockModel) -> None:
    """Raise EvoPressError unless a block without attention and MLP returns what enters it."""
    hidden = torch.linspace(-1.0, 1.0, 4 * blocks.hidden_size, device=blocks.device).reshape(1, 4, -1).to(blocks.dtype)
    blocks.prepare(4)
    block, family = blocks.blocks[0], blocks.family
    handles = [block.get_submodule(name).register_forward_hook(_zeroed) for name in (family.attention, family.mlp)]
    try:
        with blocks.on_device(0):
            same = torch.equal(blocks.run(0, hidden), hidden)
    finally:
        for handle in handles:
            handle.remove()
    if not same:
        raise EvoPressError(
            "a block of this model changes its input even without attention and MLP (it normalises the residual stream): "
            "modules of it cannot be dropped, choose another model or method"
        )


def _zeroed(module: nn.Module, args: Any, output: Any) -> Any:
    return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)
