"""GPTQ at several bit widths in one column sweep, in the paper's setting or in our best.

Rows are independent given the Hessian's factor, so the rows of every unit on one input, times every bit width, are stacked and
swept together: a Llama block takes four sweeps, not thirty-five. W is held transposed, [C, R], so that a column is contiguous.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from evopress.compress.columns import round_run, run_length
from evopress.compress.compressor import Compressed, Compressor, Payload, Working, check_numbers, sweep_bytes, with_errors
from evopress.compress.descent import descend
from evopress.compress.grid import Grid, spanning
from evopress.compress.hessian import inverse_factor
from evopress.compress.one_level import OneLevel
from evopress.compress.order import group_order
from evopress.compress.ranges import fit_range
from evopress.errors import EvoPressError
from evopress.units import Level

_SCALE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_ZERO_BITS = 16
RECIPES = ("paper", "best")
ZEROS = ("any", "codes")
DENSE = "dense"
"""Label and key of the level that is the weight as it is."""
FitGrid = Callable[[Tensor, int], Grid]
"""Fits a grid to a group of weights float32 [c, R] whose first column is so many-th."""


@dataclass(frozen=True)
class Quantized:
    """A weight as integers with a scale and a zero per row and group."""

    codec: ClassVar[str] = "packed_integers"

    codes: Tensor
    """uint8 [R, C], each below 2^bits."""
    scales: Tensor
    """float16, bfloat16 or float32 [R, G]."""
    zeros: Tensor
    """int16 [R, G]."""
    bits: int
    dtype: torch.dtype
    """Of the decoded weight."""

    def decode(self) -> Tensor:
        """Return scale · (code - zero), [R, C], computed in float32 and rounded once to `dtype`."""
        rows, columns = self.codes.shape
        grouped = self.codes.to(torch.float32).reshape(rows, self.scales.shape[1], -1)
        grouped.sub_(self.zeros.to(torch.float32).unsqueeze(-1)).mul_(self.scales.to(torch.float32).unsqueeze(-1))
        return grouped.reshape(rows, columns).to(self.dtype)


@dataclass(frozen=True)
class Dense:
    """A weight as it is."""

    codec: ClassVar[str] = "dense"

    weight: Tensor
    """[R, C], in the model's dtype."""

    def decode(self) -> Tensor:
        """Return the weight bit for bit."""
        return self.weight


