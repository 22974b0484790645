"""What a checkpoint stores, seen without loading it: adapters, marks of quantization, tensors that a model has no place for."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from evopress.errors import EvoPressError
from evopress.json_files import load_json, shown

logger = logging.getLogger(__name__)
INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
"""Files of a LoRA adapter, which transformers would put on the weights beside it."""
READABLE = {"mxfp4": "MXFP4", "fp8": "FP8", "mxfp8": "MXFP8"}
"""What transformers can dequantize while it loads, on any machine: `quant_method` to its name."""
_QUANTIZATION = "quantization_config"
_QUANTIZED_KEY = re.compile(r"quant|compression_config", re.IGNORECASE)
_CODEC_KEY = re.compile(r"quantizers|quantizer_dropout|vector_quantization|quantization_(dim|levels)|quantile", re.IGNORECASE)
"""Sizes of audio codecs and of heads for quantiles, which have nothing to do with how weights are stored."""
_DTYPES = ("F16", "BF16", "F32", "F64")
"""Of weights and biases that are no codes."""
_QUANTIZED_TENSOR = re.compile(
    r"\.(qweight|qzeros|scales|biases|g_idx|SCB|weight_format|codes|codebooks?|Qidxs|absmax|nested_absmax|quant_map|quant_state\..*"
    r"|(weight|input|output|k|v|q|kv)_scale(s|_inv|_2)?|weight_(packed|zero_point|bitmap))$"
)
"""What GPTQ, AWQ, bitsandbytes, compressed-tensors, ModelOpt, MLX, AQLM, QuIP# and FP8 store beside weights or instead of them."""
_OF_NO_CONSEQUENCE = re.compile(r"(^|\.)(rotary_emb\.(inv_freq|cos_cached|sin_cached)|position_ids|masked_bias)$")
"""Buffers that old versions of transformers stored and that are computed anew."""
_MASK = re.compile(r"(^|\.)(attn|attention)\.(bias|causal_mask)$")
"""The mask of GPT-2, GPT-NeoX and GPT-J, [1, 1, n, n], which old versions of transformers stored as a buffer of this name."""
_FURTHER_HEAD = re.compile(r"(^|\.)(mtp|nextn|medusa|v_head|value_head|score)\w*\.")
"""Heads beside the language model's own: they change none of its logits."""
_NEXT_TOKENS = re.compile(r"\.(eh_proj|enorm|hnorm|shared_head)\.")
"""What only a block that predicts further tokens has, stored as if it were the model's next block."""
_GUESSES = (
    (re.compile(r"lora_", re.IGNORECASE), "a LoRA adapter, to be merged first"),
    (re.compile(r"visi|image|audio|multi_modal|mm_|speech", re.IGNORECASE), "a part for pictures or sound"),
    (re.compile(r"expert|router|\.gate\.", re.IGNORECASE), "experts"),
    (re.compile(r"bias$"), "biases that it does not switch on (mlp_bias, attention_bias)"),
)


@dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint."""

    dtype: str
    """As safetensors writes it: "F32", "BF16", "F8_E4M3"."""
    shape: tuple[int, ...]


def is_mask(name: str, tensor: Stored) -> bool:
    """Tell whether a stored tensor is a causal mask, which is made anew."""
    return _MASK.search(name) is not None and len(tensor.shape) == 4 and tensor.shape[:2] == (1, 1)


def but_masks(names: Iterable[str], tensors: Mapping[str, Stored]) -> list[str]:
    """Return names of stored tensors, with or without what a model puts before them, that are no causal masks."""
    masks = tuple(f".{name}" for name, tensor in tensors.items() if is_mask(name, tensor))
    return [name for name in names if not any(f".{name}".endswith(mask) for mask in masks)]


def check_adapter(folder: Path) -> None:
    """Raise EvoPressError if a folder holds a LoRA adapter."""
    for name in ADAPTERS:
        if (folder / name).exists():
            raise EvoPressError(
                f"the folder {folder} holds a LoRA adapter ({name}): merge it into the weights first (peft: merge_and_unload, then "
                "save_pretrained), or take the adapter's files away to compress the weights without it"
            )


def readable_quantization(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what a config.json says of quantized weights that can be dequantized on loading; None: they are none, or cannot."""
    found = config.get(_QUANTIZATION)
    return dict(found) if isinstance(found, Mapping) and found.get("quant_method") in READABLE else None


def check_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise EvoPressError if a checkpoint's small files say that it is quantized in a way that cannot be undone on loading."""
    if readable_quantization(config):
        config = {key: value for key, value in config.items() if key != _QUANTIZATION}
    for key, value in _marks(config):
        method = value.get("quant_method", "unknown method") if isinstance(value, dict) else shown(value)
        where = "" if key == _QUANTIZATION else f" in config.json's {key}"
        raise EvoPressError(_already(folder, f"{method}{where}"))
    for path in sorted(folder.glob("*.json")):
        if "quant" in path.name.lower():
            raise EvoPressError(f"{_already(folder, path.name)}; if they are the original weights, remove this file")


