"""The quantized types of GGUF files: what their blocks hold, packed to bytes and back.

A row is blocks of 32 or 256 weights. A block has one float16 scale `d`, some types a second one, `dmin`, for what is taken away; in
the K types each is multiplied by a small integer of every 16 or 32 weights. With a code q of so many bits, a weight is

    w = (d · sc) · (q - offset) - dmin · mn

Layouts: llama.cpp's ggml-common.h and ggml-quants.c; the tests compare with the `gguf` package's own decoder.

Shapes: R rows, C columns, N = R · C / width blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce
from operator import or_

import torch
from torch import Tensor


@dataclass(frozen=True)
class Plane:
    """Some bits of every code, in bytes: a byte holds those of weights that lie `run` apart."""

    field: str
    low: int
    """The lowest of them."""
    bits: int
    run: int
    flipped: int = 0
    """Bits that a file has the other way round: Q8_0 holds signed bytes, which are codes less 128."""

    def pack(self, codes: Tensor) -> Tensor:
        """Pack codes uint8 [N, width] to bytes [N, width · bits / 8]."""
        slots = 8 // self.bits
        parts = ((codes >> self.low) & (2**self.bits - 1)).reshape(len(codes), -1, slots, self.run)
        packed = torch.zeros_like(parts[:, :, 0])
        for slot in range(slots):
            packed |= parts[:, :, slot] << (self.bits * slot)
        return packed.reshape(len(codes), -1) ^ self.flipped

    def unpack(self, packed: Tensor) -> Tensor:
        """Return what these bits add to the codes, uint8 [N, width]."""
        parts = (packed ^ self.flipped).reshape(len(packed), -1, 1, self.run)
        each = [((parts >> (self.bits * slot)) & (2**self.bits - 1)) << self.low for slot in range(8 // self.bits)]
        return torch.cat(each, dim=2).reshape(len(packed), -1)


@dataclass(frozen=True)
class Blocks:
    """A weight in parts; what a type does not have is None."""

    codes: Tensor
    """uint8 [R, C]."""
    d: Tensor
    """float16 [R, C / width]."""
    scales: Tensor | None = None
    """int16 [R, C / part]; None: every one is 1."""
    dmin: Tensor | None = None
    """float16 [R, C / width]."""
    mins: Tensor | None = None
    """int16 [R, C / part]; None: every one is 1."""

    def rows(self, order: Tensor) -> Blocks:
        """Return the same rows in another order."""
        return replace(self, **{name: part[order] for name, part in vars(self).items() if part is not None})


@dataclass(frozen=True)
class GGUFType:
    """One type."""

    name: str
    bits: int
    """Of a code."""
    width: int
    """Weights of a block."""
    num_bytes: int
    """Of a block."""
    planes: tuple[Plane, ...]
    fields: tuple[tuple[str, int], ...]
    """What lies in a block, in order, with its bytes."""
    part: int = 0
    """Weights that share a scale inside a block; 0: there is one scale."""
    offset: int = 0
    """Code of 0; types with something to take away have none."""
    scales: tuple[int, int] = (1, 1)
    """Least and greatest sc."""
    mins: tuple[int, int] = (0, 0)
    """Least and greatest mn; (1, 1): dmin alone is taken away."""

    @property
    def bits_per_weight(self) -> float:
        """What the type takes in all."""
        return 8 * self.num_bytes / self.width

    @property
    def maxq(self) -> int:
        """The greatest code."""
        return 2**self.bits - 1

    @property
    def parts(self) -> int:
        """Scales of a block."""
        return self.width // self.part if self.part else 1

    def row_bytes(self, columns: int) -> int:
        """Return the bytes of a row."""
        return columns // self.width * self.num_bytes

    def pack(self, blocks: Blocks) -> Tensor:
        """Return what a file holds, uint8 [R, row_bytes]."""
        rows, columns = blocks.codes.shape
        codes = blocks.codes.reshape(-1, self.width)
        found = {"d": _bytes_of(blocks.d)}
        for plane in self.planes:
            found[plane.field] = plane.pack(codes)
        if blocks.dmin is not None:
            found["dmin"], found["m"] = _bytes_of(blocks.dmin), _bytes_of(0.0 - blocks.dmin)
        if self.part:
            assert blocks.scales is not None
            mins = None if blocks.mins is None else blocks.mins.reshape(-1, self.parts)
            found["scales"] = _pack_scales(self.name, blocks.scales.reshape(-1, self.parts), mins)
        return torch.cat([found[field] for field, _ in self.fields], dim=1).reshape(rows, self.row_bytes(columns))

    def unpack(self, packed: Tensor) -> Blocks:
        """Undo `pack`."""
        rows = len(packed)
        cut = packed.reshape(-1, self.num_bytes).split([size for _, size in self.fields], dim=1)
        found = {field: part.contiguous() for (field, _), part in zip(self.fields, cut, strict=True)}
        codes = reduce(or_, (plane.unpack(found[plane.field]) for plane in self.planes))
        dmin = _halves_of(found["dmin"]) if "dmin" in found else 0.0 - _halves_of(found["m"]) if "m" in found else None
        scales, mins = _unpack_scales(self.name, found["scales"]) if self.part else (None, None)
        further = {"scales": scales, "dmin": dmin, "mins": mins}
        there = {name: part.reshape(rows, -1) for name, part in further.items() if part is not None}
        return Blocks(codes.reshape(rows, -1), _halves_of(found["d"]).reshape(rows, -1), **there)

    def values(self, blocks: Blocks) -> Tensor:
        """Return the weights, float32 [R, C], with the roundings of llama.cpp's decoder."""
        rows, columns = blocks.codes.shape
        d = blocks.d.to(torch.float32).repeat_interleave(self.parts, 1)
        scale = d if blocks.scales is None else d * blocks.scales.to(torch.float32)
        codes = blocks.codes.to(torch.float32).reshape(rows, scale.shape[1], -1)
        values = (codes - self.offset).mul_(scale.unsqueeze(2))
        if blocks.dmin is not None:
            taken = blocks.dmin.to(torch.float32).repeat_interleave(self.parts, 1)
            values -= (taken if blocks.mins is None else taken * blocks.mins.to(torch.float32)).unsqueeze(2)
        return values.reshape(rows, columns)


