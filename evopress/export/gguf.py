"""The format of llama.cpp: `export=[gguf]`. Integers as they lie in the level database, packed anew, never rounded again.

Every weight takes the smallest type that holds its integers: codes less zeros where these fit a symmetric type (Q4_0, Q5_0, Q8_0),
codes beside a minimum where not (Q4_1, Q5_1), K types where a group is one of their blocks of 256. GGUF keeps the scales of a type
where it wants them, so groups are of a multiple of 32. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import logging
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np
import torch
from torch import Tensor

from evopress.compress.gguf_levels import GGUFWeight
from evopress.compress.gguf_types import GGUF_TYPES, Blocks, GGUFType
from evopress.compress.gptq import Quantized
from evopress.errors import EvoPressError
from evopress.export.card import exactness, model_card
from evopress.export.exporter import GGUF_TYPE, INTEGERS, SPARSE, Export, Form
from evopress.export.gguf_model import (
    ARCHITECTURES,
    Gaps,
    add_model,
    architecture,
    architecture_name,
    frequency_factors,
    order_of_rows,
)
from evopress.export.gguf_tokenizer import add_tokenizer
from evopress.export.rules import about_windows, refuse_head_size
from evopress.export.written import Weight, mismatch, modules_dropped, shape_of, weights_of, zeros_in

logger = logging.getLogger(__name__)
logging.getLogger("gguf").setLevel(logging.WARNING)  # the package tells what it is about to do
FILE = "model.gguf"
_DENSE = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_ROUNDED = GGUF_TYPES["Q8_0"]
_ALIGNMENT = gguf.GGUF_DEFAULT_ALIGNMENT
_WITHOUT_BIASES = ("qwen3",)
"""Model types whose attention's output has no bias in llama.cpp."""
_WITHOUT_HEAD_SIZES = ("qwen2",)
"""Those whose heads are the model's width divided by their number in llama.cpp."""
_WITHOUT_WINDOWS = ("mistral", "qwen2", "qwen3")
"""Those that have sliding windows in transformers and none in llama.cpp."""
_MOST_BITS = 7
"""Of integers with any zero: their differences fit Q8_0's signed bytes."""


@dataclass(frozen=True)
class _Tensor:
    """A tensor that will be there."""

    name: str
    shape: tuple[int, ...]
    kind: str
    """F32, F16, BF16 or a quantized type."""
    make: Callable[[], Tensor]
    """Returns its bytes, uint8; called once, when it is written."""

    @property
    def num_bytes(self) -> int:
        """Of its data."""
        width, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[self.kind]]
        return math.prod(self.shape) // int(width) * int(size)


@dataclass
class _Rounding:
    """What float16 minima have changed so far."""

    worst: float = 0.0
    """In steps of the grid that a weight lies on."""


