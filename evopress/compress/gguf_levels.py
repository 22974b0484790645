"""Levels that are types of GGUF, each fitted as such: what llama.cpp runs, at the bits that its file takes.

A row that is a multiple of 256 may have K types, whose scales and minima have two levels; any other those of 32 alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import Any, ClassVar

import torch
from torch import Tensor

from evopress.compress.compressor import Compressed, Compressor, Payload, check_numbers, sweep_bytes, with_errors
from evopress.compress.gguf_fit import GRIDS_AT_ONCE, Parts, block_order, fit_types
from evopress.compress.gguf_types import GGUF_TYPES, Blocks, GGUFType
from evopress.compress.gptq import DENSE, Dense, uncompressed
from evopress.compress.hessian import inverse_factor
from evopress.compress.one_level import OneLevel
from evopress.errors import EvoPressError
from evopress.units import Level


@dataclass(frozen=True)
class GGUFWeight:
    """A weight as the bytes that a GGUF file has."""

    codec: ClassVar[str] = "gguf"

    blocks: Tensor
    """uint8 [R, bytes of a row]."""
    kind: str
    """Name of the type."""
    dtype: torch.dtype
    """Of the decoded weight."""

    def decode(self) -> Tensor:
        """Return the weights [R, C], computed in float32 as llama.cpp does and rounded once to `dtype`."""
        of = GGUF_TYPES[self.kind]
        return of.values(of.unpack(self.blocks)).to(self.dtype)


@dataclass(frozen=True)
class GGUFLevels:
    """Quantize weights to several types of GGUF, each by GPTQ on its grid and descent after it; see `fit_types`."""

    types: tuple[str, ...]
    """Names, those of more bits first."""
    damping: float = 0.01
    """Share of H's mean diagonal added to its diagonal, in (0, 1)."""
    block_size: int = 128
    """Columns per lazy update."""
    tolerance: float = 0.02
    """A row is done once a pass of descent takes less than this share of its error away, in (0, 1)."""
    dense_bits: int | None = None
    """Bits of a weight of the model where the weight as it is shall be the first level; None: no such level."""
    slice_bytes: int | None = None
    """Working memory of one sweep; more rows than fit are swept in slices. Does not change the result. None: see `sweep_bytes`."""

    @property
    def group_size(self) -> int:
        """Of the smallest blocks, for those who cut weights into such as can be compressed."""
        return 32

    def __post_init__(self) -> None:
        if unknown := [name for name in self.types if name not in GGUF_TYPES]:
            raise EvoPressError(f"method.levels has {unknown[0]}, which is no type of GGUF: choose among {', '.join(GGUF_TYPES)}")
        check_numbers(damping=self.damping, block_size=self.block_size, tolerance=self.tolerance)

    def settings(self) -> dict[str, Any]:
        """Return what decides the result."""
        settings = asdict(self)
        del settings["slice_bytes"]
        return settings | {"types": list(self.types), "compressor": "gguf", "numerics": 1}

    def levels(self, shape: tuple[int, int], *, unit: str = "") -> tuple[Level, ...]:
        """Return one level per type that the rows can have; raise EvoPressError if there is none."""
        size = math.prod(shape)
        levels = [Level(DENSE, self.dense_bits * size, DENSE, self.dense_bits * size, source="quant")] if self.dense_bits else []
        for of in self._types(shape[1]):
            bits = 8 * shape[0] * of.row_bytes(shape[1])
            levels.append(Level(of.name, bits, of.name, bits, source="quant"))
        if not levels:
            raise EvoPressError(
                f"none of method.levels {list(self.types)} fits rows of {shape[1]} weights, since GGUF blocks have 32 or 256: "
                f"{'add Q4_0, which has 32' if shape[1] % 32 == 0 else 'add dense, the weight as it is'}"
            )
        return tuple(levels)

    def _types(self, columns: int) -> list[GGUFType]:
        """Return the types of a row, larger ones first; of two with the same bytes, the one with more scales."""
        fitting = [GGUF_TYPES[name] for name in GGUF_TYPES if name in self.types and columns % GGUF_TYPES[name].width == 0]
        by_size = {of.bits_per_weight: of for of in sorted(fitting, key=lambda of: of.width)}
        return [by_size[bits] for bits in sorted(by_size, reverse=True)]

    def narrowed(self, levels: Mapping[str, Level]) -> Compressor:
        """Return a compressor that makes one type, or the weight as it is, of each of these units."""
        dense = replace(self, types=())
        return OneLevel(
            {
                name: dense if level.key == DENSE else replace(self, types=(level.key,), dense_bits=None)
                for name, level in levels.items()
            }
        )

    def compress(self, weights: Mapping[str, Tensor], H: Tensor) -> dict[str, Sequence[Compressed]]:
        """Quantize every weight to every type; see `Compressor.compress`."""
        originals = uncompressed(weights, H)
        damping = 0.0
        blocks_of: dict[str, dict[str, Payload]] = {name: {} for name in weights}
        stacked = torch.cat(list(originals.values()))
        slice_bytes = sweep_bytes(H.device) if self.slice_bytes is None else self.slice_bytes
        for _, group in groupby(sorted(self._types(len(H)), key=_layout), key=_layout):  # they share order and factor
            types = list(group)
            # As GPTQ's, and twice the grids that are tried for a block at once.
            room = slice_bytes // (len(H) * 32 + self.block_size * 8 + types[0].width * GRIDS_AT_ONCE * 8)
            order = block_order(H.diagonal(), types[0])
            ordered = H[order][:, order]
            U, share = inverse_factor(ordered, damping=self.damping)
            damping = max(damping, share)
            pieces: list[list[Tensor]] = [[] for _ in types]
            for rows in stacked.split(max(room // len(types), 1)):
                Wt = rows.T[order].contiguous()
                every = fit_types(Wt, ordered, U, types, block_size=self.block_size, tolerance=self.tolerance)
                for of, parts, packed in zip(types, every, pieces, strict=True):
                    packed.append(of.pack(_blocks(parts, order, of)))
            for of, packed in zip(types, pieces, strict=True):
                found = torch.cat(packed).split([len(W) for W in weights.values()])
                for (name, W), blocks in zip(weights.items(), found, strict=True):
                    blocks_of[name][of.name] = GGUFWeight(blocks.contiguous(), of.name, W.dtype)
        results: dict[str, Sequence[Compressed]] = {}
        for name, W in originals.items():
            stored = [blocks_of[name][of.name] for of in self._types(len(H))]
            if self.dense_bits:
                stored.insert(0, Dense(weights[name].to(H.device)))
            results[name] = with_errors(stored, W, H, damping=damping, name=name)
        return results


def _layout(of: GGUFType) -> tuple[int, int]:
    return of.width, of.parts


def _blocks(parts: Parts, order: Tensor, of: GGUFType) -> Blocks:
    """Return numbers that were found in an order of columns, rows stacked, as a file has them."""
    place = order.argsort()
    part_size = of.width // of.parts
    of_part, of_block = place[::part_size] // part_size, place[:: of.width] // of.width
    return Blocks(
        codes=(parts.steps[place].T + of.offset).to(torch.uint8).contiguous(),
        d=parts.d[of_block].T.to(torch.float16).contiguous(),
        scales=parts.scales[of_part].T.to(torch.int16).contiguous() if of.part else None,
        dmin=parts.dmin[of_block].T.to(torch.float16).contiguous() if of.mins[1] else None,
        mins=parts.mins[of_part].T.to(torch.int16).contiguous() if of.mins[1] > 1 else None,
    )
