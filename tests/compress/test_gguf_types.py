"""GGUF's types: packed, unpacked and decoded as the `gguf` package decodes them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

from evopress.compress.gguf_types import GGUF_TYPES, Blocks, GGUFType
from experiments.exports import llama_cpp
from experiments.exports.decoded import rows_by_libggml


def made_up(of: GGUFType, rows: int = 3, blocks: int = 2) -> Blocks:
    """Return every number that a type can hold somewhere, ends included."""
    rng = torch.Generator().manual_seed(of.bits * of.num_bytes)

    def drawn(low: int, high: int, *shape: int) -> torch.Tensor:
        numbers = torch.randint(low, high + 1, shape, generator=rng)
        numbers.view(-1)[:2] = torch.tensor([low, high])
        return numbers

    def halves(count: int) -> torch.Tensor:
        return (torch.randn(rows, count, generator=rng) * 0.01).to(torch.float16)

    columns, parts = blocks * of.width, blocks * of.parts
    return Blocks(
        codes=drawn(0, of.maxq, rows, columns).to(torch.uint8),
        d=halves(blocks),
        scales=drawn(*of.scales, rows, parts).to(torch.int16) if of.part else None,
        dmin=halves(blocks) if of.mins[1] else None,
        mins=drawn(*of.mins, rows, parts).to(torch.int16) if of.mins[1] > 1 else None,
    )


@pytest.mark.parametrize("of", GGUF_TYPES.values(), ids=lambda of: of.name)
def test_bytes_mean_what_the_gguf_package_decodes(of: GGUFType) -> None:
    kind = GGMLQuantizationType[of.name]
    assert GGML_QUANT_SIZES[kind] == (of.width, of.num_bytes)
    blocks = made_up(of)
    packed = of.pack(blocks)
    assert packed.shape == (3, of.row_bytes(2 * of.width)) and packed.dtype == torch.uint8
    expected = quants.dequantize(packed.numpy(), kind)
    assert len(np.unique(expected)) > 2 ** min(of.bits, 7)
    assert np.array_equal(of.values(blocks).numpy(), expected)
    back = of.unpack(packed)
    for name, part in vars(blocks).items():
        found = getattr(back, name)
        assert (found is None) == (part is None), name
        assert part is None or (torch.equal(found, part) and found.dtype == part.dtype), name


@pytest.mark.engine
@pytest.mark.skipif(not llama_cpp.is_there(), reason="llama.cpp is not installed: pip install -e '.[llama_cpp]'")
@pytest.mark.parametrize("of", GGUF_TYPES.values(), ids=lambda of: of.name)
def test_bytes_mean_what_libggml_decodes(of: GGUFType) -> None:
    blocks = made_up(of)
    found = rows_by_libggml(of.name, of.pack(blocks).numpy(), columns=2 * of.width)
    assert np.array_equal(of.values(blocks).numpy(), found)