class GGUF:
    """See `Exporter`.

    A zero that no symmetric type holds becomes a float16 minimum, as `Q4_1` and `Q5_1` have it, which rounds it by at most 2^-11 of
    itself; `exact=true` takes the next larger symmetric type instead.
    """

    def __init__(self, *, exact: bool = False, dense: str | None = None, pre_tokenizer: str | None = None) -> None:
        """Take the options.

        Args:
            exact: let no weight differ from the one that was measured, where that takes a larger type.
            dense: what matrices that are no units are held as: float32, float16, bfloat16, or Q8_0, rounded to the nearest as
                llama.cpp's own tool does, where rows are a multiple of 32; None: the model's dtype, as units at a dense level are.
            pre_tokenizer: llama.cpp's name for how the tokenizer splits text; None: by what the tokenizer says.
        """
        dtypes = {str(dtype).removeprefix("torch."): dtype for dtype in _DENSE}
        if dense is not None and dense not in (*dtypes, _ROUNDED.name):
            raise EvoPressError(f"export_options.gguf.dense={dense} is unknown: choose {', '.join((*dtypes, _ROUNDED.name))}")
        if not isinstance(exact, bool):
            raise EvoPressError(f"export_options.gguf.exact={exact} is neither true nor false")
        if not isinstance(pre_tokenizer, str | None):
            raise EvoPressError(f"export_options.gguf.pre_tokenizer={pre_tokenizer} is no name: give one, such as llama-bpe")
        self._exact, self._dense, self._rounded, self._pre = exact, dtypes.get(dense or ""), dense == _ROUNDED.name, pre_tokenizer

    def check(self, config: Mapping[str, Any], forms: Iterable[Form]) -> None:
        """Refuse what GGUF, or llama.cpp, does not hold."""
        if (model_type := config.get("model_type")) not in ARCHITECTURES:
            raise EvoPressError(
                f"export=[gguf] cannot hold a model of type {model_type}: it knows {', '.join(ARCHITECTURES)}; use "
                "export=[dequantized] and llama.cpp's own converter"
            )
        if (activation := config.get("hidden_act", "silu")) != "silu":
            raise EvoPressError(
                f"export=[gguf] cannot hold a model with hidden_act={activation}, where llama.cpp computes silu: use "
                "export=[dequantized]"
            )
        if config.get("attention_bias") and model_type in _WITHOUT_BIASES:
            raise EvoPressError(
                f"export=[gguf] cannot hold a {model_type} with attention_bias={config['attention_bias']}, where llama.cpp has no "
                "place for the bias of o_proj: use export=[dequantized]"
            )
        refuse_head_size(config, _WITHOUT_HEAD_SIZES, asked="export=[gguf]", program="llama.cpp")
        frequency_factors(config)
        for form in forms:
            if form.kind == SPARSE:
                raise EvoPressError(f"export=[gguf] cannot hold sparse weights ({form}): use export=[dequantized]")
            if form.kind != INTEGERS:
                continue
            if form.group_size % 32:
                raise EvoPressError(
                    f"export=[gguf] cannot hold {form}: GGUF has a scale for 32 weights; set method.group_size to a "
                    "multiple of 32, or use export=[dequantized]"
                )
            if form.bits > _MOST_BITS and not form.symmetric:
                raise EvoPressError(
                    f"export=[gguf] cannot hold {form}: GGUF's type of 8 bits has no zeros; set method.symmetric=true, or leave "
                    f"{form.bits} out of method.levels"
                )
            if form.scale_dtype != "float16":
                raise EvoPressError(
                    f"export=[gguf] cannot hold {form} with {form.scale_dtype} scales: set method.scale_dtype=float16"
                )

    def most_bits(self, form: Form) -> int:
        """See `Bounded`: those of the smallest type that holds every zero the form may have; with `exact` zeros cost two bits."""
        signed = [of for of in GGUF_TYPES.values() if of.offset and not of.part]
        with_min = [of for of in GGUF_TYPES.values() if not of.offset and not of.part]
        if form.symmetric:
            fitting = [of for of in signed if of.bits >= form.bits]
        elif self._exact:
            fitting = [of for of in signed if of.bits >= form.bits + 2]
        else:
            fitting = [of for of in with_min if of.bits >= form.bits]
        return 8 * form.rows * (fitting or [_ROUNDED])[0].row_bytes(form.columns)

    def resized_by(self, dtype: torch.dtype) -> str | None:
        """See `Resized`."""
        if self._rounded:
            return f"dense={_ROUNDED.name}"
        other = self._dense is not None and self._dense.itemsize != dtype.itemsize
        return f"dense={str(self._dense).removeprefix('torch.')}" if other else None

    def serve(self, folder: str, dtype: torch.dtype) -> str:
        """See `Serves`."""
        return f"llama-server -m {folder}/{FILE}"

    def num_bytes(self, export: Export) -> int:
        """See `Exporter`."""
        with shape_of(export), tempfile.TemporaryDirectory() as scratch:
            tensors = list(self._tensors(export, _Rounding()))
            self._write_header(Path(scratch) / FILE, export, tensors)
            return (Path(scratch) / FILE).stat().st_size + sum(_padded(tensor.num_bytes) for tensor in tensors)

    def write(self, folder: Path, export: Export) -> None:
        """Write the file and its model card; see `written` for modules that are dropped."""
        rounding = _Rounding()
        with shape_of(export):
            tensors = list(self._tensors(export, rounding))
            self._write_header(folder / FILE, export, tensors)
            with (folder / FILE).open("ab") as file:
                for tensor in tensors:
                    _append(file, tensor)
        counts = Counter(tensor.kind for tensor in tensors if len(tensor.shape) > 1)
        held = ", ".join(f"{counts[kind]} as {kind}" for kind in (*GGUF_TYPES, *_DENSE.values()) if counts[kind])
        logger.info("gguf: weights are held %s", held)
        told = exactness(rounding.worst, rounded="Minima are float16", dtype=export.model.dtype)
        if self._rounded or self._dense not in (None, export.model.dtype):
            to = _ROUNDED.name if self._rounded else _DENSE[self._dense or export.model.dtype]
            told += f" Matrices that are no units are rounded to {to}."
        told += about_windows(export.model.config.to_dict(), _WITHOUT_WINDOWS, program="llama.cpp")
        logger.info("gguf: %s", told)
        card = model_card(
            export,
            library="llama.cpp",
            how="With [llama.cpp](https://github.com/ggml-org/llama.cpp), in this folder:",
            commands=(f"llama-cli -m {FILE} -p 'Once upon a time'", self.serve(".", export.model.dtype)),
            remarks=f"Weights are held {held}. {told} llama.cpp rounds activations that meet them to 8 bits.",
        )
        (folder / "README.md").write_text(card, encoding="utf-8")

    def _write_header(self, path: Path, export: Export, tensors: Iterable[_Tensor]) -> None:
        """Write what the file begins with: metadata and where every tensor lies."""
        config = export.model.config.to_dict()
        gaps = _gaps(export)
        writer = gguf.GGUFWriter(path, architecture_name(config, gaps))
        add_model(writer, config, gaps, name=f"{export.base}, compressed by EvoPress", licence=export.licence)
        add_tokenizer(writer, export.tokenizer, vocabulary=config["vocab_size"], pre=self._pre)
        for tensor in tensors:
            kind = gguf.GGMLQuantizationType[tensor.kind]
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.num_bytes, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        with path.open("ab") as file:
            file.write(bytes(-file.tell() % _ALIGNMENT))

    def _tensors(self, export: Export, rounding: _Rounding) -> Iterator[_Tensor]:
        """Yield the file's tensors in the model's order, a tied weight once.

        The model is to be in the shape in which it is written.
        """
        config = export.model.config.to_dict()
        name_of = gguf.get_tensor_name_map(architecture(config), config["num_hidden_layers"])
        weights = {f"{weight.name}.weight": weight for weight in weights_of(export, zeros=zeros_in((32, 256), 2))}
        gaps, factors = _gaps(export), frequency_factors(config)
        if factors is not None:
            yield _Tensor("rope_freqs.weight", (len(factors),), "F32", lambda: _bytes(factors))
        seen: set[int] = set()
        for name, parameter in export.model.named_parameters(remove_duplicate=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            known = name_of.get_name(name, try_suffixes=(".weight", ".bias"))
            if known is None:
                raise EvoPressError(
                    f"export=[gguf] has no place for {name}, which llama.cpp does not know: use export=[dequantized]"
                )
            if gaps is not None and (shape := gaps.in_place_of(name, config["hidden_size"])) is not None:
                if shape:
                    yield _Tensor(known, shape, "F32", lambda: torch.zeros(4 * config["hidden_size"], dtype=torch.uint8))
                continue
            order = order_of_rows(name, parameter.shape[0], config)
            if name in weights and (found := self._quantized(known, weights[name], order, rounding)) is not None:
                yield found
            else:
                yield self._as_it_is(known, parameter, weights.get(name), order, export.model.dtype)

    def _quantized(self, name: str, weight: Weight, order: Tensor | None, rounding: _Rounding) -> _Tensor | None:
        """Return a weight of integers in the type that holds it, or one of GGUF's types; None: it is neither, or has none."""
        if weight.form.kind == GGUF_TYPE:
            return _Tensor(name, weight.shape, weight.form.label, lambda: _rows(_stored(weight), order))
        if weight.form.kind != INTEGERS:
            return None
        payload = weight.integers()
        of = type_of(payload, exact=self._exact)
        if of is None:
            logger.warning("gguf: no GGUF type can store the integers of %s, which is written dequantized", weight.form)
            return None
        rounding.worst = max(rounding.worst, _rounding(payload) if of.mins == (1, 1) else 0.0)

        def make() -> Tensor:
            blocks = as_blocks(weight.integers(), of)
            return of.pack(blocks if order is None else blocks.rows(order))

        return _Tensor(name, weight.shape, of.name, make)

    def _as_it_is(
        self, name: str, parameter: Tensor, weight: Weight | None, order: Tensor | None, model_dtype: torch.dtype
    ) -> _Tensor:
        """Return a weight that is no integers: units as they are, other matrices as `dense` says, the rest in float32."""
        own = model_dtype if weight is not None else self._dense or model_dtype
        dtype = torch.float32 if parameter.dim() < 2 else own  # which llama.cpp takes there
        rounded = self._rounded and weight is None and parameter.dim() == 2 and parameter.shape[1] % _ROUNDED.width == 0

        def make() -> Tensor:
            data = _rows(parameter.data if weight is None else weight.read().decode(), order)
            return _ROUNDED.pack(rounded_to_nearest(data)) if rounded else _bytes(data.to(dtype))

        return _Tensor(name, tuple(parameter.shape), _ROUNDED.name if rounded else _DENSE[dtype], make)


def rounded_to_nearest(weight: Tensor) -> Blocks:
    """Return a weight in Q8_0: of every 32 the greatest in size is 127 steps, and each is the nearest step."""
    blocks = weight.to(torch.float32).reshape(weight.shape[0], -1, _ROUNDED.width)
    d = blocks.abs().amax(2) / 127
    steps = (blocks / d.unsqueeze(2)).nan_to_num(0.0).round()
    return Blocks((steps + _ROUNDED.offset).to(torch.uint8).reshape(weight.shape), d.to(torch.float16))


def type_of(payload: Quantized, *, exact: bool = False) -> GGUFType | None:
    """Return the smallest type that holds a weight's integers, its scales and zeros as they are.

    Args: exact: take no type whose float16 minimum would round scale · zero.

    Returns: None if there is none.
    """
    rows, columns = payload.codes.shape
    groups = payload.scales.shape[1]
    steps = payload.codes.reshape(rows, groups, -1)
    zeros = payload.zeros.to(torch.int32)
    low, high = int((steps.amin(2) - zeros).min()), int((steps.amax(2) - zeros).max())
    least_zero, greatest_zero = int(zeros.min()), int(zeros.max())
    if not torch.equal(payload.scales.to(torch.float16).to(payload.scales.dtype), payload.scales):
        return None
    for of in GGUF_TYPES.values():
        if (columns // groups) % of.width:
            continue
        if of.offset:
            holds = -of.offset <= low and high <= of.maxq - of.offset
        elif of.part:
            holds = payload.bits <= of.bits and of.mins[0] <= least_zero and greatest_zero <= of.mins[1]
        else:
            off = _rounding(payload)
            holds = payload.bits <= of.bits and (off == 0.0 if exact else math.isfinite(off))
        if holds:
            return of
    return None


def as_blocks(payload: Quantized, of: GGUFType) -> Blocks:
    """Return integers in the parts of a type that holds them; see `type_of`."""
    rows, columns = payload.codes.shape
    groups = payload.scales.shape[1]
    repeated = columns // groups // of.width
    d = payload.scales.to(torch.float16).repeat_interleave(repeated, 1)
    zeros = payload.zeros.repeat_interleave(repeated, 1)
    if of.offset:
        steps = payload.codes.reshape(rows, groups, -1).to(torch.int16) - payload.zeros.unsqueeze(2)
        scales = torch.ones(rows, columns // of.part, dtype=torch.int16) if of.part else None
        return Blocks((steps + of.offset).to(torch.uint8).reshape(rows, columns), d, scales)
    if of.part:
        mins = zeros.repeat_interleave(of.parts, 1)
        return Blocks(payload.codes, d, torch.ones_like(mins), d, mins)
    return Blocks(payload.codes, d, None, _minima(payload).to(torch.float16).repeat_interleave(repeated, 1))


def _minima(payload: Quantized) -> Tensor:
    """Return scale · zero, float32 [R, G]."""
    return payload.scales.to(torch.float32) * payload.zeros.to(torch.float32)


def _rounding(payload: Quantized) -> float:
    """Return by how many steps of the grid float16 minima are off at most; infinity where one is too large."""
    exact = _minima(payload).double()
    off = (exact.to(torch.float16).double() - exact).abs()
    return float((off / payload.scales.double().abs().clamp_min(torch.finfo(torch.float64).tiny)).masked_fill(off == 0, 0.0).max())


def _gaps(export: Export) -> Gaps | None:
    return Gaps.of(export.model.config.to_dict(), modules_dropped(export))


def _stored(weight: Weight) -> Tensor:
    """Return the bytes of a weight of one of GGUF's types."""
    payload = weight.read()
    if not isinstance(payload, GGUFWeight) or payload.kind != weight.form.label:
        raise mismatch(weight.form)
    return payload.blocks


def _rows(tensor: Tensor, order: Tensor | None) -> Tensor:
    return tensor if order is None else tensor[order.to(tensor.device)]


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().cpu().reshape(-1).view(torch.uint8)


def _append(file: BinaryIO, tensor: _Tensor) -> None:
    data = tensor.make().contiguous().cpu().reshape(-1)
    if data.numel() != tensor.num_bytes:
        raise EvoPressError(
            f"{tensor.name} has {data.numel()} bytes, expected {tensor.num_bytes}: the level database was built with other "
            "settings, remove it and it is built again"
        )
    file.write(data.numpy().data)
    file.write(bytes(_padded(tensor.num_bytes) - tensor.num_bytes))


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
