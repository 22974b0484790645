"""What is known of a model family: where the blocks, their linear units, the final norm and the head are.

A name helps where attention is plain (it runs faster on a CPU) and where norms need not run for what is dropped. Any other causal
language model is looked at instead, see `outline.py`, which fills in the same fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

_LLAMA_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_LLAMA_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


@dataclass(frozen=True)
class Parts:
    """Names inside one block."""

    linears: tuple[str, ...]
    """Linear weights, in the order of the computation."""
    attention: tuple[str, ...] = ()
    """What mixes tokens: an attention module, a state-space mixer, or several side by side; none: the block has an MLP alone."""
    mlp: tuple[str, ...] = ()
    """What works on each token alone; none: the block has a mixer alone."""
    around_attention: tuple[str, ...] = ()
    around_mlp: tuple[str, ...] = ()
    """What else runs for one of them alone: not needed where that is dropped."""
    zeroed_attention: tuple[str, ...] = ()
    zeroed_mlp: tuple[str, ...] = ()
    """What has to be zero for one of them to add nothing."""
    returns: Mapping[str, int] = field(default_factory=dict)
    """Values that the block (by the name "") and these modules return as a tuple, as a negative number in a list; 0: a tensor."""

    def is_of_attention(self, name: str) -> bool:
        """Tell whether something of this name lies in the attention."""
        return any(name == inner or name.startswith(f"{inner}.") for inner in self.attention)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Which of attention and MLP the block has."""
        return tuple(kind for kind, names in (("attention", self.attention), ("mlp", self.mlp)) if names)


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
    by_block: tuple[Parts, ...] = ()
    """Every block's own parts, where they were found by looking at the model; of what has a name above all are alike."""
    dense: Mapping[str, str] = field(default_factory=dict)
    """What of the blocks stays as it is, by its name there, and why."""
    undroppable: str = ""
    """Why no module can be dropped; empty: they can."""

    @property
    def is_found(self) -> bool:
        """Whether this is what a look at the model has found, not what is known of it."""
        return bool(self.by_block)

    @property
    def prefix(self) -> str:
        """The full name of the list of blocks: "model.layers"."""
        return f"{self.decoder}.{self.blocks}".strip(".")

    def parts(self, index: int) -> Parts:
        """Return the names inside block `index`."""
        return self.by_block[index] if self.by_block else self._alike

    @cached_property
    def _alike(self) -> Parts:
        outputs = [name for name in self.linears if name.startswith(f"{self.attention}.")]
        return Parts(
            self.linears,
            (self.attention,),
            (self.mlp,),
            self.around_attention,
            self.around_mlp,
            (outputs[-1],),
            (self.linears[-1],),
            {self.attention: 2},
        )


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


def named_family(model_type: str) -> Family | None:
    """Return what is known of `config.model_type`; None: nothing."""
    return next((family for family in FAMILIES if model_type in family.model_types), None)


def family_of(model_type: str) -> Family:
    """Return what is known of `config.model_type`, which must be something."""
    family = named_family(model_type)
    assert family is not None, f"{model_type} is no name of a family"
    return family
