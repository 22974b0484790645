"""Tiny configurations of any causal architecture that transformers has, for tests and for `docs/models.md`."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from evopress.errors import EvoPressError

_MOST_WEIGHTS = 2_000_000
_TWO = ["sliding_attention", "full_attention"]
_WIDE = ("hidden_size", "n_embd", "d_model", "dim")
_SIZES: dict[str, Any] = {
    **dict.fromkeys(_WIDE, 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 2),
    **dict.fromkeys(("num_key_value_heads", "n_kv_heads"), 1),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "decoder_ffn_dim", "encoder_ffn_dim"), 64),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 512),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("shared_intermediate_size", "index_head_dim", "index_topk"), 16),
    **dict.fromkeys(("head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("n_shared_experts", "first_k_dense_replace", "n_group", "topk_group"), 1),
    **dict.fromkeys(("mamba_n_groups", "n_groups"), 1),
    **dict.fromkeys(("mamba_d_state", "mamba_d_head", "mamba_head_dim", "mamba_chunk_size", "chunk_size", "ssm_state_size"), 16),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("linear_num_key_heads", "mamba_expand", "encoder_layers", "encoder_attention_heads", "index_n_heads"), 2),
    "mamba_d_ssm": 64,
    "vocab_size": 257,
    "word_embed_proj_dim": 32,
    "sliding_window": 16,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
_AS_MANY_KEYS = "axk1 axk2 deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa minicpm3 youtu diffllama dots3_note_text"
_PADDED = "camembert data2vec-text roberta roberta-prelayernorm xlm-roberta xlm-roberta-xl modernbert-decoder prophetnet emu3"
_FURTHER: dict[str, dict[str, Any]] = {
    **{name: {"num_key_value_heads": 2} for name in _AS_MANY_KEYS.split()},
    **{name: {"pad_token_id": 1} for name in _PADDED.split()},
    "bailing_hybrid": {"num_local_experts": 4, "num_key_value_heads": 2, "layer_group_size": 2},
    "codegen": {"n_head": 4, "n_embd": 64, "rotary_dim": 8, "n_inner": None},
    "cohere_compass_text": {"layer_types": _TWO * 2, "head_dim": 16},
    "cpmant": {"dim_ff": 64, "dim_head": 16},
    "ctrl": {"dff": 64},
    "ernie4_5_moe": {"moe_num_shared_experts": 1},
    "gemma3n_text": {
        "vocab_size_per_layer_input": 257,
        "hidden_size_per_layer_input": 16,
        "num_kv_shared_layers": 0,
        "layer_types": _TWO * 2,
        "intermediate_size": [64] * 4,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gemma4_text": {
        "vocab_size_per_layer_input": 257,
        "hidden_size_per_layer_input": 16,
        "global_head_dim": 16,
        "num_kv_shared_layers": 0,
        "layer_types": _TWO * 2,
    },
    "gemma4_unified_text": {"global_head_dim": 16, "layer_types": _TWO * 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 16},
    "gptj": {"rotary_dim": 8},
    "hy_v4": {"num_key_value_heads": 2},
    "inkling_text": {"swa_head_dim": 16, "swa_num_attention_heads": 2, "swa_num_key_value_heads": 1, "rel_extent": 32},
    "inkling2_text": {"swa_head_dim": 16, "swa_num_attention_heads": 2, "swa_num_key_value_heads": 1, "rel_extent": 32},
    "kimi_linear": {"num_key_value_heads": 2, "linear_head_dim": 16, "linear_num_heads": 2, "num_local_experts": 4},
    "kolibri1": {"num_experts": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "longcat_flash": {"num_layers": 2, "num_key_value_heads": 2, "zero_expert_num": 2, "expert_ffn_hidden_size": 16},
    "mamba2": {"num_heads": 4, "state_size": 16},
    "nemotron_h": {"layers_block_type": ["mamba", "moe", "attention", "mlp"]},
    **{name: {"num_experts": 4} for name in ("qwen3_moe", "mellum")},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [16, 16], "axial_pos_shape": [16, 32], "attention_head_size": 16},
    "roc_bert": {
        "shape_vocab_size": 8,
        "pronunciation_vocab_size": 8,
        "pronunciation_embed_dim": 32,
        "shape_embed_dim": 32,
    },
    "xlm": {"emb_dim": 32},
    "zamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 16, "num_key_value_heads": 2},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2, "num_key_value_heads": 2, "n_mamba_heads": 4},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}
"""What an architecture asks for beside sizes."""


def causal_types() -> tuple[str, ...]:
    """Return every `config.model_type` that transformers has a causal language model for."""
    return tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def any_config(model_type: str, **changes: Any) -> PretrainedConfig:
    """Return a tiny configuration: width 32, two heads, four blocks, 257 tokens, four experts where there are experts."""
    return _config(CONFIG_MAPPING[model_type], model_type, changes)


def _config(kind: Any, model_type: str, changes: dict[str, Any]) -> PretrainedConfig:
    names: set[str] = set(inspect.signature(kind.__init__).parameters) | set(kind.attribute_map)
    for each in kind.__mro__:
        names |= set(vars(each).get("__annotations__", {}))
    fields = {key: value for key, value in _SIZES.items() if key in names and key not in kind.attribute_map}
    parts: dict[str, Any] = getattr(kind, "sub_configs", None) or {}
    for key, inner in parts.items():
        if key in ("text_config", "decoder") and inner.model_type:
            fields[key] = _config(inner, inner.model_type, {}).to_dict()
    config: PretrainedConfig = kind(**fields | _FURTHER.get(model_type, {}) | changes)
    return config


def any_model(model_type: str, *, seed: int = 0, **changes: Any) -> Any:
    """Return a tiny model with random weights in float32, in evaluation mode; weights depend on the arguments alone.

    Raises: EvoPressError if its default sizes make it no tiny one; whatever the architecture makes of such a configuration.
    """
    config = any_config(model_type, **changes)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    if size > _MOST_WEIGHTS:
        raise EvoPressError(f"the smallest {model_type} that is known here has {size / 1e6:.0f} M weights")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():  # larger than usual, so that levels differ in more than rounding
            if parameter.ndim > 1:
                parameter.data.normal_(std=0.15)
    return model.eval().requires_grad_(False)
