"""The format of MLX and mlx-lm: `export=[mlx]`. Integers as they lie in the level database, packed anew, never rounded again.

MLX holds w = scale · q + bias for groups of columns; ours is scale · (q - zero), so bias = -scale · zero. A row's codes are one
stream of bits, least significant first, in 32-bit words, which is what `pack_bits` makes. Any layer may have its own bits and group
size. Format: https://ml-explore.github.io/mlx (`mlx.core.quantize`), and `nn.quantize` with a dictionary for every layer.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evopress.compress.gptq import Quantized
from evopress.engines import ENGINES
from evopress.errors import EvoPressError
from evopress.export.card import exactness, model_card
from evopress.export.exporter import INTEGERS, Export, Form
from evopress.export.rules import about_windows, refuse_head_size, refuse_unfit
from evopress.export.tensors_file import Entry, Section, num_bytes
from evopress.export.written import Weight, in_order, modules_dropped, shape_of, weights_of, write_model, zeros_in
from evopress.levels.codec import pack_bits

logger = logging.getLogger(__name__)
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "gemma2", "gemma3_text")
"""Models that are written here; mlx-lm 0.32.2 knows others, too."""
_OF_GELU = ("gemma", "gemma2", "gemma3_text")
"""Those whose MLPs mlx-lm computes with GELU; all others' with SiLU."""
_GELU, _SILU = ("gelu", "gelu_pytorch_tanh", "gelu_new", "gelu_fast"), ("silu", "swish")
_CAPS = ("attn_logit_softcapping", "final_logit_softcapping")
"""What Gemma 2 has in mlx-lm, always."""
_WITHOUT_BIASES = ("qwen3", "phi3", *_OF_GELU)
"""Those whose attention has no biases in mlx-lm."""
_WITHOUT_HEAD_SIZES = ("qwen2", "phi3")
"""Those whose heads are the model's width divided by their number in mlx-lm."""
_WITHOUT_WINDOWS = ("mistral", "qwen2", "qwen3", "phi3", "gemma2")
"""Those that have sliding windows in transformers and none in mlx-lm 0.32.2."""
_WITH_GAPS = "nemotron-nas"
"""mlx-lm's Llama whose blocks may be without attention or MLP."""
_OF_A_GAP = {"attention": ("input_layernorm", "self_attn"), "ffn": ("post_attention_layernorm", "mlp")}
_SCALES = {"float16": torch.float16, "float32": torch.float32}
_METADATA = {"format": "mlx"}


@dataclass
class _Rounding:
    """What the dtype of scales and biases has changed so far."""

    worst: float = 0.0
    """In steps of the grid that a weight lies on."""