def _marks(config: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    """Yield the entries of a config, and of what it holds, that say that the weights are quantized."""
    for key, value in config.items():
        codes = key in ("dtype", "torch_dtype") and re.search(r"float[468]_|int\d", str(value))
        named = _QUANTIZED_KEY.search(key) and not _CODEC_KEY.search(key)
        if codes or (named and value and str(value).lower() != "none"):
            yield key, value
        elif isinstance(value, dict):
            yield from ((f"{key}.{inner}", mark) for inner, mark in _marks(value))


def _already(folder: Path, what: str) -> str:
    return (
        f"the model in {folder} is already quantized ({what}): give the original weights, or dequantize them first (of "
        f"{', '.join(READABLE.values())} that is done here, where config.json names them)"
    )


def shards_of(folder: Path) -> dict[str, Any]:
    """Return the shard of every tensor that the index of weights names, nothing without an index.

    Raises: EvoPressError if it is no index.
    """
    path = folder / INDEX
    if not path.exists():
        return {}
    index = load_json(path, what="index of weights")
    shards = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(shards, dict):
        raise EvoPressError(f"{path} has no weight_map: fetch the checkpoint again")
    return shards


def loaded_files(folder: Path, weights: Collection[Path]) -> list[Path]:
    """Return those of a folder's safetensors files that transformers loads: one file, or the shards of the index."""
    by_name = {path.name: path for path in weights}
    names = {WEIGHTS} if WEIGHTS in by_name else set(shards_of(folder).values()) or by_name.keys()
    return [by_name[name] for name in sorted(names)]


def stored_tensors(files: Iterable[Path]) -> dict[str, Stored]:
    """Read the names, dtypes and shapes of tensors from the heads of safetensors files; those of damaged files are left out."""
    tensors: dict[str, Stored] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    part = file.get_slice(name)
                    tensors[name] = Stored(str(part.get_dtype()), tuple(part.get_shape()))
        except (OSError, SafetensorError):
            continue  # told when the model is loaded
    return tensors


def check_tensors(folder: Path, tensors: Mapping[str, Stored]) -> None:
    """Raise EvoPressError if tensors of a checkpoint are those of quantized weights, whatever its config says."""
    for name, tensor in tensors.items():
        codes = name.endswith((".weight", ".bias")) and tensor.dtype not in _DTYPES
        if (codes and not is_mask(name, tensor)) or _QUANTIZED_TENSOR.search(name):
            raise EvoPressError(_already(folder, f"{shown(name)} is stored as {tensor.dtype}"))


def check_shapes(folder: Path, tensors: Mapping[str, Stored], model: Any) -> None:
    """Raise EvoPressError if a stored tensor has another shape than the parameter of its name has in the model.

    One whose axes are in another order is let pass: transformers turns some round when it loads them.

    Args: model: the one that config.json describes, with or without its weights.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    others = [name for name, tensor in tensors.items() if sorted(shapes.get(name, tensor.shape)) != sorted(tensor.shape)]
    if others:
        more = f", and {len(others) - 1} more do not fit" if len(others) > 1 else ""
        raise EvoPressError(
            f"the weights in {folder} have {others[0]} as {list(tensors[others[0]].shape)}, where config.json makes it "
            f"{list(shapes[others[0]])}{more}: correct config.json, or fetch the checkpoint again"
        )


def silently_left_out(tensors: Iterable[str], homeless: Collection[str], model: Any, prefix: str) -> list[str]:
    """Return names of stored tensors of further heads that transformers leaves out by their names, and does not call homeless.

    Args:
        tensors: all names.
        homeless: those that transformers says it has no place for.
        model: what has been loaded.
        prefix: of the blocks: "model.layers".
    """
    modules = {part for name, _ in model.named_modules() for part in name.split(".")}
    count = len(model.get_submodule(prefix))
    found = []
    for name in tensors:
        head = _FURTHER_HEAD.search(name)
        if not (head and head[0].strip(".") not in modules) and _number_of(name, prefix) < count:
            continue
        if not any(f".{each}".endswith(f".{name}") for each in homeless):
            found.append(name)
    return found


def _number_of(name: str, prefix: str) -> int:
    """Return the number of the block that a tensor is in; -1: it is in none."""
    number = re.match(rf"{re.escape(prefix)}\.(\d+)\.", name)
    return int(number[1]) if number else -1


def check_places(
    folder: Path, homeless: Collection[str], config: Any, prefix: str, *, silent: Collection[str] = ()
) -> tuple[str, ...]:
    """Say what becomes of stored tensors that the model has no place for, which transformers drops in silence.

    Args:
        homeless: their names.
        config: the model's.
        prefix: of the blocks: "model.layers".
        silent: names of further heads that are not among them.

    Returns: those of further heads, which the model does without; a warning names them.
    Raises: EvoPressError for all others.
    """
    numbers = {name: _number_of(name, prefix) for name in homeless}
    beyond = {name: number for name, number in numbers.items() if number >= config.get_text_config().num_hidden_layers}
    next_tokens = {block for name, block in beyond.items() if _NEXT_TOKENS.search(name)}
    found = (name for name in homeless if _FURTHER_HEAD.search(name) or beyond.get(name, -1) in next_tokens)
    heads = tuple(sorted({*found, *silent}))
    others = sorted(name for name in homeless if name not in heads and not _OF_NO_CONSEQUENCE.search(name))
    if others:
        guess = next((guess for pattern, guess in _GUESSES if pattern.search(others[0])), "of another architecture")
        if others[0] in beyond:
            guess = f"blocks beyond its num_hidden_layers={config.get_text_config().num_hidden_layers}"
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise EvoPressError(
            f"the weights in {folder} hold {', '.join(others[:3])}{more}, which the model in config.json has no place for, "
            f"probably {guess}: correct config.json, or fetch the checkpoint again"
        )
    if heads:
        logger.warning(
            "the weights hold a further head (%s%s), which is neither used nor exported",
            heads[0],
            f" and {len(heads) - 1} more tensors" if len(heads) > 1 else "",
        )
    return heads
