"""One adapter per model family: where the blocks, their linear units, the final norm and the head are.

A new family costs one entry here and one in the test. Fused projections (Phi-3) are units like any other; mixture-of-experts and
linear-attention blocks have no entry and are refused with a sentence.
"""

from __future__ import annotations

from dataclasses import dataclass

from evopress.errors import EvoPressError

_LLAMA_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_LLAMA_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


@dataclass(frozen=True)
class Family:
    """Names inside a causal language model of transformers."""

    name: str
    model_types: tuple[str, ...]
    """Values of `config.model_type` that this adapter fits."""
    linears: tuple[str, ...] = _LLAMA_ATTENTION + _LLAMA_MLP
    """Linear weights of a block, in the order of the computation."""
    plain_attention: bool = False
    """Its attention is softmax(scale · Q Kᵀ) V, no more: it may use `causal_chunks` on a CPU."""
    attention: str = "self_attn"
    mlp: str = "mlp"
    """The MLP module; for OPT, whose MLP is no module of its own, its last linear."""
    around_attention: tuple[str, ...] = ("input_layernorm",)
    """What else runs in a block for the attention alone: not needed where that is dropped."""
    around_mlp: tuple[str, ...] = ("post_attention_layernorm",)
    """What else runs in a block for the MLP alone."""
    decoder: str = "model"
    """The module that owns embeddings, blocks and final norm."""
    blocks: str = "layers"
    """The list of blocks, inside the decoder."""
    after_blocks: tuple[str, ...] = ("norm",)
    """What the decoder applies after the last block, in order; missing ones are skipped."""
    per_block: tuple[str, ...] = ("layer_types", "pruned_heads")
    """Fields of the configuration with one entry per block: lists, or dictionaries that blocks' numbers are keys of."""

    @property
    def attention_output(self) -> str:
        """The linear whose output is the attention's."""
        return [name for name in self.linears if name.startswith(f"{self.attention}.")][-1]

    @property
    def mlp_output(self) -> str:
        """The linear whose output is the MLP's."""
        return self.linears[-1]


FAMILIES = (
    Family("llama", ("llama",), plain_attention=True),
    Family("mistral", ("mistral", "ministral"), plain_attention=True),
    Family("qwen", ("qwen2", "qwen3"), plain_attention=True),
    Family(
        "phi3",
        ("phi3",),
        plain_attention=True,
        linears=("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"),
    ),
    Family("gemma", ("gemma",)),
    Family(
        "gemma2",
        ("gemma2", "gemma3_text"),
        around_attention=("input_layernorm", "post_attention_layernorm"),
        around_mlp=("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ),
    Family(
        "opt",
        ("opt",),
        linears=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "fc1", "fc2"),
        mlp="fc2",
        around_attention=("self_attn_layer_norm",),
        around_mlp=("final_layer_norm", "fc1"),
        decoder="model.decoder",
        after_blocks=("final_layer_norm", "project_out"),
    ),
)


def family_of(model_type: str) -> Family:
    """Return the adapter for `config.model_type`.

    Raises: EvoPressError for an architecture without an adapter.
    """
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.model_types)
    raise EvoPressError(
        f"architecture {model_type!r} has no adapter (known: {known}): choose another model or add an entry to "
        "evopress/models/families.py"
    )