@dataclass(frozen=True)
class GPTQ:
    """Quantize weights to several bit widths with error feedback.

    Source: GPTQ, Algorithm 1 (arXiv:2210.17323). `recipe="paper"` is the paper's setting (section 4.3): grid from minimum to
    maximum, no activation order. Differs from the authors' code: each group's grid is fitted to weights that carry all earlier
    updates (theirs misses those of the unfinished 128 columns when group_size < block_size), and scales are rounded to their
    storage dtype before they are used. `recipe="best"` spends more on each level (columns by `group_order`, grids by `fit_range`,
    then `descend`) and stores the same: codes, scales and zeros of contiguous groups.
    """

    bits: tuple[int, ...] = (6, 5, 4, 3, 2)
    """Bit widths, descending, each in 1..8."""
    group_size: int | None = 128
    """Columns that share a scale and a zero; None: a whole row."""
    damping: float = 0.01
    """Share of H's mean diagonal added to its diagonal, in (0, 1)."""
    block_size: int = 128
    """Columns per lazy update; changes speed, and the result only by rounding."""
    scale_dtype: str = "float16"
    slice_bytes: int | None = None
    """Working memory of one sweep; more rows than fit are swept in slices, which changes the result only by rounding.

    None: see `sweep_bytes`.
    """
    recipe: str = "paper"
    """paper or best."""
    symmetric: bool = False
    """Every zero is its grid's middle code, for engines that take no other."""
    zeros: str = "any"
    """any, or codes: every zero is one of its grid's codes, for formats that pack it as one."""
    group_sizes: Mapping[int, int] = field(default_factory=dict)
    """Bit width to its own group size, where it is not `group_size`."""
    tolerance: float = 0.02
    """recipe=best: a row is done once a pass of descent takes less than this share of its error away, in (0, 1)."""
    dense_bits: int | None = None
    """Bits of a weight of the model where the weight as it is shall be the first level; None: no such level."""

    def __post_init__(self) -> None:
        if (not self.bits and not self.dense_bits) or sorted(set(self.bits), reverse=True) != list(self.bits):
            raise EvoPressError(
                f"method.levels {list(self.bits)} must be distinct bit widths in descending order, such as [4, 3, 2]"
            )
        if self.bits and (min(self.bits) < 1 or max(self.bits) > 8):
            raise EvoPressError(
                f"method.levels {list(self.bits)} must lie in 1 to 8 bits, or be dense (the weight as it is): leave the others out"
            )
        if self.group_size is not None and self.group_size < 1:
            raise EvoPressError(f"method.group_size {self.group_size} must be positive, or null for one group per row")
        for bits, size in self.group_sizes.items():
            if bits not in self.bits or size < 1:
                raise EvoPressError(
                    f"method.group_sizes has {bits}: {size}, expected a bit width of method.levels {list(self.bits)} and a "
                    "positive number of columns, such as {2: 32}"
                )
        check_numbers(damping=self.damping, block_size=self.block_size, tolerance=self.tolerance)
        if self.scale_dtype not in _SCALE_DTYPES:
            raise EvoPressError(f"method.scale_dtype {self.scale_dtype!r} is unknown: choose {' or '.join(_SCALE_DTYPES)}")
        if self.zeros not in ZEROS:
            raise EvoPressError(f"method.zeros={self.zeros} is unknown: choose {' or '.join(ZEROS)}")
        if self.recipe not in RECIPES:
            raise EvoPressError(f"method.recipe={self.recipe} is unknown: choose {' or '.join(RECIPES)}")

    def settings(self) -> dict[str, Any]:
        """Return what decides the result; what only later versions have is left out where it changes nothing."""
        settings = asdict(self)
        del settings["slice_bytes"]
        settings["group_sizes"] = {str(bits): size for bits, size in sorted(self.group_sizes.items())}
        if self.recipe == "paper":
            del settings["recipe"], settings["tolerance"]
        for later in ("symmetric", "group_sizes", "dense_bits"):
            if not settings[later]:
                del settings[later]
        if self.zeros == "any":
            del settings["zeros"]
        return settings | {"bits": list(self.bits), "compressor": "gptq", "numerics": 1}

    def levels(self, shape: tuple[int, int], *, unit: str = "") -> tuple[Level, ...]:
        """Return one level per bit width; raise EvoPressError if a group size does not divide the columns."""
        size = math.prod(shape)
        levels = [Level(DENSE, self.dense_bits * size, DENSE, self.dense_bits * size, source="quant")] if self.dense_bits else []
        scale_bits = torch.finfo(_SCALE_DTYPES[self.scale_dtype]).bits
        for b in self.bits:
            metadata = shape[0] * (shape[1] // self._group_size(b, shape[1])) * (scale_bits + _ZERO_BITS)
            levels.append(Level(f"{b} bits", b * size, str(b), b * size + metadata, source="quant"))
        return tuple(levels)

    def _group_size(self, bits: int, columns: int) -> int:
        """Return the columns per group of a level; raise EvoPressError if they do not divide all columns."""
        group_size = self.group_sizes.get(bits, self.group_size or columns)
        if columns % group_size:
            divisors = [size for size in (128, 64, 32, 16) if columns % size == 0]
            advice = f"method.group_size={divisors[0]} fits this one" if divisors else "method.group_size=null always fits"
            raise EvoPressError(f"group size {group_size} does not divide the {columns} input columns of this weight: {advice}")
        return group_size

    def narrowed(self, levels: Mapping[str, Level]) -> Compressor:
        """Return a compressor that makes one bit width, or the weight as it is, of each of these units."""
        return OneLevel({name: self._narrowed(level.key) for name, level in levels.items()})

    @property
    def working(self) -> Working:
        """See `Working`: codes are held a byte each."""

        def unpacked(level: Level, size: int) -> int:
            return 0 if level.key == DENSE else size + metadata_bits(level) // 8

        paper = Working(factoring=4.5, sweeping=2.0, per_weight=5, cut_by=9, unpacked=unpacked)
        return paper if self.recipe == "paper" else Working(unpacked=unpacked)

    def _narrowed(self, key: str) -> GPTQ:
        if key == DENSE:
            return replace(self, bits=(), group_sizes={})
        bits = int(key)
        own = {bits: self.group_sizes[bits]} if bits in self.group_sizes else {}
        return replace(self, bits=(bits,), group_sizes=own, dense_bits=None)

    def compress(self, weights: Mapping[str, Tensor], H: Tensor) -> dict[str, Sequence[Compressed]]:
        """Quantize every weight at every bit width; see `Compressor.compress`."""
        originals = uncompressed(weights, H)
        damping = 0.0
        payloads: dict[str, dict[int, Quantized]] = {name: {} for name in weights}
        for group_size in dict.fromkeys(self._group_size(b, len(H)) for b in self.bits):
            together = [b for b in self.bits if self._group_size(b, len(H)) == group_size]
            damping = max(damping, self._sweep(originals, H, together, group_size, payloads))
        results: dict[str, Sequence[Compressed]] = {}
        for name, W in originals.items():
            stored: list[Payload] = [replace(payloads[name][b], dtype=weights[name].dtype) for b in self.bits]
            if self.dense_bits:
                stored.insert(0, Dense(weights[name].to(H.device)))
            results[name] = with_errors(stored, W, H, damping=damping, name=name)
        return results

    def _sweep(
        self,
        originals: Mapping[str, Tensor],
        H: Tensor,
        bits: Sequence[int],
        group_size: int,
        payloads: dict[str, dict[int, Quantized]],
    ) -> float:
        """Quantize all weights at the bit widths that share a group size, and return the damping that H took.

        Args: originals: float32 [R, C]. payloads: takes the result, by unit and bit width.
        """
        best, scale_dtype = self.recipe == "best", _SCALE_DTYPES[self.scale_dtype]
        order = group_order(H.diagonal(), group_size) if best else torch.arange(len(H), device=H.device)
        H = H[order][:, order] if best else H
        U, damping = inverse_factor(H, damping=self.damping)
        place = order.argsort()  # of a column in the order
        place_of_group = place[::group_size] // group_size
        room = sweep_bytes(H.device) if self.slice_bytes is None else self.slice_bytes
        for rows in self._slices(originals, bits, len(H), room):
            Wt = torch.cat([originals[name][start:stop].T for name, start, stop, _ in rows], dim=1)  # [C, stacked rows]
            Wt = Wt[order] if best else Wt
            widths = torch.cat([torch.full((stop - start,), b) for _, start, stop, b in rows])
            maxq = (2.0**widths - 1.0).to(H.device)
            fit = self._fit(U, maxq, group_size)
            work = Wt.clone() if best else Wt
            codes, scales, zeros = sweep(work, U, maxq, group_size, fit, block_size=self.block_size)
            if best:
                del work
                found = codes.to(torch.float32)
                descend(Wt, H, found, scales, zeros, maxq, tolerance=self.tolerance, scale_dtype=scale_dtype)
                codes = found.to(torch.uint8)[place]
                scales, zeros = scales[place_of_group], zeros[place_of_group]
            offset = 0
            for name, start, stop, b in rows:
                here = slice(offset, offset + stop - start)
                offset = here.stop
                part = Quantized(
                    codes=codes[:, here].T.contiguous(),
                    scales=scales[:, here].T.to(scale_dtype).contiguous(),
                    zeros=zeros[:, here].T.to(torch.int16).contiguous(),
                    bits=b,
                    dtype=torch.float32,
                )
                # A further slice of the same unit and level is joined.
                payloads[name][b] = _joined(payloads[name][b], part) if start else part
        return damping

    def _fit(self, U: Tensor, maxq: Tensor, group_size: int) -> FitGrid:
        """Return how a group's grid is fitted when the sweep reaches it."""
        grid: dict[str, Any] = {
            "symmetric": self.symmetric,
            "zero_codes": self.zeros == "codes",
            "scale_dtype": _SCALE_DTYPES[self.scale_dtype],
        }
        if self.recipe == "best":
            weights = U.diagonal() ** -2.0
            return lambda group, first: fit_range(group, weights[first : first + group_size], maxq, **grid)
        return whole_range(maxq, **grid)

    def _slices(
        self, weights: Mapping[str, Tensor], bits: Sequence[int], columns: int, slice_bytes: int
    ) -> list[list[tuple[str, int, int, int]]]:
        """Split (unit, rows, bits) into sweeps that fit so many bytes; each entry is (name, first row, end row, bits)."""
        # Per stacked row: the weight and the input copy (float32), codes (uint8), and the errors of one block of columns. Descent
        # holds codes, errors and slopes as well, and a copy of each when rows are done.
        per_column = 9 if self.recipe == "paper" else 32
        room = max(slice_bytes // (columns * per_column + self.block_size * 8), 1)
        slices: list[list[tuple[str, int, int, int]]] = [[]]
        free = room
        for name, W in weights.items():
            for b in bits:
                start = 0
                while start < W.shape[0]:
                    stop = min(W.shape[0], start + free)
                    slices[-1].append((name, start, stop, b))
                    free -= stop - start
                    start = stop
                    if not free:
                        slices.append([])
                        free = room
        return [rows for rows in slices if rows]


def uncompressed(weights: Mapping[str, Tensor], H: Tensor) -> dict[str, Tensor]:
    """Return copies of weights, float32 [R, C] on the Hessian's device, columns that are never active set to 0.

    Raises: EvoPressError if a weight is not finite, with its name.
    """
    dead = H.diagonal() == 0
    originals = {name: W.to(H.device, torch.float32, copy=True) for name, W in weights.items()}
    for W in originals.values():
        W[:, dead] = 0.0
    if not all(bool(torch.isfinite(W).all()) for W in originals.values()):
        broken = next(name for name, W in originals.items() if not bool(torch.isfinite(W).all()))
        raise EvoPressError(f"the weight of {broken} is not finite: fetch the checkpoint again")
    return originals


def metadata_bits(level: Level) -> int:
    """Return the bits of scales and zeros, 32 a group or more, of a weight at a level of `GPTQ`; of others, 0."""
    return level.stored_bits - level.cost if level.source == "quant" else 0


def _joined(first: Quantized, second: Quantized) -> Quantized:
    return Quantized(
        codes=torch.cat([first.codes, second.codes]),
        scales=torch.cat([first.scales, second.scales]),
        zeros=torch.cat([first.zeros, second.zeros]),
        bits=first.bits,
        dtype=first.dtype,
    )


def whole_range(
    maxq: Tensor, *, symmetric: bool = False, zero_codes: bool = False, scale_dtype: torch.dtype = torch.float16
) -> FitGrid:
    """Return the paper's way to fit a group's grid: from its minimum to its maximum."""
    span = spanning(symmetric=symmetric, zero_codes=zero_codes)
    return lambda group, first: span(group.amin(0), group.amax(0), maxq, scale_dtype=scale_dtype)


def sweep(
    Wt: Tensor,
    U: Tensor,
    maxq: Tensor,
    group_size: int,
    fit: FitGrid,
    *,
    block_size: int = 128,
    inner_size: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Round stacked rows column by column, spreading each column's error over the columns still open.

    Source: GPTQ, Algorithm 1. Updates are lazy at two depths: `inner_size` columns (None: `run_length`) are finished by
    `round_run`, then reach the rest of their block of `block_size` in one product, and finished blocks reach all later columns in
    one.

    Args:
        Wt: float32 [C, R], transposed stacked weights; overwritten.
        U: float32 [C, C], upper Cholesky factor of the damped inverse Hessian.
        maxq: float32 [R], greatest code of each row.
        group_size: columns per group; divides C.
        fit: fits a group's grid to its weights, which carry all earlier updates.

    Returns: codes uint8 [C, R], scales and zeros float32 [G, R].
    """
    columns, rows = Wt.shape
    # A group's grid needs every update of the columns before it, so groups start where a block and an inner run start.
    inner_size = math.gcd(inner_size or run_length(Wt.device), group_size)
    if group_size < block_size:
        block_size -= block_size % group_size
    elif group_size < columns and group_size % block_size:
        block_size = group_size
    codes = torch.empty(columns, rows, dtype=torch.uint8, device=Wt.device)
    scales = torch.empty(columns // group_size, rows, device=Wt.device)
    zeros = torch.empty_like(scales)
    errors = torch.empty(min(block_size, columns), rows, device=Wt.device)
    steps = torch.empty(min(inner_size, columns), rows, device=Wt.device)
    spread = U / U.diagonal().unsqueeze(1)  # row c: what a unit of column c's error takes from every later column
    low = high = scale = zero = maxq  # of a group, from where it starts
    for first in range(0, columns, block_size):
        end = min(first + block_size, columns)
        for inner in range(first, end, inner_size):
            inner_end = min(inner + inner_size, end)
            if inner % group_size == 0:
                grid = fit(Wt[inner : inner + group_size], inner)
                scales[inner // group_size], zeros[inner // group_size] = scale, zero = grid.scale, grid.zero
                low, high = -zero, maxq - zero
            run, taken, done = slice(inner, inner_end), steps[: inner_end - inner], errors[inner - first : inner_end - first]
            round_run(Wt[run], spread[run, run], scale, low, high, steps=taken, errors=done)
            codes[run] = taken.add_(zero)
            if inner_end < end:
                Wt[inner_end:end].addmm_(spread[run, inner_end:end].T, done, alpha=-1.0)
        if end < columns:
            Wt[end:].addmm_(spread[first:end, end:].T, errors[: end - first], alpha=-1.0)
    return codes, scales, zeros
