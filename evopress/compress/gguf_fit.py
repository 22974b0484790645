"""GPTQ on the grids of GGUF's types, w = (d · sc) · (q - offset) - dmin · mn, and coordinate descent on all of its numbers.

d and dmin of a block are set when the sweep reaches the block, sc and mn of each of its parts when it reaches the part, so that all
are fitted to weights that carry every earlier error. Afterwards codes, sc, mn, d and dmin take turns, each moved to where the
layer's output error is least given all others, and each move is kept only if it lowers that error.

Types of one layout, as many weights in a block and as many parts, are swept together: their rows are stacked, as those of several
bit widths are in `gptq`, and each row has its own type's limits.

Shapes: C columns, R stacked rows, B = C / width blocks, P = C / part parts, K grids to try. Everything is held transposed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evopress.compress.descent import codes_of_group, energies
from evopress.compress.gguf_types import GGUFType
from evopress.compress.gptq import sweep
from evopress.compress.grid import Grid

_NUM_RANGES = 12
GRIDS_AT_ONCE = _NUM_RANGES + 1
"""Grids that are tried for a part at most, K."""
_LEAST_HALF = 2.0**-24
"""The least positive float16."""


@dataclass
class Parts:
    """The numbers of stacked rows, transposed; see `Blocks`."""

    steps: Tensor
    """float32 [C, R], integers: codes less the offset."""
    d: Tensor
    """float32 [B, R], as float16 holds them; never 0."""
    dmin: Tensor
    """float32 [B, R]; 0 where there is none."""
    scales: Tensor
    """float32 [P, R], integers; never 0."""
    mins: Tensor
    """float32 [P, R], integers."""

    def values(self) -> Tensor:
        """Return the weights, float32 [C, R]."""
        parts, part_size = len(self.scales) // len(self.d), len(self.steps) // len(self.scales)
        scale = self.d.repeat_interleave(parts, 0) * self.scales
        shift = self.dmin.repeat_interleave(parts, 0) * self.mins
        return self.steps * scale.repeat_interleave(part_size, 0) - shift.repeat_interleave(part_size, 0)

    def of_rows(self, rows: Tensor | slice) -> Parts:
        """Return the numbers of some rows."""
        return Parts(*(numbers[:, rows] for numbers in vars(self).values()))


class Limits:
    """What the numbers of stacked rows may be, by each row's type: float [R] each, and the layout that these types share."""

    def __init__(self, types: Sequence[GGUFType], which: Tensor, *, dtype: torch.dtype = torch.float32) -> None:
        """Take types of one layout, and which of them each row is of, int64 [R]."""
        self.types, self._which, self._dtype = types, which, dtype
        self.width, self.parts = types[0].width, types[0].parts
        self.part_size = self.width // self.parts
        self.has_scales = types[0].part > 0
        self.has_shifts, self.has_mins = (max(of.mins[1] for of in types) > least for least in (0, 1))
        self.offset, self.maxq = self.each(of.offset for of in types), self.each(of.maxq for of in types)
        self.scales = self.each(of.scales[0] for of in types), self.each(of.scales[1] for of in types)
        self.mins = self.each(of.mins[0] for of in types), self.each(of.mins[1] for of in types)
        self.low, self.high = -self.offset, self.maxq - self.offset

    def each(self, numbers: Iterable[float]) -> Tensor:
        """Return every row's own of numbers that the types have, [R]."""
        return torch.tensor(list(numbers), dtype=self._dtype, device=self._which.device)[self._which]

    def of_rows(self, rows: Tensor) -> Limits:
        """Return the limits of some rows."""
        return Limits(self.types, self._which[rows], dtype=self._dtype)

    def rounded_scale(self, wanted: Tensor) -> Tensor:
        """Round to a scale's integers, never to 0."""
        sc = torch.clamp(wanted.round(), *self.scales)
        return torch.where(sc == 0, torch.where((wanted < 0) & (self.scales[0] < 0), -1.0, 1.0).to(sc.dtype), sc)

    def rounded_min(self, wanted: Tensor, dmin: Tensor) -> Tensor:
        """Round to the integer whose multiple of dmin is nearest."""
        return torch.clamp(torch.where(dmin == 0, torch.zeros_like(wanted), wanted / dmin).round(), *self.mins)


