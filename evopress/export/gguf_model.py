"""What a GGUF file says of a model that llama.cpp calls Llama, Qwen 2 or Qwen 3, beside its tensors and its tokenizer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gguf
import torch
from torch import Tensor

from evopress.errors import EvoPressError

ARCHITECTURES = {"llama": "LLAMA", "mistral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}
"""Model types that are written, and what `gguf.MODEL_ARCH` calls them."""


def order_of_rows(name: str, rows: int, config: Mapping[str, Any]) -> Tensor | None:
    """Return the order of rows that llama.cpp wants of a weight or bias: it turns neighbours, Llama's code halves of a head."""
    if ARCHITECTURES[config["model_type"]] != "LLAMA" or ".self_attn." not in name:
        return None
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}.get(name.split(".")[-2])
    return None if heads is None else torch.arange(rows).reshape(heads, 2, -1).transpose(1, 2).reshape(-1)


@dataclass(frozen=True)
class Gaps:
    """The modules that blocks are without, though the other one stays.

    llama.cpp has blocks without attention in one architecture alone, deci, which is Llama but for that. It takes a block without an
    MLP for one without attention, too; an MLP of width 1 that is zeros is what it computes rightly. And it takes the size of a head
    from the first block, whose attention is zeros therefore.
    """

    attention: tuple[bool, ...]
    """Of each block that is written: it has none."""
    mlp: tuple[bool, ...]

    @classmethod
    def of(cls, config: Mapping[str, Any], dropped: Sequence[Sequence[int]]) -> Gaps | None:
        """Return the gaps of a model; None if there is none, or llama.cpp has no architecture that has any.

        Args: dropped: for every block that is written whether its attention and its MLP are dropped, as 0 or 1 each.
        """
        attention = tuple(bool(gone) and block > 0 for block, (gone, _) in enumerate(dropped))
        mlp = tuple(bool(gone) for _, gone in dropped)
        return cls(attention, mlp) if ARCHITECTURES[config["model_type"]] == "LLAMA" and any(attention + mlp) else None

    def in_place_of(self, name: str, hidden_size: int) -> tuple[int, ...] | None:
        """Return the shape of the zeros that stand in a parameter's place, () for none; None: the parameter itself stays."""
        parts = name.split(".")
        if "layers" not in parts:
            return None
        block, module = int(parts[parts.index("layers") + 1]), parts[parts.index("layers") + 2]
        if self.attention[block] and module in ("self_attn", "input_layernorm"):
            return ()
        if self.mlp[block] and module == "mlp":
            return () if parts[-1] == "bias" else (hidden_size, 1) if parts[-2] == "down_proj" else (1, hidden_size)
        return None


def architecture(config: Mapping[str, Any]) -> Any:
    """Return what of `gguf.MODEL_ARCH` names the model's tensors."""
    return gguf.MODEL_ARCH[ARCHITECTURES[config["model_type"]]]


def architecture_name(config: Mapping[str, Any], gaps: Gaps | None) -> str:
    """Return what the file calls the model's architecture."""
    return str(gguf.MODEL_ARCH_NAMES[architecture(config) if gaps is None else gguf.MODEL_ARCH.DECI])


def add_model(writer: Any, config: Mapping[str, Any], gaps: Gaps | None, *, name: str, licence: str | None) -> None:
    """Put into a file's metadata what llama.cpp asks of a model of these types."""
    parameters = config.get("rope_parameters") or {}
    heads = config["num_attention_heads"]
    head_size = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_type("model")
    writer.add_name(name)
    if licence:
        writer.add_license(licence.lower())
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    attention, mlp = (None, None) if gaps is None else (gaps.attention, gaps.mlp)
    for add, size, gone, instead in (
        (writer.add_head_count, heads, attention, 0),
        (writer.add_head_count_kv, config["num_key_value_heads"], attention, 0),
        (writer.add_feed_forward_length, config["intermediate_size"], mlp, 1),
    ):
        add(size if gone is None else [instead if each else size for each in gone])
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(head_size)
    writer.add_rope_freq_base(float(parameters.get("rope_theta", 10000.0)))
    if (kind := _kind_of(parameters)) in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(float(parameters["factor"]))
        if kind == "yarn":
            writer.add_rope_scaling_orig_ctx_len(int(parameters["original_max_position_embeddings"]))
    writer.add_vocab_size(config["vocab_size"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _kind_of(parameters: Mapping[str, Any]) -> str:
    return str(parameters.get("rope_type", parameters.get("type", "default")))


def frequency_factors(config: Mapping[str, Any]) -> Tensor | None:
    """Return by what Llama 3 divides the rotary embedding's frequencies, float32 [head size / 2]; None: by nothing.

    Raises: EvoPressError if llama.cpp has no such rotary embedding.
    """
    parameters = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    kind = _kind_of(parameters)
    ordinary = {"rope_theta", "rope_type", "type", "factor", "original_max_position_embeddings", "finetuned"}
    beyond = sorted(set(parameters) - ordinary) if kind in ("yarn", "linear") else []
    if kind not in ("default", "linear", "llama3", "yarn") or beyond or parameters.get("partial_rotary_factor", 1.0) != 1.0:
        told = f"{kind} with {', '.join(beyond)}" if beyond else kind
        raise EvoPressError(f"export=[gguf] cannot hold this model's rotary embedding ({told}): use export=[dequantized]")
    if kind != "llama3":
        return None
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    theta = float(parameters.get("rope_theta") or config.get("rope_theta") or 10000.0)
    old, factor = float(parameters["original_max_position_embeddings"]), float(parameters["factor"])
    low, high = float(parameters["low_freq_factor"]), float(parameters["high_freq_factor"])
    turns = old * theta ** (-torch.arange(0, size, 2, dtype=torch.float64) / size) / (2 * math.pi)  # in the first context
    smooth = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1.0 / ((1.0 - smooth) / factor + smooth)).to(torch.float32)
