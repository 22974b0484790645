"""The format of MLX and mlx-lm: `export=[mlx]`. Integers as they lie in the level database, packed anew, never rounded again.

MLX holds w = scale · q + bias for groups of columns; ours is scale · (q - zero), so bias = -scale · zero. A row's codes are one
stream of bits, least significant first, in 32-bit words, which is what `pack_bits` makes. Any layer may have its own bits and group
size. Format: https://ml-explore.github.io/mlx (`mlx.core.quantize`), and `nn.quantize` with a dictionary for every layer.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evopress.compress.compressor import Payload
from evopress.compress.gptq import Dense, Quantized
from evopress.errors import EvoPressError
from evopress.export.card import model_card
from evopress.export.exporter import INTEGERS, SPARSE, Export, Form
from evopress.export.tensors_file import Entry, Section, num_bytes, write_sections
from evopress.levels.codec import pack_bits
from evopress.levels.modules import ATTENTION, MLP, dropped_modules, is_module
from evopress.models.blocks import BlockModel
from evopress.models.dropping import without_dropped

logger = logging.getLogger(__name__)
BITS, GROUPS = (1, 2, 3, 4, 5, 6, 8), (32, 64, 128)
"""What MLX has kernels for."""
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "gemma2", "gemma3_text")
"""Of the architectures that EvoPress knows, those that mlx-lm knows."""
_SCALES = {"float16": torch.float16, "float32": torch.float32}
_METADATA = {"format": "mlx"}
_LARGEST = torch.finfo(torch.float16).max


@dataclass
class _Rounding:
    """What float16 scales and biases have changed so far."""

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
        if scales not in _SCALES:
            raise EvoPressError(f"export_options.mlx.scales={scales} is unknown: choose {' or '.join(_SCALES)}")
        self._dtype = _SCALES[scales]

    def check(self, config: Mapping[str, Any], forms: Iterable[Form]) -> None:
        """Refuse what MLX, or mlx-lm, does not hold."""
        if (model_type := config.get("model_type")) not in MODEL_TYPES:
            raise EvoPressError(
                f"export=[mlx] cannot hold a model of type {model_type}, which mlx-lm does not know (it knows "
                f"{', '.join(MODEL_TYPES)}): use export=[dequantized]"
            )
        for form in forms:
            if form.kind == SPARSE:
                raise EvoPressError(f"export=[mlx] cannot hold sparse weights ({form}): use export=[dequantized]")
            if form.kind != INTEGERS:
                continue
            if form.bits not in BITS:
                raise EvoPressError(
                    f"export=[mlx] cannot hold {form}: MLX has {', '.join(map(str, BITS))} bits; leave {form.bits} out of "
                    "method.levels, or use export=[dequantized]"
                )
            if form.group_size not in GROUPS:
                raise EvoPressError(
                    f"export=[mlx] cannot hold {form}: MLX has groups of {', '.join(map(str, GROUPS))}; set method.group_size to "
                    "one of them, or use export=[dequantized]"
                )

    def num_bytes(self, export: Export) -> int:
        """See `Exporter`."""
        with _shape_of(export):
            return num_bytes(self._sections(export, _Rounding())[0], _METADATA)

    def write(self, folder: Path, export: Export) -> None:
        """Write weights, config, tokenizer and model card; see `_shape_of` for modules that are dropped."""
        rounding = _Rounding()
        with _shape_of(export):
            sections, layers = self._sections(export, rounding)
            config = engine_config(export.model, layers)
            write_sections(folder / "model.safetensors", sections, _METADATA)
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            if export.model.can_generate():
                export.model.generation_config.save_pretrained(folder)
        export.tokenizer.save_pretrained(folder)
        if self._dtype == torch.float16:
            exactness = (
                "Scales and biases are float16: no weight differs from the one that was measured by more than "
                f"{rounding.worst:.2g} of a step of its grid."
            )
        else:
            exactness = "Scales and biases are float32, so the weights are those that were measured, bit for bit."
        logger.info("mlx: %s", exactness)
        card = model_card(
            export,
            library="mlx",
            how="`pip install mlx-lm`, and in this folder:",
            commands=("mlx_lm.generate --model . --prompt 'Once upon a time'", "mlx_lm.server --model ."),
            remarks=exactness,
        )
        (folder / "README.md").write_text(card, encoding="utf-8")

    def _sections(self, export: Export, rounding: _Rounding) -> tuple[list[Section], dict[str, dict[str, int]]]:
        """Return the file's tensors in the model's order, and the bits and group size of every layer that has them.

        The model is to be in the shape in which it is written.
        """
        blocks, model, space = export.live.blocks, export.model, export.live.space
        gone = dropped_modules(space, export.genome)
        names = {id(module): name for name, module in model.named_modules()}
        slots = {name: slot for part in blocks.parts for name, slot in blocks.slots(part).items()}
        sections: dict[str, Section] = {}
        layers: dict[str, dict[str, int]] = {}

        def put(name: str, shape: Sequence[int], form: Form, read: Callable[[], Payload]) -> None:
            if form.kind == INTEGERS:
                layers[name] = {"group_size": form.group_size, "bits": form.bits}
                sections[f"{name}.weight"] = self._packed(name, shape, form, read, rounding)
            else:
                entry = Entry(f"{name}.weight", model.dtype, tuple(shape))
                sections[entry.name] = Section((entry,), lambda: [_dense(read(), form)])

        for index, (unit, form) in enumerate(zip(space.units, export.forms, strict=True)):
            if is_module(unit) or (name := names.get(id(slots[unit.name].module))) is None:  # in a block that is gone
                continue
            if unit.is_outside or (unit.block, _module_of(blocks, unit.name)) not in gone:
                put(name, slots[unit.name].weight.shape, form, partial(export.levels.read, index, export.genome[index]))
        for block in range(len(blocks.blocks)):
            for inner, linear in blocks.linears(block).items():
                name, columns = names.get(id(linear)), linear.weight.shape[1]
                group_size = next((size for size in reversed(GROUPS) if columns % size == 0), None)
                if name and group_size and (block, _module_of(blocks, inner)) in gone:
                    form = Form(name, "zeros", INTEGERS, 2, group_size)
                    put(name, linear.weight.shape, form, partial(_zeros, linear.weight.shape, group_size))
        return list(_in_order(model, sections)), layers

    def _packed(self, name: str, shape: Sequence[int], form: Form, read: Callable[[], Payload], rounding: _Rounding) -> Section:
        rows, columns = shape
        groups = columns // form.group_size
        entries = (
            Entry(f"{name}.weight", torch.uint32, (rows, columns * form.bits // 32)),
            Entry(f"{name}.scales", self._dtype, (rows, groups)),
            Entry(f"{name}.biases", self._dtype, (rows, groups)),
        )

        def make() -> list[Tensor]:
            payload = read()
            if not isinstance(payload, Quantized) or payload.bits != form.bits:
                raise EvoPressError(f"{form} is stored otherwise in the level database: remove it, and it is built again")
            words = pack_bits(payload.codes, payload.bits).view(torch.uint32).reshape(rows, -1)
            return [words, *self._scales_and_biases(payload, str(form), rounding)]

        return Section(entries, make)

    def _scales_and_biases(self, payload: Quantized, what: str, rounding: _Rounding) -> tuple[Tensor, Tensor]:
        scales = payload.scales.to(torch.float32)
        biases = -scales * payload.zeros.to(torch.float32) + 0.0  # no negative zeros
        if self._dtype == torch.float32:
            return scales, biases
        if float(biases.abs().max()) > _LARGEST:
            raise EvoPressError(f"the biases of {what} are too large for float16: use '+export_options.mlx.scales=float32'")
        stored = scales.to(torch.float16), biases.to(torch.float16)
        off = [each.double() - exact.double() for each, exact in zip(stored, (scales, biases), strict=True)]
        step = scales.double().abs().clamp_min(torch.finfo(torch.float64).tiny)
        for code in (0, 2**payload.bits - 1):  # what is off grows with the code, from one end to the other
            rounding.worst = max(rounding.worst, float(((off[0] * code + off[1]).abs() / step).masked_fill(scales == 0, 0.0).max()))
        return stored


def _dense(payload: Payload, form: Form) -> Tensor:
    if not isinstance(payload, Dense):
        raise EvoPressError(f"{form} is stored otherwise in the level database: remove it, and it is built again")
    return payload.weight


def _module_of(blocks: BlockModel, name: str) -> str:
    return ATTENTION if blocks.is_of_attention(name) else MLP


def _zeros(shape: Sequence[int], group_size: int) -> Quantized:
    """Return what stands in the place of a dropped module's linear: zeros, of 2 bits."""
    rows, columns = shape
    scales = torch.zeros(rows, columns // group_size, dtype=torch.float16)
    return Quantized(torch.zeros(rows, columns, dtype=torch.uint8), scales, scales.to(torch.int16), 2, torch.float16)


def _in_order(model: nn.Module, sections: Mapping[str, Section]) -> Iterator[Section]:
    """Yield a section for everything that the model has, in its order, a tied weight once; what has no section is as it is."""
    seen: set[int] = set()
    everything = {**dict(model.named_parameters(remove_duplicate=False)), **model.state_dict(keep_vars=True)}
    for name, tensor in everything.items():
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        if name in sections:
            yield sections[name]
        else:
            yield Section((Entry(name, tensor.dtype, tuple(tensor.shape)),), lambda tensor=tensor: [tensor.data])  # type: ignore[misc]


@contextmanager
def _shape_of(export: Export) -> Iterator[None]:
    """Hold the model without the blocks that are dropped whole, those that stay numbered anew.

    An attention or MLP that alone is dropped stays in its place: its linears are zeros of 2 bits, or, where no group of MLX's
    divides their rows, its output projection is zeros and the others are dense.
    """
    live = export.live
    dropped = [live.dropped_in(export.genome, index) for index in range(len(live.blocks.blocks))]
    with without_dropped(live.blocks, dropped) if any(map(any, dropped)) else nullcontext():
        yield


def engine_config(model: Any, layers: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    """Return the config.json that mlx-lm reads: the model's own, written out in full, with what mlx-lm calls otherwise.

    transformers keeps the base of the rotary embedding in `rope_parameters`. mlx-lm reads `rope_theta` and `rope_scaling` beside
    it, and takes 10,000 and no scaling, without a word, where they are missing.
    """
    config = {key: value for key, value in json.loads(model.config.to_json_string(use_diff=False)).items() if key[:1] != "_"}
    config["architectures"] = [type(model).__name__]
    config |= _rotary(config.get("rope_parameters") or {})
    if config["model_type"] == "gemma3_text":
        config["sliding_window_pattern"] = _pattern(config["layer_types"])
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
            f"export=[mlx] cannot hold this model, of whose blocks {full} have full attention: mlx-lm gives it to every n-th, and "
            "needs one that has it; use export=[dequantized]"
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