def block_order(diagonal: Tensor, of: GGUFType) -> Tensor:
    """Sort blocks by their mean input energy, falling, the parts inside a block by theirs, and the columns inside a part.

    See `group_order`: a block and its parts stay together, so nothing in a file knows of the order.

    Args: diagonal: float [C].

    Returns: int64 [C], the columns in the order in which they are rounded.
    """
    energies = diagonal.reshape(-1, of.parts, of.width // of.parts)  # [B, parts, columns]
    columns = torch.arange(len(diagonal), device=diagonal.device).reshape(energies.shape)
    inside = energies.argsort(dim=2, descending=True, stable=True)
    columns = columns.gather(2, inside)
    parts = energies.mean(2).argsort(dim=1, descending=True, stable=True)
    columns = columns.gather(1, parts.unsqueeze(2).expand_as(columns))
    return columns[energies.mean((1, 2)).argsort(descending=True, stable=True)].reshape(-1)


def fit_types(
    Wt: Tensor,
    H: Tensor,
    U: Tensor,
    types: Sequence[GGUFType],
    *,
    block_size: int = 128,
    tolerance: float = 0.02,
    max_passes: int = 4,
) -> list[Parts]:
    """Quantize rows to every one of several types of one layout: one sweep for all, then descent.

    Args:
        Wt: float32 [C, R], columns in the order of `block_order`; left as it is.
        H: float32 [C, C], undamped, and U, the upper Cholesky factor of its damped inverse; both in that order.
        block_size: columns per lazy update.
        tolerance, max_passes: see `descend_parts`.
    """
    rows = Wt.shape[1]
    Wt = Wt.repeat(1, len(types))
    limits = Limits(types, torch.arange(len(types), device=Wt.device).repeat_interleave(rows), dtype=Wt.dtype)
    work = Wt.clone()
    fit = _Fit(work, U.diagonal() ** -2.0, limits)
    codes, _, _ = sweep(work, U, limits.maxq, limits.part_size, fit, block_size=block_size)
    del work
    parts = Parts(codes.to(Wt.dtype) - limits.offset, *(torch.stack(each) for each in (fit.d, fit.dmin, fit.scales, fit.mins)))
    descend_parts(Wt, H, parts, limits, tolerance=tolerance, max_passes=max_passes)
    return [parts.of_rows(slice(index * rows, (index + 1) * rows)) for index in range(len(types))]


class _Fit:
    """Fits the grid of each part when a sweep reaches it."""

    def __init__(self, work: Tensor, weights: Tensor, limits: Limits) -> None:
        """Take the weights that the sweep works on, [C, R], and the cost of a squared error in each column, [C]."""
        self._work, self._weights, self._limits = work, weights, limits
        shares = [_shares(of) for of in limits.types]
        most = max(len(each) for each in shares)
        shares = [each + each[-1:] * (most - len(each)) for each in shares]  # the last once more, which is no better
        of_range = [
            [share / (1 if of.offset else of.maxq) for share in each] for of, each in zip(limits.types, shares, strict=True)
        ]
        self._shares, self._of_range = (  # [K, 1, R]
            torch.stack([limits.each(each) for each in zip(*by_type, strict=True)]).unsqueeze(1) for by_type in (shares, of_range)
        )
        # The scale furthest from 0 takes the integer furthest from 0, on whichever side that is.
        self._furthest = limits.each(max(of.scales, key=abs) for of in limits.types)
        self.d: list[Tensor] = []
        self.dmin: list[Tensor] = []
        self.scales: list[Tensor] = []
        self.mins: list[Tensor] = []

    def __call__(self, group: Tensor, first: int) -> Grid:
        """Return a part's grid, its shift already added to the weights [part, R], a view of the sweep's own.

        What the sweep then rounds is w + dmin · mn to a multiple of d · sc.
        """
        limits = self._limits
        if first % limits.width == 0:
            self._start_block(first)
        d, dmin = self.d[-1], self.dmin[-1]
        scales, mins = torch.ones_like(d), limits.mins[0]
        if limits.has_scales:  # else d and dmin are all that there is
            scale, shift = self._ranges(group.unsqueeze(0))
            sc, mn = limits.rounded_scale(scale / d), limits.rounded_min(shift, dmin)
            ((scales,), (mins,)) = self._best(group.unsqueeze(0), d * sc, dmin * mn, first, (sc, mn))
        self.scales.append(scales)
        self.mins.append(mins)
        group += dmin * mins
        return Grid(scale=d * scales, zero=limits.offset)

    def _start_block(self, first: int) -> None:
        """Set d and dmin by what each part of a block would choose alone."""
        limits = self._limits
        block = self._work[first : first + limits.width].reshape(limits.parts, limits.part_size, -1)
        ranges = self._ranges(block)
        scales, shifts = self._best(block, *ranges, first, ranges)
        largest = scales.gather(0, scales.abs().argmax(0, keepdim=True)).squeeze(0)
        self.d.append(_half(largest / self._furthest, never_zero=True))
        self.dmin.append(_half(shifts.amax(0) / limits.mins[1].clamp(min=1.0)))

    def _ranges(self, group: Tensor) -> tuple[Tensor, Tensor]:
        """Return grids to try for each part, from one that spans all weights to one that spans a part that depends on the bits.

        Args: group: [parts, part, R].

        Returns: scale and shift, [K, parts, R] each; scales are never 0.
        """
        limits = self._limits
        low, high = group.amin(1), group.amax(1)
        signed = limits.offset > 0
        extreme = torch.where(high.abs() > low.abs(), high, low)  # on the side that has one code more
        if limits.has_scales:
            low = low.clamp(max=0.0)  # what is taken away is never negative
        span = torch.where(signed, extreme / -limits.offset, high - low)
        shift = -low * self._shares if limits.has_scales else -(low + high) / 2 + (high - low) * (self._shares / 2)
        return _not_zero(span * self._of_range), torch.where(signed, torch.zeros_like(shift), shift)

    def _best(
        self, group: Tensor, scale: Tensor, shift: Tensor, first: int, numbers: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return of two numbers of each grid [K, parts, R] those of the grid with the least error, [parts, R] each.

        Args: group: weights [parts, part, R], whose first column is so many-th. scale, shift: [K, parts, R], the grids.
        """
        limits = self._limits
        scale, shift = scale.unsqueeze(2), shift.unsqueeze(2)
        steps = (group + shift).div_(scale).round_()
        error = torch.clamp(steps, limits.low, limits.high, out=steps).mul_(scale).sub_(shift).sub_(group).square_()
        weights = self._weights[first : first + group.shape[0] * group.shape[1]].reshape(len(group), 1, -1)
        least = (weights @ error).squeeze(2).argmin(0, keepdim=True)
        return numbers[0].gather(0, least).squeeze(0), numbers[1].gather(0, least).squeeze(0)


def _shares(of: GGUFType) -> list[float]:
    """Return how much of the whole range each grid that is tried spans."""
    least = 1.0 - 1.2 * 2.0 ** (-of.bits / 2)
    if of.offset:
        return [1.0, *torch.linspace(1.0 + 0.5 / of.offset, least, _NUM_RANGES).tolist()]
    return torch.linspace(1.0, least, _NUM_RANGES).tolist()


def _not_zero(scale: Tensor) -> Tensor:
    return torch.where(scale.abs() < _LEAST_HALF, torch.full_like(scale, _LEAST_HALF), scale)


def _half(numbers: Tensor, *, never_zero: bool = False) -> Tensor:
    """Round to float16 without reaching infinity, or 0 where that would be none."""
    largest = torch.finfo(torch.float16).max
    halves = numbers.clamp(-largest, largest).to(torch.float16).to(numbers.dtype)
    return torch.where(halves == 0, torch.full_like(halves, _LEAST_HALF), halves) if never_zero else halves


def descend_parts(Wt: Tensor, H: Tensor, parts: Parts, limits: Limits, *, tolerance: float = 0.02, max_passes: int = 4) -> None:
    """Lower tr(E H Eᵀ) of stacked rows by passes over all codes, sc, mn, d and dmin; no move raises the error of a row.

    Args:
        Wt: [C, R], the weights, and H: [C, C], columns in one order; left as they are.
        parts: overwritten.
        tolerance: a row is done once a pass takes less than this share of its error away.
        max_passes: passes at most.
    """
    rows = torch.arange(Wt.shape[1], device=Wt.device)  # those that are not done yet
    error = Wt - parts.values()
    slope = H @ error
    before = energies(error, slope)
    now = Parts(*(numbers.clone() for numbers in vars(parts).values()))
    for _ in range(max_passes):
        for block in range(len(now.d)):
            _pass_over_block(H, now, error, slope, limits, block)
        after = energies(error, slope)
        for name, numbers in vars(now).items():
            getattr(parts, name)[:, rows] = numbers
        going = (before - after) > tolerance * before
        if not bool(going.any()):
            return
        rows, before = rows[going], after[going]
        error, slope, now, limits = error[:, going], slope[:, going], now.of_rows(going), limits.of_rows(going)


def _pass_over_block(H: Tensor, now: Parts, error: Tensor, slope: Tensor, limits: Limits, block: int) -> None:
    """Move every number of a block once; error and slope = H · error are kept up with it."""
    size = limits.part_size
    d, dmin = now.d[block], now.dmin[block]
    for part in range(block * limits.parts, (block + 1) * limits.parts):
        here = slice(part * size, (part + 1) * size)
        inner, steps, sc, mn = H[here, here], now.steps[here], now.scales[part], now.mins[part]
        moved = codes_of_group(inner, steps, slope[here], d * sc, limits.low, limits.high)
        if limits.has_scales:
            gain, curvature = _along(inner, steps, slope[here], moved)
            wanted = limits.rounded_scale(sc + _best(gain, curvature) / d)
            moved += _kept(steps, gain, curvature, d * (wanted - sc), sc, wanted)
        if limits.has_mins:
            taken = torch.full_like(steps, -1.0)
            gain, curvature = _along(inner, taken, slope[here], moved)
            wanted = limits.rounded_min(dmin * mn + _best(gain, curvature), dmin)
            moved += _kept(taken, gain, curvature, dmin * (wanted - mn), mn, wanted)
        error[here] += moved
        slope.addmm_(H[:, here], moved)
    here = slice(block * limits.width, (block + 1) * limits.width)
    parts = slice(block * limits.parts, (block + 1) * limits.parts)
    inner, moved = H[here, here], torch.zeros_like(error[here])
    steps = now.steps[here] * now.scales[parts].repeat_interleave(size, 0)
    gain, curvature = _along(inner, steps, slope[here], moved)
    wanted = _half(d + _best(gain, curvature), never_zero=True)
    moved += _kept(steps, gain, curvature, wanted - d, d, wanted)
    if limits.has_shifts:
        taken = -now.mins[parts].repeat_interleave(size, 0)
        gain, curvature = _along(inner, taken, slope[here], moved)
        wanted = _half(dmin + _best(gain, curvature))
        moved += _kept(taken, gain, curvature, wanted - dmin, dmin, wanted)
    error[here] += moved
    slope.addmm_(H[:, here], moved)


def _along(H: Tensor, direction: Tensor, slope: Tensor, moved: Tensor) -> tuple[Tensor, Tensor]:
    """Return gain and curvature: a number's move by δ takes 2 · gain · δ - curvature · δ² of the error away, [R] each.

    Args:
        H: of these columns, [c, c].
        direction: what the weights change by with the number, [c, R].
        slope: H · error before the errors changed by `moved`, [c, R].
    """
    reach = H @ direction
    gain = torch.linalg.vecdot(direction, slope, dim=0) + torch.linalg.vecdot(reach, moved, dim=0)
    return gain, torch.linalg.vecdot(direction, reach, dim=0)


def _best(gain: Tensor, curvature: Tensor) -> Tensor:
    """Return the move that lowers the error most, [R]."""
    return torch.nan_to_num(gain / curvature.clamp(min=0.0), nan=0.0, posinf=0.0, neginf=0.0)  # 0 without curvature


def _kept(direction: Tensor, gain: Tensor, curvature: Tensor, move: Tensor, number: Tensor, wanted: Tensor) -> Tensor:
    """Make a move where it lowers the error.

    Args: number: [R]; overwritten by what is wanted where it does.

    Returns: what the errors change by, [c, R].
    """
    better = 2.0 * gain * move - curvature * move.square() > 0
    torch.where(better, wanted, number, out=number)
    return direction * (move * better).neg_()
