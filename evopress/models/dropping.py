"""Let a transformer block skip its attention, its MLP, or both: they then add nothing to the residual stream and are not run.

A module's forward is replaced by one that returns zeros without memory of their own; the norms around it are passed through; a
block without attention and MLP returns what enters it.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from evopress.errors import EvoPressError
from evopress.json_files import shown
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
