"""Compact storage of compressed weights: codes packed to their bit width, exact to the last bit.

A codec turns a payload into named tensors and a few JSON values, and back. New payload types register one here. What is read is
compared with what it should be before anything of its size is made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evopress.compress.compressor import Payload
from evopress.compress.gguf_levels import GGUFWeight
from evopress.compress.gguf_types import GGUF_TYPES
from evopress.compress.gptq import Dense, Quantized
from evopress.compress.sparse import Sparse

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Codec:
    """How one payload type is written and read."""

    encode: Callable[[Any], tuple[dict[str, Tensor], dict[str, Any]]]
    decode: Callable[[Mapping[str, Tensor], Mapping[str, Any]], Payload]


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack codes uint8 (any shape, each below 2^bits) into uint8 [ceil(numel · bits / 8)] on the host, least significant bit first.

    Codes on a GPU are packed there: fewer bytes travel, and the host is slower at it.
    """
    if codes.device.type == "cuda":
        return pack_words(codes, bits).cpu()
    flat = codes.reshape(-1).cpu().numpy()
    if bits == 8:
        return torch.from_numpy(flat.copy())
    if bits == 1:
        return torch.from_numpy(np.packbits(flat, bitorder="little"))
    # Eight codes of b bits are b bytes: read them as one 64-bit word and close the gaps, between neighbours, pairs and fours.
    words = np.concatenate([flat, np.zeros(-flat.size % 8, dtype=np.uint8)]).view("<u8")
    for width, low in ((8, 0x00FF00FF00FF00FF), (16, 0x0000FFFF0000FFFF), (32, 0x00000000FFFFFFFF)):
        even, odd = words & np.uint64(low), (words >> np.uint64(width)) & np.uint64(low)
        words = even | odd << np.uint64(bits * width // 8)
    packed = words.astype("<u8", copy=False).view(np.uint8).reshape(-1, 8)[:, :bits]
    return torch.from_numpy(np.ascontiguousarray(packed).reshape(-1)[: -(-flat.size * bits // 8)].copy())


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Pack codes as `pack_bits` does, to the same bytes, by operations of torch: on the codes' device."""
    flat = codes.reshape(-1)
    if bits == 8:
        return flat.clone()
    words = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(torch.int64)
    for width, low in ((8, 0x00FF00FF00FF00FF), (16, 0x0000FFFF0000FFFF), (32, 0x00000000FFFFFFFF)):
        words = words & low | (words >> width & low) << bits * width // 8
    return words.view(torch.uint8).reshape(-1, 8)[:, :bits].reshape(-1)[: -(-flat.numel() * bits // 8)].clone()


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """Undo `pack_bits`: uint8 [ceil(count · bits / 8)] to codes uint8 [count], on the same device."""
    if bits == 8:
        return packed[:count]
    if bits == 1 and packed.device.type == "cpu":
        return torch.from_numpy(np.unpackbits(packed.numpy(), count=count, bitorder="little"))
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
    _check_names(tensors, {"codes", "scales", "zeros"})
    _check_tensor("codes", tensors["codes"], (-(-rows * columns * bits // 8),), (torch.uint8,))
    groups = tensors["scales"].shape[-1] if tensors["scales"].dim() == 2 else 0
    if groups < 1 or columns % groups:
        raise ValueError(f"scales are {list(tensors['scales'].shape)}, which divide no [{rows}, {columns}]")
    _check_tensor("scales", tensors["scales"], (rows, groups), (torch.float16, torch.bfloat16, torch.float32))
    _check_tensor("zeros", tensors["zeros"], (rows, groups), (torch.int16,))
    codes = unpack_bits(tensors["codes"], bits, rows * columns).reshape(rows, columns)
    return Quantized(codes, tensors["scales"], tensors["zeros"], bits, _DTYPES[meta["dtype"]])


def _encode_sparse(payload: Sparse) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = {"mask": pack_bits(payload.mask.to(torch.uint8), 1), "values": payload.values.cpu()}
    return tensors, {"shape": list(payload.mask.shape)}


def _decode_sparse(tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Sparse:
    rows, columns = meta["shape"]
    _check_names(tensors, {"mask", "values"})
    _check_tensor("mask", tensors["mask"], (-(-rows * columns // 8),), (torch.uint8,))
    mask = unpack_bits(tensors["mask"], 1, rows * columns).to(torch.bool).reshape(rows, columns)
    _check_tensor("values", tensors["values"], (int(mask.sum()),), tuple(_DTYPES.values()))
    return Sparse(mask=mask, values=tensors["values"])


def _encode_dense(payload: Dense) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return {"weight": payload.weight.cpu()}, {"shape": list(payload.weight.shape)}


def _decode_dense(tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Dense:
    _check_names(tensors, {"weight"})
    _check_tensor("weight", tensors["weight"], tuple(meta["shape"]), tuple(_DTYPES.values()))
    return Dense(tensors["weight"])


def _encode_gguf(payload: GGUFWeight) -> tuple[dict[str, Tensor], dict[str, Any]]:
    of, (rows, row_bytes) = GGUF_TYPES[payload.kind], payload.blocks.shape
    dtype = next(name for name, dtype in _DTYPES.items() if dtype == payload.dtype)
    columns = row_bytes // of.num_bytes * of.width
    return {"blocks": payload.blocks.cpu()}, {"type": payload.kind, "shape": [rows, columns], "dtype": dtype}


def _decode_gguf(tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> GGUFWeight:
    rows, columns = meta["shape"]
    _check_names(tensors, {"blocks"})
    _check_tensor("blocks", tensors["blocks"], (rows, GGUF_TYPES[meta["type"]].row_bytes(columns)), (torch.uint8,))
    return GGUFWeight(tensors["blocks"], meta["type"], _DTYPES[meta["dtype"]])


@dataclass(frozen=True)
class Packed:
    """A payload that travels between processes as files have it, and arrives on the device of the receiving one."""

    payload: Payload

    def __reduce__(self) -> tuple[Any, ...]:
        device = next(value.device.type for value in vars(self.payload).values() if isinstance(value, Tensor))
        return _unpacked, (self.payload.codec, *CODECS[self.payload.codec].encode(self.payload), device)


def _unpacked(codec: str, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], device: str) -> Packed:
    return Packed(CODECS[codec].decode({name: tensor.to(device) for name, tensor in tensors.items()}, meta))


def check_meta(codec: str, meta: Any, *, size: int) -> None:
    """Raise ValueError unless a level's JSON values fit its codec and its unit's number of weights."""
    if not isinstance(meta, dict):
        raise ValueError(f"meta is {meta!r:.100}, expected an object")
    shape = meta.get("shape")
    if not isinstance(shape, list) or len(shape) != 2 or any(type(n) is not int or n < 1 for n in shape):
        raise ValueError(f"shape is {shape!r:.100}, expected two numbers above 0")
    if shape[0] * shape[1] != size:
        raise ValueError(f"shape is {shape}, which is not {size} weights")
    if codec == Quantized.codec and (type(meta.get("bits")) is not int or not 1 <= meta["bits"] <= 8):
        raise ValueError(f"bits are {meta.get('bits')!r:.100}, expected 1 to 8")
    if codec == GGUFWeight.codec:
        of = GGUF_TYPES.get(meta["type"]) if isinstance(meta.get("type"), str) else None
        if of is None or shape[1] % of.width:
            raise ValueError(
                f"type is {meta.get('type')!r:.100}, expected one of {', '.join(GGUF_TYPES)} that rows of {shape[1]} have"
            )
    if codec in (Quantized.codec, GGUFWeight.codec) and (not isinstance(meta.get("dtype"), str) or meta["dtype"] not in _DTYPES):
        raise ValueError(f"dtype is {meta.get('dtype')!r:.100}, expected one of {', '.join(_DTYPES)}")


def _check_names(tensors: Mapping[str, Tensor], expected: set[str]) -> None:
    if set(tensors) != expected:
        raise ValueError(f"it has the tensors {', '.join(sorted(tensors)) or 'none'}, expected {', '.join(sorted(expected))}")


def _check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
        raise ValueError(f"{name} are {tensor.dtype} {list(tensor.shape)}, expected {dtypes[0]} {list(shape)}")


CODECS = {
    Quantized.codec: Codec(_encode_quantized, _decode_quantized),
    Sparse.codec: Codec(_encode_sparse, _decode_sparse),
    Dense.codec: Codec(_encode_dense, _decode_dense),
    GGUFWeight.codec: Codec(_encode_gguf, _decode_gguf),
}
