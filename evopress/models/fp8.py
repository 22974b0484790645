"""Weights in FP8 whose last blocks are partial, as DeepSeek-V3's are: transformers would spread the scales evenly over them.

Its `Fp8Dequantize` (seen in 5.23) takes the size of a block from the weight's shape over that of the grid of scales, which is
`weight_block_size` only where blocks are whole: elsewhere it scales other rows than those of the block, or refuses the shape.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def with_partial_blocks() -> Iterator[None]:
    """Let transformers see whole blocks while it dequantizes: zeros after the last rows and columns, cut off afterwards."""
    from transformers.integrations import finegrained_fp8

    dequantizer: Any = getattr(finegrained_fp8, "Fp8Dequantize", None)
    plain = getattr(dequantizer, "_dequantize_one", None)
    if plain is None:  # versions that refuse partial blocks
        yield
        return

    def whole(self: Any, quantized: Tensor, scales: Tensor, *others: Any, **named: Any) -> Tensor:
        size = getattr(self.hf_quantizer.quantization_config, "weight_block_size", None)
        rows, columns = padding = missing(quantized, scales, size)
        if not any(padding):
            return plain(self, quantized, scales, *others, **named)
        found: Tensor = plain(self, nn.functional.pad(quantized.float(), (0, columns, 0, rows)), scales, *others, **named)
        return found[..., : quantized.shape[-2], : quantized.shape[-1]]

    dequantizer._dequantize_one = whole
    try:
        yield
    finally:
        dequantizer._dequantize_one = plain


def missing(weight: Tensor, scales: Tensor, block_size: list[int] | None) -> tuple[int, int]:
    """Return the rows and columns that a weight's last blocks lack; none where its scales are not those of such blocks.

    Args:
        weight: [..., rows, columns].
        scales: [..., blocks of rows, blocks of columns].
        block_size: rows and columns of a block, where the checkpoint has one for all.
    """
    if block_size is None or scales.ndim < 2 or not weight.is_floating_point():
        return 0, 0
    lacking = [-size % block for size, block in zip(weight.shape[-2:], block_size, strict=True)]
    whole = [size + more for size, more in zip(weight.shape[-2:], lacking, strict=True)]
    if [size // block for size, block in zip(whole, block_size, strict=True)] != list(scales.shape[-2:]):
        return 0, 0
    return lacking[0], lacking[1]
