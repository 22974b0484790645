"""Compact storage of compressed weights: codes packed to their bit width, exact to the last bit.

A codec turns a payload into named tensors and a few JSON values, and back. New payload types register one here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evopress.compress.compressor import Payload
from evopress.compress.gptq import Quantized
from evopress.compress.sparse import Sparse

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Codec:
    """How one payload type is written and read."""

    encode: Callable[[Any], tuple[dict[str, Tensor], dict[str, Any]]]
    decode: Callable[[Mapping[str, Tensor], Mapping[str, Any]], Payload]


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack codes uint8 (any shape, each below 2^bits) into uint8 [ceil(numel · bits / 8)], least significant bit first."""
    flat = codes.reshape(-1).cpu().numpy()
    if bits == 8:
        return torch.from_numpy(flat.copy())
    padded = np.zeros(-(-flat.size // 8) * 8, dtype=np.uint64)
    padded[: flat.size] = flat
    # Eight codes of b bits are b bytes: assemble them in one 64-bit word.
    words = np.zeros(padded.size // 8, dtype=np.uint64)
    for position in range(8):
        words |= padded[position::8] << np.uint64(position * bits)
    packed = words.astype("<u8").view(np.uint8).reshape(-1, 8)[:, :bits]
    return torch.from_numpy(np.ascontiguousarray(packed).reshape(-1)[: -(-flat.size * bits // 8)].copy())


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """Undo `pack_bits`: uint8 [ceil(count · bits / 8)] to codes uint8 [count], on the same device."""
    if bits == 8:
        return packed[:count]
    groups = -(-count // 8)
    if packed.numel() < groups * bits:
        packed = torch.nn.functional.pad(packed, (0, groups * bits - packed.numel()))
    columns = packed.reshape(groups, bits)
    codes = torch.empty(groups, 8, dtype=torch.uint8, device=packed.device)
    mask = (1 << bits) - 1
    for position in range(8):
        byte, shift = divmod(position * bits, 8)
        value = columns[:, byte] >> shift
        if shift + bits > 8:
            value = value | (columns[:, byte + 1] << (8 - shift))
        codes[:, position] = value & mask
    return codes.reshape(-1)[:count]


def _encode_quantized(payload: Quantized) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = {"codes": pack_bits(payload.codes, payload.bits), "scales": payload.scales.cpu(), "zeros": payload.zeros.cpu()}
    dtype = next(name for name, dtype in _DTYPES.items() if dtype == payload.dtype)
    return tensors, {"bits": payload.bits, "shape": list(payload.codes.shape), "dtype": dtype}


def _decode_quantized(tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Quantized:
    rows, columns = meta["shape"]
    bits = meta["bits"]
    codes = unpack_bits(tensors["codes"], bits, rows * columns).reshape(rows, columns)
    return Quantized(codes, tensors["scales"], tensors["zeros"], bits, _DTYPES[meta["dtype"]])


def _encode_sparse(payload: Sparse) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = {"mask": pack_bits(payload.mask.to(torch.uint8), 1), "values": payload.values.cpu()}
    return tensors, {"shape": list(payload.mask.shape)}


def _decode_sparse(tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Sparse:
    rows, columns = meta["shape"]
    mask = unpack_bits(tensors["mask"], 1, rows * columns).to(torch.bool).reshape(rows, columns)
    return Sparse(mask=mask, values=tensors["values"])


CODECS = {
    Quantized.codec: Codec(_encode_quantized, _decode_quantized),
    Sparse.codec: Codec(_encode_sparse, _decode_sparse),
}
