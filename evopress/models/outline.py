"""Find a causal language model's blocks and what is in them, for any architecture of transformers, from its module tree alone.

What the tree cannot tell, a look at the running model does (`blocks.py`): the order of the linears, which of them are never called,
what modules return. A self-check then compares block by block with the whole model, so that a wrong guess here is a sentence there.

What stays dense, by rule: linears that are shared by several blocks, routers, and those with fewer than 16 outputs or inputs or
with less than a 24th of the hidden size (the gates and decays of linear attention, biases of experts): they are a sliver of the
weights and much of the accuracy.
"""

from __future__ import annotations

import inspect
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, __version__
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from evopress.errors import EvoPressError, reason_of
from evopress.json_files import shown
from evopress.models.experts import ExpertLinear, linears_of, loop, named_linear
from evopress.models.families import Family, Parts, named_family
from evopress.models.slots import shape_of

_OWN_LINEARS = ("FalconLinear",)
"""Subclasses that compute what a linear does."""
_LEAST_UNITS = 0.5
"""Share of the blocks' weights that must be units: less would be no compressed model."""
LEAST_WIDTH = 16
LEAST_SHARE = 24
_ROUTER = re.compile(r"(^|\.)(router|gate|shared_expert_gate|wg|gate_weight)(\.\w+)?$")
_ACROSS = re.compile(r"cross_?att|encoder_att|crossattention", re.IGNORECASE)
"""Attention to an encoder, which a causal model alone has not."""
_SIDES = {
    "mlp": re.compile(
        r"mlp|feed_?forward|ffs?$|ffn|moe|experts|channel_mix|^(fc|lin|dense|wi|wo)_?\d?$|intermediate|^output$", re.IGNORECASE
    ),
    "attention": re.compile(
        r"att(n|ention|$)|mamba|ssm|recurrent|temporal|short_?conv|^conv$|delta_?net|mlstm|mixer|time_mix", re.IGNORECASE
    ),
}
_NORM = re.compile(r"norm(\d|_|$|1p)", re.IGNORECASE)
_PER_BLOCK = re.compile(r"layer|block|pruned_heads")
"""Fields of a configuration that may have one entry per block."""


def find_family(config: Mapping[str, Any]) -> Family:
    """Return what is known of the model that a config.json describes, or what a look at its module tree finds; loads no weights.

    Raises: EvoPressError for an architecture that transformers does not have, or whose blocks cannot be found.
    """
    model_type = str(config.get("model_type", ""))
    if (family := named_family(model_type)) is not None:
        return family
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and wrapper_of(config) is None:
        what = "is no causal language model of" if model_type in CONFIG_MAPPING else "is unknown to"
        raise EvoPressError(f"architecture {shown(model_type)} {what} transformers {__version__}: choose another model")
    return outlined(skeleton(config))


def wrapper_of(config: Mapping[str, Any]) -> Any:
    """Return the class of a model that has a language model inside, beside parts for pictures or sound; None: it is none.

    Such a model is loaded whole: its language part is compressed, the rest stays what it is.
    """
    named = config.get("architectures")
    if not isinstance(named, list) or len(named) != 1 or not (isinstance(config.get("text_config"), Mapping) or _is_flat(config)):
        return None
    kind = getattr(transformers, str(named[0]), None) if str(named[0]).isidentifier() else None
    return kind if isinstance(kind, type) and issubclass(kind, PreTrainedModel) else None


def _is_flat(config: Mapping[str, Any]) -> bool:
    """Tell whether a config.json has the fields of a language part beside those of the whole model, as that of Qwen2.5-VL."""
    model_type = config.get("model_type")
    if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or model_type not in CONFIG_MAPPING:
        return False
    try:
        text = CONFIG_MAPPING[model_type].from_dict(_with_floats(dict(config))).text_config
        return all(getattr(text, key) == config[key] for key in ("num_hidden_layers", "hidden_size"))
    except Exception:  # whatever an architecture makes of such a config
        return False


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a config.json that has the language model's fields: all of it, or its `text_config`."""
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) else config


def num_blocks_of(config: Mapping[str, Any]) -> int:
    """Return the number of a model's blocks."""
    family = find_family(config)
    return len(family.by_block) if family.is_found else int(config["num_hidden_layers"])


def skeleton(config: Mapping[str, Any]) -> nn.Module:
    """Return the model that a config.json describes, without memory for its weights; to be looked at, not changed.

    Raises: EvoPressError as `built`.
    """
    return _skeleton(json.dumps(config, sort_keys=True, default=str))


@lru_cache(maxsize=4)
def _skeleton(text: str) -> nn.Module:
    return built(json.loads(text))