class MLX:
    """See `Exporter`.

    Scales and biases are float16 unless `scales=float32`: 32 bits a group, as many as the level database has and the table counts.
    float16 rounds a bias by at most 2^-11 of itself: where zeros are codes, 0.03 of a grid's step at 6 bits and 0.12 at 8. float32
    is exact, and takes 32 bits more.
    """

    def __init__(self, *, scales: str = "float16") -> None:
        """Take the options.

        Args: scales: dtype of scales and biases, float16 or float32.
        """
        if scales not in tuple(_SCALES):
            raise EvoPressError(f"export_options.mlx.scales={scales} is unknown: choose {' or '.join(_SCALES)}")
        self._name, self._dtype = scales, _SCALES[scales]

    def check(self, config: Mapping[str, Any], forms: Iterable[Form]) -> None:
        """Refuse what MLX, or mlx-lm, does not hold."""
        if (model_type := config.get("model_type")) not in MODEL_TYPES:
            raise EvoPressError(
                f"export=[mlx] is not written for models of type {model_type}: it knows {', '.join(MODEL_TYPES)}; use "
                "export=[dequantized]"
            )
        known = _GELU if model_type in _OF_GELU else _SILU
        key = "hidden_activation" if model_type in ("gemma2", "gemma3_text") else "hidden_act"
        if (activation := config.get(key) or known[0]) not in known:
            raise EvoPressError(
                f"export=[mlx] cannot hold a {model_type} with {key}={activation}, where mlx-lm computes {known[0]}: use "
                "export=[dequantized]"
            )
        for cap in _CAPS if model_type == "gemma2" else ():
            if cap in config and config[cap] is None:
                raise EvoPressError(
                    f"export=[mlx] cannot hold a gemma2 with {cap}=null, where mlx-lm always has a cap: use export=[dequantized]"
                )
        if config.get("attention_bias") and model_type in _WITHOUT_BIASES:
            raise EvoPressError(
                f"export=[mlx] cannot hold a {model_type} with attention_bias={config['attention_bias']}, where mlx-lm has no "
                "place for biases: use export=[dequantized]"
            )
        refuse_head_size(config, _WITHOUT_HEAD_SIZES, asked="export=[mlx]", program="mlx-lm")
        refuse_unfit(ENGINES["mlx"], forms, asked="export=[mlx]", otherwise="use export=[dequantized]")

    def most_bits(self, form: Form) -> int:
        """See `Bounded`: exactly as many."""
        return form.rows * form.columns * form.bits + form.rows * form.columns // form.group_size * 2 * 8 * self._dtype.itemsize

    def resized_by(self, dtype: torch.dtype) -> str | None:
        """See `Resized`."""
        return None if self._dtype == torch.float16 else f"scales={self._name}"

    def serve(self, folder: str, dtype: torch.dtype) -> str:
        """See `Serves`."""
        return f"mlx_lm.server --model {folder}"

    def num_bytes(self, export: Export) -> int:
        """See `Exporter`."""
        with shape_of(export):
            return num_bytes(self._sections(export, _Rounding())[0], _METADATA)

    def write(self, folder: Path, export: Export) -> None:
        """Write weights, config, tokenizer and model card; see `written` for modules that are dropped."""
        rounding = _Rounding()
        with shape_of(export):
            sections, layers = self._sections(export, rounding)
            config = engine_config(export.model, layers, gaps=_gaps(export))
            write_model(folder, export, sections, config, _METADATA)
        told = exactness(rounding.worst, rounded=f"Scales and biases are {self._name}", dtype=export.model.dtype)
        own = export.model.config.model_type  # a Mistral with gaps is another architecture of mlx-lm
        told += about_windows(config | {"model_type": own}, _WITHOUT_WINDOWS, program="mlx-lm 0.32.2")
        logger.info("mlx: %s", told)
        card = model_card(
            export,
            library="mlx",
            how="`pip install mlx-lm`, and in this folder:",
            commands=("mlx_lm.generate --model . --prompt 'Once upon a time'", self.serve(".", export.model.dtype)),
            remarks=told,
        )
        (folder / "README.md").write_text(card, encoding="utf-8")

    def _sections(self, export: Export, rounding: _Rounding) -> tuple[list[Section], dict[str, dict[str, int]]]:
        """Return the file's tensors in the model's order, and the bits and group size of every layer that has them.

        The model is to be in the shape in which it is written.
        """
        sections: dict[str, Section] = {}
        layers: dict[str, dict[str, int]] = {}
        gaps = _gaps(export)
        zeros = zeros_in(ENGINES["mlx"].groups, 2) if gaps is None else lambda columns: None
        for weight in weights_of(export, zeros=zeros):
            if weight.form.kind == INTEGERS:
                layers[weight.name] = {"group_size": weight.form.group_size, "bits": weight.form.bits}
                sections[f"{weight.name}.weight"] = self._packed(weight, rounding)
            else:
                sections[f"{weight.name}.weight"] = weight.dense_section(export.model.dtype)
        missing = tuple(
            f"model.layers.{block}.{name}."
            for block, modules in enumerate(gaps or ())
            for module, names in _OF_A_GAP.items()
            for name in names
            if "no_op" in modules[module]
        )
        return [each for each in in_order(export.model, sections) if not each.entries[0].name.startswith(missing)], layers

    def _packed(self, weight: Weight, rounding: _Rounding) -> Section:
        rows, columns = weight.shape
        groups = columns // weight.form.group_size
        entries = (
            Entry(f"{weight.name}.weight", torch.uint32, (rows, columns * weight.form.bits // 32)),
            Entry(f"{weight.name}.scales", self._dtype, (rows, groups)),
            Entry(f"{weight.name}.biases", self._dtype, (rows, groups)),
        )

        def make() -> list[Tensor]:
            payload = weight.integers()
            words = pack_bits(payload.codes, payload.bits).view(torch.uint32).reshape(rows, -1)
            return [words, *self._scales_and_biases(payload, str(weight.form), rounding)]

        return Section(entries, make)

    def _scales_and_biases(self, payload: Quantized, what: str, rounding: _Rounding) -> tuple[Tensor, Tensor]:
        scales = payload.scales.double()
        biases = -scales * payload.zeros.double() + 0.0  # no negative zeros
        if float(biases.abs().max()) > torch.finfo(self._dtype).max:
            raise EvoPressError(f"the biases of {what} are too large for {self._name}: use '+export_options.mlx.scales=float32'")
        stored = scales.to(self._dtype), biases.to(self._dtype)
        off = [each.double() - exact for each, exact in zip(stored, (scales, biases), strict=True)]
        step = scales.abs().clamp_min(torch.finfo(torch.float64).tiny)
        for code in (0, 2**payload.bits - 1):  # what is off grows with the code, from one end to the other
            rounding.worst = max(rounding.worst, float(((off[0] * code + off[1]).abs() / step).masked_fill(scales == 0, 0.0).max()))
        return stored


def _gaps(export: Export) -> list[dict[str, Any]] | None:
    """Return what config.json says of every block where some are without attention or MLP.

    None: there is no such block, or mlx-lm's `nemotron-nas` is not this model, so that zeros stay there: it is Llama but for that,
    takes the size of a head from the model's width, and rounds an MLP's width up to a multiple of 256.
    """
    config, dropped = export.model.config, modules_dropped(export)
    heads, width, inner = config.num_attention_heads, config.hidden_size, getattr(config, "intermediate_size", 1)
    head_size = getattr(config, "head_dim", None) or width // heads
    is_it = config.model_type in ("llama", "mistral") and head_size * heads == width and inner % 256 == 0
    if not is_it or not any(map(any, dropped)) or all(attention for attention, _ in dropped):
        return None
    attention = {"n_heads_in_group": heads // config.num_key_value_heads}
    mlp = {"ffn_mult": 1.5 * (inner - 128) / width}  # its width is 2/3 of that, rounded up
    gap = {"no_op": True}
    return [{"attention": gap if gone[0] else attention, "ffn": gap if gone[1] else mlp} for gone in dropped]


def engine_config(
    model: Any, layers: Mapping[str, Mapping[str, int]], *, gaps: Sequence[Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """Return the config.json that mlx-lm reads: the model's own, written out in full, with what mlx-lm calls otherwise.

    transformers keeps the base of the rotary embedding in `rope_parameters`. mlx-lm reads `rope_theta` and `rope_scaling` beside
    it, and takes 10,000 and no scaling, without a word, where they are missing.
    """
    config = {key: value for key, value in json.loads(model.config.to_json_string(use_diff=False)).items() if key[:1] != "_"}
    config["architectures"] = [type(model).__name__]
    config |= _rotary(config.get("rope_parameters") or {})
    if config["model_type"] == "gemma3_text":
        config["sliding_window_pattern"] = _pattern(config["layer_types"])
    if gaps is not None:
        config |= {"model_type": _WITH_GAPS, "block_configs": list(gaps)}
    config.pop("quantization_config", None)
    if layers:
        first = next(iter(layers.values()))
        quantization = {**first, "mode": "affine", **{name: dict(layer) for name, layer in layers.items()}}
        config |= {"quantization": quantization, "quantization_config": quantization}
    return config


def _pattern(layer_types: Sequence[str]) -> int:
    """Return every how-manieth block has full attention, which is all that mlx-lm can be told.

    Raises: EvoPressError if that does not say which blocks do.
    """
    full = [index for index, kind in enumerate(layer_types) if kind == "full_attention"]
    every = full[0] + 1 if full else 0
    if not every or full != list(range(every - 1, len(layer_types), every)):
        raise EvoPressError(
            f"export=[mlx] cannot hold this model, whose full-attention blocks are {full}: mlx-lm expects every n-th block; "
            "use export=[dequantized]"
        )
    return every


def _rotary(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that say at the top level what `rope_parameters` says."""
    if not any(isinstance(value, Mapping) for value in parameters.values()):
        return _of_one_kind(parameters)
    found = _of_one_kind(parameters.get("full_attention") or {})  # Gemma 3: one base for each kind of attention
    local = parameters.get("sliding_attention") or {}
    return found | ({"rope_local_base_freq": local["rope_theta"]} if "rope_theta" in local else {})


def _of_one_kind(parameters: Mapping[str, Any]) -> dict[str, Any]:
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    found = {key: parameters[key] for key in ("rope_theta", "partial_rotary_factor") if parameters.get(key) is not None}
    scaling = {key: value for key, value in parameters.items() if key not in found}
    if "original_max_position_embeddings" in scaling:
        found["original_max_position_embeddings"] = scaling["original_max_position_embeddings"]
    return found | {"rope_scaling": None if kind == "default" else {**scaling, "type": kind, "rope_type": kind}}
