"""What compressed-tensors and GPTQModel document, one code after the other, in whole numbers."""

from __future__ import annotations

from typing import Any

import numpy as np

PLANES = {2: [2], 3: [2, 1], 4: [4], 5: [4, 1], 6: [4, 2], 7: [4, 2, 1], 8: [8]}


def in_stream(words: Any, bits: int, count: int) -> Any:
    """Return so many codes of words int32 [W], each from bit i · bits of one stream, least significant first."""
    stream = sum(int(word) << (32 * place) for place, word in enumerate(words.view(np.uint32)))
    return [(stream >> (i * bits)) & (2**bits - 1) for i in range(count)]


def in_planes(words: Any, bits: int, count: int) -> Any:
    """Return so many codes of words int32 [W]: of each 32 codes, a plane's words hold 32 / width of their fields each."""
    codes = []
    for block in range(count // 32):
        own = [int(word) for word in words.view(np.uint32)[block * bits : (block + 1) * bits]]
        for i in range(32):
            code, first, below = 0, 0, 0
            for width in PLANES[bits]:
                word, field = divmod(i, 32 // width)
                code |= ((own[first + word] >> (field * width)) & (2**width - 1)) << below
                first, below = first + width, below + width
            codes.append(code)
    return codes


def compressed_tensors(tensors: dict[str, Any], *, num_bits: int, group_size: int) -> Any:
    """Decode format pack-quantized; return float32 [R, C].

    Args: tensors: weight_packed, weight_scale (float32), weight_zero_point and weight_shape.
    """
    rows, columns = (int(n) for n in tensors["weight_shape"])
    scale = tensors["weight_scale"].astype(np.float32)
    codes = np.array([in_stream(row, num_bits, columns) for row in tensors["weight_packed"]], dtype=np.float32)
    packed = np.ascontiguousarray(tensors["weight_zero_point"].T)
    zeros = np.array([in_stream(group, num_bits, rows) for group in packed], dtype=np.float32).T
    return np.repeat(scale, group_size, axis=1) * (codes - np.repeat(zeros, group_size, axis=1))


def gptq(tensors: dict[str, Any], *, bits: int) -> Any:
    """Decode formats gptq_v2 and gptq_p; return float32 [R, C].

    Args: tensors: qweight, qzeros, scales (float32), g_idx.
    """
    groups, rows = tensors["scales"].shape
    columns = len(tensors["g_idx"])
    codes = np.array([in_planes(row, bits, columns) for row in np.ascontiguousarray(tensors["qweight"].T)], dtype=np.float32)
    zeros = np.array([in_planes(group, bits, rows) for group in tensors["qzeros"]], dtype=np.float32).T  # [R, G]
    assert len(tensors["qzeros"]) == groups
    return tensors["scales"].astype(np.float32).T[:, tensors["g_idx"]] * (codes - zeros[:, tensors["g_idx"]])
