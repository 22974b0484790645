"""The format of compressed-tensors, which vLLM loads: `export=[compressed_tensors]`. Integers, scales and zeros as they are stored.

Format `pack-quantized` as compressed-tensors 0.20 documents it (`compressors/pack_quantized`). Per weight [R, C] of b bits:

    weight_packed      int32 [R, ⌈C·b/32⌉]   each row one stream of bits, least significant first, codes unsigned
    weight_scale       [R, G]                in the dtype that the model is served in
    weight_zero_point  int32 [⌈R·b/32⌉, G]   packed along the rows in the same way, unsigned
    weight_shape       int64 [2]

Versions before 0.20, and 3, 5, 6 and 7 bits: theirs pads every word instead. vLLM unpacks without padding.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evopress.compress.gptq import Quantized
from evopress.engines import ENGINES
from evopress.errors import EvoPressError
from evopress.export.card import model_card
from evopress.export.exporter import Export, Form
from evopress.export.rules import refuse_experts, refuse_model_types, refuse_unfit
from evopress.export.tensors_file import Entry, Section, num_bytes
from evopress.export.written import Weight, hub_config, names_in_checkpoint, packed_sections, shape_of, unquantized, write_model
from evopress.levels.codec import pack_bits
from evopress.models.outline import built

logger = logging.getLogger(__name__)
ENGINE = ENGINES["vllm"]
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_UNREAD = ("bloom", "falcon_h1", "gptj", "stablelm", "zamba2")
"""Model types whose packed weights vLLM 0.32 does not load: its classes do not say what they fuse (GPT-J, StableLM, Zamba2), call
linears otherwise than weights (Falcon H1), or reorder what belongs to q, k and v as if all of it were weights (BLOOM)."""
_METADATA = {"format": "pt"}


@dataclass
class _Rounding:
    """What the dtype of serving has changed so far."""

    worst: float = 0.0
    """As a share of a scale, and so of each weight of its group."""


class CompressedTensors:
    """See `Exporter`.

    Scales, and whatever is no unit, are in the dtype that the model is served in: vLLM rounds to it what it loads.
    """

    def __init__(self, *, dtype: str | None = None) -> None:
        """Take the options.

        Args: dtype: that the model is served in, float16, bfloat16 or float32; None: its own.
        """
        if dtype is not None and dtype not in tuple(_DTYPES):
            raise EvoPressError(f"export_options.compressed_tensors.dtype={dtype} is unknown: choose {', '.join(_DTYPES)}")
        self._dtype = None if dtype is None else _DTYPES[dtype]

    def check(self, config: Mapping[str, Any], forms: Iterable[Form]) -> None:
        """Refuse what compressed-tensors does not hold, or vLLM would run as something else."""
        why = "vLLM does not find its packed weights, or reorders them, and fails when it loads them"
        refuse_model_types(config, _UNREAD, asked=ENGINE.export, why=why)
        forms = list(forms)
        refuse_experts(forms, asked=ENGINE.export)
        refuse_unfit(ENGINE, forms, asked=ENGINE.export, otherwise="use export=[dequantized]")
        try:
            names_in_checkpoint(built(config))
        except EvoPressError as error:
            raise EvoPressError(f"{ENGINE.export} is not written for this model: {error}; use export=[dequantized]") from error

    def resized_by(self, dtype: torch.dtype) -> str | None:
        """See `Resized`."""
        other = self._dtype is not None and self._dtype.itemsize != dtype.itemsize
        return f"dtype={str(self._dtype).removeprefix('torch.')}" if other else None

    def serve(self, folder: str, dtype: torch.dtype) -> str:
        """See `Serves`."""
        return f"vllm serve {folder} --dtype {str(self._dtype or dtype).removeprefix('torch.')}"

    def num_bytes(self, export: Export) -> int:
        """See `Exporter`."""
        with shape_of(export):
            return num_bytes(self._sections(export, _Rounding(), names_in_checkpoint(export.model))[0], _METADATA)

    def write(self, folder: Path, export: Export) -> None:
        """Write weights, config, tokenizer and model card; see `written` for modules that are dropped."""
        rounding, dtype = _Rounding(), self._served(export)
        with shape_of(export):
            names = names_in_checkpoint(export.model)
            sections, forms = self._sections(export, rounding, names)
            packed = quantization_config(export.model, forms, names)
            config = hub_config(export.model, dtype) | {"quantization_config": packed}
            write_model(folder, export, sections, config, _METADATA)
        name = str(dtype).removeprefix("torch.")
        exactness = f"Integers and zeros are those that were measured. Served in {name}, which "
        if rounding.worst:
            exactness += (
                f"changes a weight by at most {rounding.worst:.2g} of itself, since the scales have more digits: "
                f"method.scale_dtype={name} makes levels whose scales it holds."
            )
        else:
            exactness += "holds their scales as they are."
        logger.info("compressed_tensors: %s", exactness)
        card = model_card(
            export,
            library="vllm",
            how="`pip install vllm`, and in this folder:",
            commands=(self.serve(".", dtype),),
            remarks=exactness,
        )
        (folder / "README.md").write_text(card, encoding="utf-8")

    def _served(self, export: Export) -> torch.dtype:
        return self._dtype or export.model.dtype

    def _sections(self, export: Export, rounding: _Rounding, names: Mapping[str, str]) -> tuple[list[Section], dict[str, Form]]:
        dtype = self._served(export)
        return packed_sections(
            export, lambda weight: _packed(weight, dtype, rounding), groups=ENGINE.groups, dtype=dtype, names=names
        )


def _packed(weight: Weight, dtype: torch.dtype, rounding: _Rounding) -> Section:
    (rows, columns), bits = weight.shape, weight.form.bits
    groups = columns // weight.form.group_size
    entries = (
        Entry(f"{weight.name}.weight_packed", torch.int32, (rows, _num_words(columns, bits))),
        Entry(f"{weight.name}.weight_scale", dtype, (rows, groups)),
        Entry(f"{weight.name}.weight_zero_point", torch.int32, (_num_words(rows, bits), groups)),
        Entry(f"{weight.name}.weight_shape", torch.int64, (2,)),
    )

    def make() -> list[Tensor]:
        payload = weight.integers()
        zeros = zeros_as_codes(payload, weight.form, ENGINE.export)
        scales = _as_served(payload.scales, dtype, weight.form, rounding)
        shape = torch.tensor([rows, columns], dtype=torch.int64)
        return [_words(payload.codes, bits), scales, _words(zeros.T, bits).T, shape]

    return Section(entries, make)


def _as_served(scales: Tensor, dtype: torch.dtype, form: Form, rounding: _Rounding) -> Tensor:
    """Round scales to the dtype of serving, and keep the largest change."""
    served = scales.to(dtype)
    there = scales != 0
    if not bool(torch.isfinite(served).all()) or bool((served[there] == 0).any()):
        raise EvoPressError(
            f"the scales of {form} do not fit {str(dtype).removeprefix('torch.')}: use "
            "'+export_options.compressed_tensors.dtype=bfloat16', or float32"
        )
    change = (served.double() - scales.double()).abs()[there] / scales.double().abs()[there]
    rounding.worst = max(rounding.worst, float(change.max()) if change.numel() else 0.0)
    return served


def zeros_as_codes(payload: Quantized, form: Form, asked: str) -> Tensor:
    """Return zeros uint8 [R, G].

    Args: asked: the setting that asks for the format, for errors.

    Raises: EvoPressError if one is no code of its grid, so that packing it would change weights.
    """
    least, most = int(payload.zeros.min()), int(payload.zeros.max())
    if least < 0 or most >= 2**payload.bits:
        raise EvoPressError(
            f"{asked} cannot hold {form}: its zeros reach from {least} to {most} and are packed as codes, 0 to "
            f"{2**payload.bits - 1}; build its levels with method.zeros=codes, or use export=[dequantized]"
        )
    return payload.zeros.to(torch.uint8)


def _num_words(count: int, bits: int) -> int:
    return -(-count * bits // 32)


def _words(codes: Tensor, bits: int) -> Tensor:
    """Pack codes uint8 [N, M] row by row into words int32 [N, ⌈M·bits/32⌉]."""
    rows, columns = codes.shape
    padded = nn.functional.pad(codes, (0, -columns % 32)).contiguous()
    words = pack_bits(padded, bits).view(torch.int32).reshape(rows, -1)
    return words[:, : _num_words(columns, bits)].contiguous()


def quantization_config(model: nn.Module, forms: Mapping[str, Form], names: Mapping[str, str]) -> dict[str, Any]:
    """Return what compressed-tensors reads from config.json: a group for each width and group size, and what is not packed.

    Args:
        forms: of the packed weights, by the names of their modules in the file.
        names: of all tensors in the file, by their names in the model.
    """
    schemes: dict[tuple[int, int], list[str]] = {}
    for name, form in forms.items():
        schemes.setdefault((form.bits, form.group_size), []).append(name)
    groups = {
        f"group_{number}": {
            "format": "pack-quantized",
            "targets": schemes[bits, group_size],
            "weights": {
                "num_bits": bits,
                "type": "int",
                "symmetric": False,
                "strategy": "group",
                "group_size": group_size,
                "dynamic": False,
            },
            "input_activations": None,
            "output_activations": None,
        }
        for number, (bits, group_size) in enumerate(sorted(schemes))
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": unquantized(model, forms, names),
    }
