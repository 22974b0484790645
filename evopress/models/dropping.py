"""Let a transformer block skip its attention, its MLP, or both: they then add nothing to the residual stream and are not run.

A module's forward is replaced by one that returns zeros without memory of their own; the norms around it are passed through; a
block without attention and MLP returns what enters it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from evopress.models.families import Family


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
