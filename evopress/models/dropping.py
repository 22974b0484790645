"""Let a transformer block skip its attention, its MLP, or both: they then add nothing to the residual stream and are not run.

A module's forward is replaced by one that returns zeros without memory of their own; the norms around it are passed through; a
block without attention and MLP returns what enters it. Their levels are in `levels/modules.py`.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from evopress.errors import EvoPressError
from evopress.json_files import shown
from evopress.models.blocks import BlockModel
from evopress.models.calls import as_returned
from evopress.models.experts import parameters_of
from evopress.models.families import Family, Parts

logger = logging.getLogger(__name__)
_DESCRIBED: WeakKeyDictionary[nn.Module, dict[tuple[tuple[int, ...], str], Any]] = WeakKeyDictionary()
"""Configurations of models with some of their blocks, by these and the whole one's; None: it cannot describe them."""
_NUMBERS = ("layer_idx", "layer_index", "layer_id", "training")
"""What modules hold that does not tell what they compute."""
_OF_THE_MODEL = re.compile(r"(architectures|id2label|label2id|.*_token_ids?|.*_tokens|.*_words_ids|keys_to_ignore_at_inference)")
"""Fields of a configuration that may happen to have as many entries as there are blocks."""
_COUNTS = ("num_hidden_layers", "decoder_layers", "num_blocks")
"""Numbers of blocks; of a decoder that may have an encoder beside it, the first is the encoder's."""
_FIRST = ("max_window_layers", "first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
"""Numbers of first blocks that are of another kind: without a sliding window in Qwen, without experts in DeepSeek and others."""
_OF_SOME = ("mlp_only_layers", "moe_layers", "attn_layer_indices")
"""Lists of the numbers of those blocks that are of another kind."""


def drop(block: nn.Module, parts: Parts, *, attention: bool, mlp: bool) -> None:
    """Drop modules of a block, and take back those that were dropped and are not now; weights stay as they are.

    Args: attention, mlp: of a block that has one of them alone, whichever it has.
    """
    restore(block, parts)
    for gone, names, around in ((attention, parts.attention, parts.around_attention), (mlp, parts.mlp, parts.around_mlp)):
        if gone:
            for name in names:
                _replace(block, name, _returning(_nothing, parts.returns.get(name, 0)))
            for name in around:
                _replace(block, name, _pass)
    if drops_all(parts, attention=attention, mlp=mlp):
        _replace(block, "", _returning(_pass, parts.returns.get("", 0)))


def drops_all(parts: Parts, *, attention: Any, mlp: Any) -> bool:
    """Tell whether nothing of a block is left."""
    return bool(parts.kinds) and all(gone for gone, names in ((attention, parts.attention), (mlp, parts.mlp)) if names)


def restore(block: nn.Module, parts: Parts) -> None:
    """Give a block all its modules back."""
    for name in ("", *parts.attention, *parts.mlp, *parts.around_attention, *parts.around_mlp):
        block.get_submodule(name).__dict__.pop("forward", None)


def _replace(block: nn.Module, name: str, forward: Any) -> None:
    block.get_submodule(name).forward = forward


def _pass(*args: Any, **kwargs: Any) -> Tensor:
    hidden: Tensor = args[0] if args else next(value for value in kwargs.values() if isinstance(value, Tensor))
    return hidden


def _nothing(*args: Any, **kwargs: Any) -> Tensor:
    return torch.zeros_like(_pass(*args, **kwargs))  # of its own memory: Falcon adds to it in place


def _returning(forward: Any, count: int) -> Any:
    """Return a forward in the form of a module that returns so many values."""
    return (lambda *args, **kwargs: as_returned(forward(*args, **kwargs), count)) if count else forward


def check_contributions(family: Family, index: int) -> None:
    """Raise EvoPressError if a block has no attention or no MLP, or several side by side."""
    parts = family.parts(index)
    if len(parts.attention) != 1 or len(parts.mlp) != 1:
        raise EvoPressError(
            f"search/strategy=guided needs one mixer and one MLP in each block, which {family.name} does not have: "
            "use search/strategy=evolution"
        )


def contributions(block: nn.Module, family: Family, index: int, run: Callable[[], Any]) -> tuple[str, str]:
    """Name the two modules of block `index` whose outputs its attention and its MLP add to the residual stream.

    Those are themselves, or norms after them: of each and what is around it, whatever is called last. Where that is not known,
    a norm is after a module whose very output it is handed.

    Args: run: runs the block, with all modules there.

    Raises: EvoPressError if the block has one of them alone, or several side by side.
    """
    check_contributions(family, index)
    parts = family.parts(index)
    calls: list[tuple[str, Any, Any]] = []
    groups = (*parts.attention, *parts.around_attention), (*parts.mlp, *parts.around_mlp)
    names = [name for name, _ in block.named_children()] if family.is_found else [name for group in groups for name in group]
    handles = [
        block.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: calls.append((name, args[0] if args else None, _first_of(output)))
        )
        for name in dict.fromkeys((*names, *parts.attention, *parts.mlp))
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    if family.is_found:
        attention, mlp = (_last_of_chain(calls, name) for name in (parts.attention[0], parts.mlp[0]))
    else:
        called = [name for name, _, _ in calls]
        attention, mlp = (max(group, key=lambda name: called.index(name) if name in called else -1) for group in groups)
    return attention, mlp


def _first_of(output: Any) -> Any:
    return output[0] if isinstance(output, (tuple, list)) else output


def _last_of_chain(calls: Sequence[tuple[str, Any, Any]], name: str) -> str:
    """Return the last of the modules that are handed one another's output, from one on."""
    output = next(output for called, _, output in calls if called == name)
    for called, given, made in calls:
        if called != name and given is output:
            name, output = called, made
    return name


def check_fields(config: Mapping[str, Any], num_blocks: int, family: Family) -> None:
    """Raise EvoPressError if a configuration has a field that may or may not have one entry per block."""
    for key, value in config.items():
        if key in family.per_block or _OF_THE_MODEL.fullmatch(key):
            continue
        if (isinstance(value, (list, tuple)) and len(value) == num_blocks > 1) or _by_block(value, num_blocks):
            raise EvoPressError(
                f"the model's config has {key}={shown(value)}, which may have one entry per block, of {num_blocks} blocks, to be "
                "cut with them: leave export out of stages, or add it to per_block in evopress/models/families.py"
            )


def _by_block(value: Any, num_blocks: int) -> bool:
    numbers = {str(number) for number in range(num_blocks)}
    return isinstance(value, Mapping) and bool(value) and all(str(key) in numbers for key in value)


def shortened(config: Any, kept: Sequence[int], num_blocks: int, family: Family) -> Any:
    """Return a model's configuration for the blocks that are kept; those fields are cut that have one entry per block.

    Blocks are numbered anew where fields have their numbers, or say how many of the first are of another kind.

    Raises: EvoPressError as `check_fields`, or if such a field is worked out from others, and not for these blocks.
    """
    check_fields(vars(config.get_text_config()), num_blocks, family)
    whole = copy.deepcopy(config)
    config, new = config.get_text_config(), whole.get_text_config()  # of a model with pictures, the language part's
    worked_out = {}
    for key in (key for key in family.per_block if key not in _OF_SOME):
        cut = _cut(getattr(config, key, None), kept)
        if cut is not None and _is_set(config, key):
            setattr(new, key, cut)
        elif cut is not None:
            worked_out[key] = cut
    for key in _FIRST:
        first = getattr(config, key, None)
        if type(first) is int and first < num_blocks:
            setattr(new, key, sum(index < first for index in kept))
    for key in _OF_SOME:
        if isinstance(numbers := getattr(config, key, None), (list, tuple)):
            setattr(new, key, [place for place, index in enumerate(kept) if index in numbers])
    for key in _COUNTS:
        if getattr(config, key, None) == num_blocks:
            setattr(new, key, len(kept))
    if getattr(config, "is_heterogeneous", False):  # as Gemma 4: what blocks have otherwise than the rest, by number
        overrides = {int(index): fields for index, fields in config.to_dict()["per_layer_config"].items()}
        new.per_layer_config = _cut(overrides, kept)
    for key, cut in worked_out.items():
        if list(getattr(new, key)) != cut:
            raise EvoPressError(f"{key} of the model's config is worked out from other fields, not for the blocks that are left")
    return whole


def _cut(value: Any, kept: Sequence[int]) -> Any:
    """Return the entries of the blocks that are kept, from a list or from a dictionary by number; None: it is neither."""
    if isinstance(value, (list, tuple)):
        return [value[index] for index in kept if index < len(value)]
    if isinstance(value, Mapping):
        places = {str(index): place for place, index in enumerate(kept)}
        return {type(block)(places[str(block)]): entry for block, entry in value.items() if str(block) in places}
    return None


def _is_set(config: Any, key: str) -> bool:
    """Tell whether a field of a configuration can be set, and is not worked out from others."""
    found = getattr(type(config), type(config).attribute_map.get(key, key), None)
    return not isinstance(found, property) or found.fset is not None


@contextmanager
def without_dropped(blocks: BlockModel, dropped: Sequence[tuple[int, int]]) -> Iterator[None]:
    """Hold a model as it is written to a checkpoint: blocks that are dropped whole left out, singly dropped modules zeroed.

    A dropped attention or MLP of a block that stays has an output projection of zeros, so that any engine computes what the
    search measured, though not any faster. The blocks that stay are numbered anew, and fields of the configuration with one
    entry per block are cut.

    Args: dropped: for every block whether its attention and its MLP are dropped, as 0 or 1 each.
    """
    family = blocks.family
    whole = [drops_all(family.parts(index), attention=a, mlp=m) for index, (a, m) in enumerate(dropped)]
    model: Any = blocks.model
    config, all_blocks = model.config, blocks.decoder.get_submodule(family.blocks)
    kept = [index for index, gone in enumerate(whole) if not gone]
    shorter = config if len(kept) == len(dropped) and family.is_found else _described(blocks, kept)
    if shorter is None:
        kept, shorter = list(range(len(dropped))), config
    parameters = [
        parameter
        for index in kept
        for gone, names in zip(dropped[index], _zeroed_names(family.parts(index)), strict=True)
        if gone
        for name in names
        for parameter in parameters_of(blocks.blocks[index].get_submodule(name))
    ]
    data = [parameter.data for parameter in parameters]
    holder, _, attribute = f"{family.prefix}".rpartition(".")
    owner = model.get_submodule(holder)
    try:
        for parameter in parameters:
            parameter.data = torch.zeros_like(parameter.data)
        model.config = shorter
        setattr(owner, attribute, nn.ModuleList(blocks.blocks[index] for index in kept))
        yield
    finally:
        setattr(owner, attribute, all_blocks)
        model.config = config
        for parameter, before in zip(parameters, data, strict=True):
            parameter.data = before


def _described(blocks: BlockModel, kept: Sequence[int]) -> Any:
    """Return what `_shortened` does, and say once where there is none; a model that is written in parts asks for each of them."""
    found, key = _DESCRIBED.setdefault(blocks.model, {}), (tuple(kept), cast("Any", blocks.model).config.to_json_string())
    if key not in found:
        found[key] = _shortened(blocks, kept)
        if found[key] is None:
            logger.warning(
                "the config of %s cannot describe a model without the dropped blocks: they are exported with weights of zero",
                blocks.family.name,
            )
    return found[key]


def _shortened(blocks: BlockModel, kept: Sequence[int]) -> Any:
    """Return the configuration of a model with these blocks alone; None where it cannot describe them."""
    family, model = blocks.family, blocks.model
    if not family.is_found:
        return shortened(model.config, kept, len(blocks.blocks), family)
    try:
        shorter = shortened(model.config, kept, len(blocks.blocks), family)
    except Exception:  # a list that is worked out otherwise, or may be one entry per block; whatever an architecture refuses
        return None
    return shorter if _describes(type(model), shorter, [blocks.blocks[index] for index in kept], family) else None


def _zeroed_names(parts: Parts) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return parts.zeroed_attention, parts.zeroed_mlp


def _describes(kind: Any, config: Any, kept: Sequence[nn.Module], family: Family) -> bool:
    """Tell whether a shortened configuration is that of a model with just these blocks, by the form of each."""
    try:
        with torch.device("meta"):
            model = kind._from_config(type(config).from_dict(config.to_dict()))  # as it will be read from its file
        blocks = list(model.get_submodule(family.prefix).children())
    except Exception:  # whatever an architecture makes of it
        return False
    return [_form(block) for block in blocks] == [_form(block) for block in kept]


def _form(block: nn.Module) -> list[Any]:
    """Return what tells blocks apart: their modules' classes, the shapes of their weights and their plain settings."""
    settings = [
        (name, key, value)
        for name, module in block.named_modules()
        for key, value in sorted(vars(module).items())
        if not key.startswith("_") and key not in _NUMBERS and isinstance(value, (bool, int, float, str))
    ]
    return [
        *((name, type(module).__name__) for name, module in block.named_modules()),
        *((name, tuple(parameter.shape)) for name, parameter in block.named_parameters()),
        *settings,
    ]


def check_identity(blocks: BlockModel) -> None:
    """Raise EvoPressError unless a block without attention and MLP returns what enters it.

    Of models that were looked at, every block is tried, and each of its parts: dropped, or with weights of zeros, it is the same.
    """
    hidden = torch.linspace(-1.0, 1.0, 4 * blocks.hidden_size, device=blocks.device).reshape(1, 4, -1).to(blocks.dtype)
    blocks.prepare(4)
    family = blocks.family
    if family.undroppable:
        raise EvoPressError(
            f"modules of {family.name} cannot be dropped: of its blocks {family.undroppable}; choose another model or method"
        )
    for index in range(len(blocks.blocks) if family.is_found else 1):
        with blocks.on_device(index):
            same = all(
                _adds_nothing(blocks, index, hidden, zeros=zeros) for zeros in ((False, True) if family.is_found else (False,))
            )
        if not same:
            raise EvoPressError(
                "modules of this model cannot be dropped, since its blocks normalise the residual stream itself: choose another "
                "model or method"
            )


def _adds_nothing(blocks: BlockModel, index: int, hidden: Tensor, *, zeros: bool) -> bool:
    """Tell whether a block returns what enters it when what its modules return is zero, or, instead, their weights are."""
    block, parts = blocks.blocks[index], blocks.family.parts(index)
    data: list[tuple[Any, Tensor]] = []
    handles = []
    if zeros:
        names = [name for side in _zeroed_names(parts) for name in side]
        data = [(each, each.data) for name in names for each in parameters_of(block.get_submodule(name))]
    else:
        handles = [block.get_submodule(name).register_forward_hook(_zeroed) for name in (*parts.attention, *parts.mlp)]
    try:
        for parameter, before in data:
            parameter.data = torch.zeros_like(before)
        return torch.equal(blocks.run(index, hidden), hidden)
    finally:
        for handle in handles:
            handle.remove()
        for parameter, before in data:
            parameter.data = before


def _zeroed(module: nn.Module, args: Any, output: Any) -> Any:
    if not isinstance(output, (tuple, list)):
        return torch.zeros_like(output)
    return type(output)((torch.zeros_like(output[0]), *output[1:]))