def _bytes_of(halves: Tensor) -> Tensor:
    flat = halves.to(torch.float16).reshape(-1).clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8).reshape(-1, 2)


def _halves_of(packed: Tensor) -> Tensor:
    return packed.view(torch.float16)


def _pack_scales(name: str, scales: Tensor, mins: Tensor | None) -> Tensor:
    """Pack sc and mn [N, parts] into a block's bytes."""
    if name == "Q6_K":
        return scales.to(torch.int8).view(torch.uint8)
    if name == "Q3_K":  # 6 bits, 32 added: the low four two in a byte, the high two four in a byte
        sc = (scales + 32).to(torch.uint8)
        return torch.cat([_LOW_OF_3.pack(sc), _HIGH_OF_3.pack(sc)], dim=1)
    assert mins is not None
    sc, mn = scales.to(torch.uint8), mins.to(torch.uint8)
    if name == "Q2_K":
        return sc | mn << 4
    # Q4_K and Q5_K, 6 bits each: of the last four, the low four in bytes of their own, the high two above the first four's.
    first = torch.cat([sc[:, :4] | (sc[:, 4:] >> 4) << 6, mn[:, :4] | (mn[:, 4:] >> 4) << 6], dim=1)
    return torch.cat([first, (sc[:, 4:] & 15) | (mn[:, 4:] & 15) << 4], dim=1)