def built(config: Mapping[str, Any]) -> nn.Module:
    """Build the model that a config.json describes, without memory for its weights.

    Raises: EvoPressError if transformers cannot build it.
    """
    try:
        known = CONFIG_MAPPING[config["model_type"]].from_dict(_with_floats(dict(config)))
        with torch.device("meta"):
            wrapper = wrapper_of(config)
            model: nn.Module = wrapper(known) if wrapper else AutoModelForCausalLM.from_config(known)
    except Exception as error:  # whatever an architecture makes of such a config
        raise EvoPressError(
            f"transformers {__version__} cannot build {shown(config['model_type'])} from its config "
            f"({reason_of(error)}): fetch the checkpoint again, or choose another model"
        ) from error
    return model


def _with_floats(value: Any) -> Any:
    """Return what transformers has written to a config.json with the floats that JSON does not have, such as infinity."""
    if isinstance(value, dict):
        return float(value["__float__"]) if value.keys() == {"__float__"} else {k: _with_floats(v) for k, v in value.items()}
    return [_with_floats(each) for each in value] if isinstance(value, list) else value


def is_linear(module: nn.Module | None) -> bool:
    """Tell whether a module multiplies its input by one weight matrix and adds a bias, no more."""
    return type(module) in (nn.Linear, Conv1D, ExpertLinear) or type(module).__name__ in _OWN_LINEARS


def outlined(model: Any) -> Family:
    """Look at a model's module tree, with or without weights; experts are called one after another from now on, see `loop`.

    Raises: EvoPressError if no list of blocks is found, or they have no linears, or need one another's keys and values.
    """
    model_type = str(model.config.model_type)
    _check_own_keys(model_type, model.config.get_text_config())
    loop(model)
    names = {module: name for name, module in model.named_modules()}
    blocks = _blocks(model)
    path = names[blocks]
    decoder = _decoder(model, path)
    inner = path.removeprefix(decoder).lstrip(".")
    times = Counter(weight for block in blocks for weight in {id(module.weight) for _, module in _linears(block)})
    hidden = int(getattr(model.config.get_text_config(), "hidden_size", 0) or 0)
    dense: dict[str, str] = {}
    by_block, reasons = [], []
    for index, block in enumerate(blocks):
        linears = []
        for name, module in _linears(block):
            reason = _stays(name, module, shared=times[id(module.weight)] > 1, hidden=hidden)
            if reason:
                dense[f"{index}.{name}"] = reason
            else:
                linears.append(name)
        parts, reason = _parts(block, tuple(linears))
        by_block.append(parts)
        reasons += [reason] * bool(reason)
    _check_share(model_type, blocks, by_block)
    return Family(
        model_type,
        (model_type,),
        linears=by_block[0].linears,
        decoder=decoder,
        blocks=inner,
        after_blocks=(),
        per_block=_per_block(model.config.get_text_config(), len(by_block)),
        by_block=tuple(by_block),
        dense=dense,
        undroppable=reasons[0] if reasons else "",
    )


