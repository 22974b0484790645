"""The format of GPTQModel: `export=[gptq]`. Integers and zeros as they lie in the level database, scales in float16.

Per weight [R, C] of b bits in groups of g columns (GPTQModel 7.7, `utils/planar_packing.py`):

    qweight  int32 [C·b/32, R]   packed along the columns
    qzeros   int32 [C/g, R·b/32] packed along the rows, zeros as they are
    scales   float16 [C/g, R]
    g_idx    int32 [C]           the group of each column

2, 4 and 8 bits are fields of a word, least significant first. 3, 5, 6 and 7 bits are planes of fields: of 32 codes first the words
of their lowest bits, then those of the next. A file with any of these is of format `gptq_p`, otherwise `gptq_v2`.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evopress.engines import ENGINES
from evopress.export.card import model_card
from evopress.export.compressed_tensors import zeros_as_codes
from evopress.export.exporter import Export, Form
from evopress.export.rules import refuse_experts, refuse_model_types, refuse_unfit
from evopress.export.tensors_file import Entry, Section, num_bytes
from evopress.export.written import Weight, hub_config, packed_sections, shape_of, unquantized, write_model
from evopress.levels.codec import pack_bits

logger = logging.getLogger(__name__)
ENGINE = ENGINES["gptqmodel"]
PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}
"""Bits to the widths of the planes that they are stored in, lowest first."""
_SPLIT = ("glm", "glm4", "phi3", "phi4_multimodal", "zamba2")
"""Model types whose `gate_up_proj` GPTQModel 7.7 splits before it reads a file (its package `defuser`)."""
_METADATA = {"format": "pt"}


class GPTQFiles:
    """See `Exporter`."""

    def check(self, config: Mapping[str, Any], forms: Iterable[Form]) -> None:
        """Refuse what GPTQModel does not hold, or would leave unread."""
        why = "GPTQModel splits its gate_up_proj in two and would not read the stored one"
        refuse_model_types(config, _SPLIT, asked=ENGINE.export, why=why)
        forms = list(forms)
        refuse_experts(forms, asked=ENGINE.export)
        refuse_unfit(ENGINE, forms, asked=ENGINE.export, otherwise="use export=[dequantized]")

    def num_bytes(self, export: Export) -> int:
        """See `Exporter`."""
        with shape_of(export):
            return num_bytes(self._sections(export)[0], _METADATA)

    def write(self, folder: Path, export: Export) -> None:
        """Write weights, config, tokenizer and model card; see `written` for modules that are dropped."""
        with shape_of(export):
            sections, forms = self._sections(export)
            settings = quantize_config(export.model, forms)
            config = hub_config(export.model, export.model.dtype) | {"quantization_config": settings}
            write_model(folder, export, sections, config, _METADATA)
        (folder / "quantize_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        exactness = (
            "Integers, zeros and scales are those that were measured; the scales are float16, which loading in float16 keeps."
        )
        logger.info("gptq: %s", exactness)
        load = "import torch; from gptqmodel import GPTQModel; model = GPTQModel.load('.', dtype=torch.float16)"
        say = "print(model.tokenizer.decode(model.generate('Once upon a time')[0]))"
        card = model_card(
            export,
            library="gptqmodel",
            how="`pip install gptqmodel`, and in this folder:",
            commands=(f'python -c "{load}; {say}"',),
            remarks=exactness,
        )
        (folder / "README.md").write_text(card, encoding="utf-8")

    def _sections(self, export: Export) -> tuple[list[Section], dict[str, Form]]:
        return packed_sections(export, _packed, groups=ENGINE.groups)


def _packed(weight: Weight) -> Section:
    (rows, columns), bits = weight.shape, weight.form.bits
    groups = columns // weight.form.group_size
    entries = (
        Entry(f"{weight.name}.qweight", torch.int32, (columns * bits // 32, rows)),
        Entry(f"{weight.name}.qzeros", torch.int32, (groups, rows * bits // 32)),
        Entry(f"{weight.name}.scales", torch.float16, (groups, rows)),
        Entry(f"{weight.name}.g_idx", torch.int32, (columns,)),
    )

    def make() -> list[Tensor]:
        payload = weight.integers()
        zeros = zeros_as_codes(payload, weight.form, ENGINE.export)
        g_idx = torch.arange(columns, dtype=torch.int32) // weight.form.group_size
        return [in_planes(payload.codes, bits).T, in_planes(zeros.T, bits), payload.scales.T, g_idx]

    return Section(entries, make)


def in_planes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes uint8 [N, M] along M, a multiple of 32, into words int32 [N, M·bits/32]."""
    blocks = codes.contiguous().reshape(len(codes), -1, 32)
    words, below = [], 0
    for width in PLANES[bits]:
        plane = (blocks >> below) & (2**width - 1)
        words.append(pack_bits(plane, width).view(torch.int32).reshape(*blocks.shape[:2], width))
        below += width
    return torch.cat(words, dim=2).reshape(len(codes), -1)


def quantize_config(model: nn.Module, forms: Mapping[str, Form]) -> dict[str, Any]:
    """Return what GPTQModel reads: the commonest width and group, what differs from it by name, and what is not packed.

    Args: forms: of the packed weights, by the names of their modules.
    """
    schemes = Counter((form.bits, _group_size(form)) for form in forms.values())
    bits, group_size = schemes.most_common(1)[0][0] if schemes else (4, 128)
    dynamic: dict[str, dict[str, int]] = {}
    for name, form in forms.items():
        own = {"bits": form.bits, "group_size": _group_size(form)}
        if own != {"bits": bits, "group_size": group_size}:
            dynamic[f"+:^{re.escape(name)}$"] = own
    dynamic |= {f"-:^{re.escape(name)}$": {} for name in unquantized(model, forms)}
    planar = any(len(PLANES[form.bits]) > 1 for form in forms.values())
    layout = "gptq_p" if planar else "gptq_v2"
    return {
        "quant_method": "gptq",
        "format": layout,
        "checkpoint_format": layout,
        "bits": bits,
        "group_size": group_size,
        "desc_act": False,
        "sym": False,
        "lm_head": False,
        "pack_dtype": "int32",
        "dynamic": dynamic,
    }


def _group_size(form: Form) -> int:
    """Return the columns of a group as GPTQModel has them, -1 for a whole row."""
    return form.group_size if form.group_size in ENGINE.groups else -1