def _unpack_scales(name: str, packed: Tensor) -> tuple[Tensor, Tensor | None]:
    """Undo `_pack_scales`."""
    if name == "Q6_K":
        return packed.view(torch.int8).to(torch.int16), None
    if name == "Q3_K":
        return (_LOW_OF_3.unpack(packed[:, :8]) + _HIGH_OF_3.unpack(packed[:, 8:])).to(torch.int16) - 32, None
    if name == "Q2_K":
        return (packed & 15).to(torch.int16), (packed >> 4).to(torch.int16)
    sc, mn, last = packed.split(4, dim=1)
    scales = torch.cat([sc & 63, (last & 15) | (sc >> 6) << 4], dim=1)
    mins = torch.cat([mn & 63, (last >> 4) | (mn >> 6) << 4], dim=1)
    return scales.to(torch.int16), mins.to(torch.int16)


_LOW_OF_3, _HIGH_OF_3 = Plane("", 0, 4, 8), Plane("", 4, 2, 4)
_D, _DMIN, _M = ("d", 2), ("dmin", 2), ("m", 2)


def _of_32(name: str, bits: int, num_bytes: int, fields: tuple[tuple[str, int], ...], *, with_min: bool = False) -> GGUFType:
    """Return a type of 4 or 5 bits in blocks of 32."""
    planes = (Plane("low", 0, 4, 16), Plane("high", 4, 1, 1))[: bits - 3]
    offset, mins = (0, (1, 1)) if with_min else (2 ** (bits - 1), (0, 0))
    return GGUFType(name, bits, 32, num_bytes, planes, fields, offset=offset, mins=mins)


_ALL = (
    GGUFType(
        "Q2_K",
        bits=2,
        width=256,
        num_bytes=84,
        planes=(Plane("low", 0, 2, 32),),
        fields=(("scales", 16), ("low", 64), _D, _DMIN),
        part=16,
        scales=(0, 15),
        mins=(0, 15),
    ),
    GGUFType(
        "Q3_K",
        bits=3,
        width=256,
        num_bytes=110,
        planes=(Plane("low", 0, 2, 32), Plane("high", 2, 1, 32)),
        fields=(("high", 32), ("low", 64), ("scales", 12), _D),
        part=16,
        offset=4,
        scales=(-32, 31),
    ),
    GGUFType(
        "Q4_K",
        bits=4,
        width=256,
        num_bytes=144,
        planes=(Plane("low", 0, 4, 32),),
        fields=(_D, _DMIN, ("scales", 12), ("low", 128)),
        part=32,
        scales=(0, 63),
        mins=(0, 63),
    ),
    _of_32("Q4_0", 4, 18, (_D, ("low", 16))),
    _of_32("Q4_1", 4, 20, (_D, _M, ("low", 16)), with_min=True),
    GGUFType(
        "Q5_K",
        bits=5,
        width=256,
        num_bytes=176,
        planes=(Plane("low", 0, 4, 32), Plane("high", 4, 1, 32)),
        fields=(_D, _DMIN, ("scales", 12), ("high", 32), ("low", 128)),
        part=32,
        scales=(0, 63),
        mins=(0, 63),
    ),
    _of_32("Q5_0", 5, 22, (_D, ("high", 4), ("low", 16))),
    _of_32("Q5_1", 5, 24, (_D, _M, ("high", 4), ("low", 16)), with_min=True),
    GGUFType(
        "Q6_K",
        bits=6,
        width=256,
        num_bytes=210,
        planes=(Plane("low", 0, 4, 64), Plane("high", 4, 2, 32)),
        fields=(("low", 128), ("high", 64), ("scales", 16), _D),
        part=16,
        offset=32,
        scales=(-128, 127),
    ),
    GGUFType("Q8_0", 8, 32, 34, (Plane("low", 0, 8, 32, flipped=128),), (_D, ("low", 32)), offset=128),
)
GGUF_TYPES = {each.name: each for each in _ALL}
"""By name, smallest first."""
