"""What `mlx.core.dequantize` documents, one bit after the other: w = scale · q + bias, codes packed from lower to upper bits."""

from __future__ import annotations

from typing import Any

import numpy as np


def dequantize(weight: Any, scales: Any, biases: Any, *, group_size: int, bits: int) -> Any:
    """Return float32 [R, C].

    Args:
        weight: uint32 [R, C · bits / 32].
        scales, biases: [R, C / group_size], float16 or float32.
    """
    rows = len(weight)
    stream = (weight[:, :, None] >> np.arange(32, dtype=np.uint32)) & np.uint32(1)  # [R, words, 32], lowest bit first
    codes = (stream.reshape(rows, -1, bits) << np.arange(bits, dtype=np.uint32)).sum(-1).astype(np.float32)  # [R, C]
    each = [np.repeat(values.astype(np.float32), group_size, axis=1) for values in (scales, biases)]
    return each[0] * codes + each[1]