def _linears(block: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield all linears of a block by their names, experts' too."""
    for name, module in block.named_modules():
        if is_linear(module):
            yield name, module
        for inner, linear in linears_of(module).items():
            yield f"{name}.{inner}".strip("."), linear


def _blocks(model: Any) -> nn.ModuleList:
    """Return the list of blocks: as many as the config says, with the most weights."""
    text = model.config.get_text_config()
    wanted = {getattr(text, key, None) for key in ("num_hidden_layers", "n_layer", "num_layers", "decoder_layers")}
    found = [
        (sum(parameter.numel() for parameter in module.parameters()), module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) in wanted and not re.search(r"visi|image|audio", name)
    ]
    whole = sum(parameter.numel() for parameter in model.parameters())
    weights, blocks = max(found, key=lambda each: each[0], default=(0, None))
    if blocks is None or len({id(block) for block in blocks}) < len(blocks):
        raise EvoPressError(
            f"{model.config.model_type} has no list of {getattr(text, 'num_hidden_layers', 'its')} blocks of their own: choose "
            "another model"
        )
    beside = [size for size, module in found if module is not blocks and not _inside(module, blocks)]
    if max(beside, default=0) > weights / 2:
        raise EvoPressError(
            f"the blocks of {model.config.model_type} are spread over several lists ({weights / whole:.0%} of its weights in the "
            "largest): choose another model"
        )
    return blocks


def _check_own_keys(model_type: str, config: Any) -> None:
    """Raise EvoPressError if blocks use the keys and values of earlier ones, without which they cannot be run."""
    if shared := getattr(config, "num_kv_shared_layers", 0):
        raise EvoPressError(
            f"the last {shared} blocks of this {model_type} use the keys and values of earlier ones (num_kv_shared_layers), so "
            "that they cannot be run one at a time: choose another model"
        )


def _check_share(model_type: str, blocks: nn.ModuleList, by_block: Sequence[Parts]) -> None:
    """Raise EvoPressError if most of the blocks' weights could not be compressed, with what holds them."""
    linears = [named_linear(block, name) for block, parts in zip(blocks, by_block, strict=True) for name in parts.linears]
    units = sum(math.prod(shape_of(module)) for module in linears)
    whole = sum(parameter.numel() for parameter in blocks.parameters())
    if units < _LEAST_UNITS * whole:
        others: Counter[str] = Counter()
        inside = {id(module.weight) for module in linears if module is not None}
        for module in blocks.modules():
            for parameter in module.parameters(recurse=False):
                others[type(module).__name__] += 0 if id(parameter) in inside else parameter.numel()
        most, size = others.most_common(1)[0]
        raise EvoPressError(
            f"only {units / whole:.0%} of the weights of {model_type}'s blocks are in linear layers that can be compressed "
            f"({size / whole:.0%} are in {most}): choose another model"
        )


def _inside(module: nn.Module, other: nn.Module) -> bool:
    return any(each is module for each in other.modules())


def _decoder(model: nn.Module, path: str) -> str:
    """Return the name of the innermost module around the blocks that takes token ids."""
    parts = path.split(".")[:-1]
    for end in range(len(parts), 0, -1):
        name = ".".join(parts[:end])
        if "input_ids" in inspect.signature(model.get_submodule(name).forward).parameters:
            return name
    raise EvoPressError(f"no module around {path} of {type(model).__name__} takes token ids: choose another model")


def _stays(name: str, module: Any, *, shared: bool, hidden: int) -> str:
    """Say why a linear stays dense; empty: it does not."""
    if _ACROSS.search(name):
        return "attention to an encoder"
    if shared:
        return "shared by several blocks"
    if _ROUTER.search(name):
        return "router"
    if any(_NORM.search(part) for part in name.split(".")):
        return "part of a norm"
    least = max(LEAST_WIDTH, -(-hidden // LEAST_SHARE))
    return f"less than {least} wide" if min(module.weight.shape) < least else ""


def _parts(block: nn.Module, linears: tuple[str, ...]) -> tuple[Parts, str]:
    """Divide a block into what mixes tokens and what works on each alone, and say why that is not possible; empty: it is."""
    sides: dict[str, list[str]] = {"attention": [], "mlp": []}
    unknown = []
    for name, child in block.named_children():
        if all(parameter.ndim < 2 for parameter in child.parameters()) or _ACROSS.search(name) or _is_norm(name, child):
            continue
        kinds = type(child).__name__, name
        side = next((side for kind in kinds if (side := _side(kind))), None)
        if side is None:
            unknown.append(name)
        else:
            sides[side].append(name)
    attention, mlp = tuple(sides["attention"]), tuple(sides["mlp"])
    around: tuple[str, ...] = ()
    if len(mlp) > 1 and all(is_linear(block.get_submodule(name)) for name in mlp):  # as in OPT: no module of its own
        mlp, around = mlp[-1:], mlp[:-1]
    zeroed = {side: tuple(each for name in names for each in _weights(block, name)) for side, names in sides.items()}
    parts = Parts(linears, attention, mlp, (), around, zeroed["attention"], zeroed["mlp"][-1:] if around else zeroed["mlp"])
    reason = f"{unknown[0]} ({type(block.get_submodule(unknown[0])).__name__}) is neither attention nor MLP" if unknown else ""
    return parts, reason


def _is_norm(name: str, module: nn.Module) -> bool:
    return bool(_NORM.search(type(module).__name__)) or (bool(_NORM.search(name)) and _side(type(module).__name__) is None)


def _side(kind: str) -> str | None:
    """Tell from the name of a class, or of a module, what it does."""
    ends = {side: max((m.end() for m in pattern.finditer(kind)), default=0) for side, pattern in _SIDES.items()}
    side = max(ends, key=lambda each: ends[each])  # what the name ends with: GraniteMoeAttention
    return side if ends[side] else None


def _weights(block: nn.Module, name: str) -> list[str]:
    """Return the names of what has weight matrices in a module of a block, itself included."""
    inside = block.get_submodule(name)
    found = [(f"{name}.{inner}".rstrip("."), module) for inner, module in inside.named_modules()]
    return [inner for inner, module in found if any(parameter.ndim > 1 for parameter in module.parameters(recurse=False))]


def _per_block(config: Any, num_blocks: int) -> tuple[str, ...]:
    """Return the fields of a configuration that have one entry per block, by their names."""
    fields = vars(config).items()
    lists = [key for key, value in fields if isinstance(value, (list, tuple)) and len(value) == num_blocks]
    found = [key for key in lists if _PER_BLOCK.search(key)]
    return ("layer_types", "pruned_heads", *(key for key in found if key not in ("layer_types", "pruned_heads")))
