"""Tiny models with made-up levels of every width and group that a format may hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from evopress.compress.compressor import Payload
from evopress.compress.gptq import Dense, Quantized
from evopress.export.exporter import DENSE, DROPPED, INTEGERS, KEPT, Export, Form
from evopress.levels.live import LiveModel
from evopress.models.blocks import BlockModel
from evopress.models.families import family_of
from evopress.models.tiny import byte_tokenizer, tiny_config
from evopress.units import Level, Space, Unit, is_module

WIDTHS = ((8, 32), (6, 64), (5, 128), (4, 32), (3, 64), (2, 128), (1, 32), (4, 128))
"""Bits and group size of the made-up levels; the last one is the weight as it is."""
PACKED = ((8, 32), (7, 64), (6, 64), (5, 128), (4, 32), (3, 64), (2, 128))
"""Those of formats that pack zeros as codes and have no 1 bit."""
_TOGETHER = ("q_proj k_proj v_proj qkv_proj", "o_proj out_proj", "gate_proj up_proj gate_up_proj fc1", "down_proj fc2")
"""Kinds of units that vLLM runs as one."""


class MadeUp:
    """A level source: random codes, scales and zeros, the same ones whenever they are read."""

    def __init__(self, blocks: BlockModel, *, dropping: bool, packed: bool = False) -> None:
        self.widths, self.packed = PACKED if packed else WIDTHS, packed
        self._weights = {name: slot.weight.clone() for part in blocks.parts for name, slot in blocks.slots(part).items()}
        self.folder = Path("made-up")
        units, inside = [], []
        for part in blocks.parts:
            for name, slot in blocks.slots(part).items():
                levels = [Level(f"{bits} bits", bits, str(bits), bits, "quant") for bits, _ in self.widths]
                levels.append(Level("dense", 32, "dense", 32, "quant"))
                units.append(Unit(name, part, slot.kind, slot.weight.numel(), tuple(levels)))
                module = None if part >= len(blocks.blocks) else 2 * part + (not blocks.is_of_attention(name))
                inside.append(module)
        first = len(units)
        if dropping:
            keep, drop = Level("keep", 1, "keep", 0, "drop"), Level("drop", 0, "drop", 0, "drop")
            for part in range(len(blocks.blocks)):
                units += [Unit(f"{part}.{kind}", part, kind, 0, (keep, drop)) for kind in ("attention", "mlp")]
        self.space = Space("joint", tuple(units), None, tuple(None if i is None else first + i for i in inside) if dropping else ())

    def read(self, unit: int, level: int, device: Any = "cpu") -> Payload:
        weight = self._weights[self.space.units[unit].name]
        if level == len(self.widths):
            return Dense(weight)
        bits, group_size = self.widths[level]
        rows, columns = weight.shape
        rng = torch.Generator().manual_seed(1000 * unit + level)
        shape = (rows, columns // group_size)
        scales = (0.5 + torch.rand(shape, generator=rng)) * 0.1 / 2**bits
        least, end = (0, 2**bits) if self.packed else (-2, 2**bits + 2)  # GPTQ's are not always codes
        zeros = torch.randint(least, end, shape, generator=rng)
        codes = torch.randint(2**bits, (rows, columns), generator=rng)
        return Quantized(codes.to(torch.uint8), scales.to(torch.float16), zeros.to(torch.int16), bits, weight.dtype)


def _place(kind: str) -> int:
    return next(place for place, kinds in enumerate(_TOGETHER) if kind in kinds.split())


@pytest.fixture
def exported() -> Callable[..., Export]:
    """Make an export of a model of a family, width 128, three blocks, at a genome of all levels mixed."""

    def make(
        model_type: str = "llama",
        *,
        dtype: torch.dtype = torch.float32,
        tied: bool = False,
        include: Sequence[str] = ("blocks",),
        dropped: Sequence[tuple[int, str]] | None = None,
        config: dict[str, Any] | None = None,
        packed: bool = False,
    ) -> Export:
        configuration = tiny_config(model_type, num_blocks=3, tied=tied)
        sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "head_dim": 64, "num_key_value_heads": 1}
        own = {
            "gemma2": {"sliding_window": 512},  # mlx-lm has none for it
            "gemma3_text": {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
        }
        configuration = type(configuration)(**{**configuration.to_dict(), **sizes, **own.get(model_type, {}), **(config or {})})
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(configuration, dtype=dtype).eval().requires_grad_(False)
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.data.normal_(std=0.15)
        blocks = BlockModel(model, family_of(model_type), include=include)
        levels = MadeUp(blocks, dropping=dropped is not None, packed=packed)
        widths = levels.widths

        def level_of(index: int, unit: Unit) -> int:
            if is_module(unit):
                return int((unit.block, unit.kind) in (dropped or ()))
            if packed:  # weights that run as one have one level
                index = len(widths) if unit.is_outside else 4 * unit.block + _place(unit.kind)
            return index % (len(widths) + 1)

        genome = tuple(level_of(i, unit) for i, unit in enumerate(levels.space.units))
        forms = []
        for unit, level in zip(levels.space.units, genome, strict=True):
            if is_module(unit):
                forms.append(Form(unit.name, "", (KEPT, DROPPED)[level]))
            elif level == len(widths):
                forms.append(Form(unit.name, "dense", DENSE))
            else:
                rows, columns = blocks.slots(unit.block)[unit.name].weight.shape
                forms.append(Form(unit.name, f"{widths[level][0]} bits", INTEGERS, *widths[level], rows=rows, columns=columns))
        return Export(LiveModel(blocks, levels), model, byte_tokenizer(), genome, tuple(forms), base="tiny")

    return make


@pytest.fixture
def ids(tokens: Callable[..., Tensor]) -> Tensor:
    return tokens(2, 32, seed=3)
