"""GPTQ on the grids of GGUF's types, w = (d · sc) · (q - offset) - dmin · mn, and coordinate descent on all of its numbers.

d and dmin of a block are set when the sweep reaches the block, sc and mn of each of its parts when it reaches the part, so that all
are fitted to weights that carry every earlier error. Afterwards codes, sc, mn, d and dmin take turns, each moved to where the
layer's output error is least given all others, and each move is kept only if it lowers that error.

Shapes: C columns, R stacked rows, B = C / width blocks, P = C / part parts. Everything is held transposed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from evopress.compress.descent import codes_of_group, energies
from evopress.compress.gguf_types import GGUFType
from evopress.compress.gptq import sweep
from evopress.compress.grid import Grid

_NUM_RANGES = 12
_LEAST_HALF = 2.0**-24
"""The least positive float16."""


@dataclass
class Parts:
    """The numbers of a type for stacked rows, transposed; see `Blocks`."""

    codes: Tensor
    """float32 [C, R], integers in 0..maxq."""
    d: Tensor
    """float32 [B, R], as float16 holds them; never 0."""
    dmin: Tensor
    """float32 [B, R]; 0 where there is none."""
    scales: Tensor
    """float32 [P, R], integers; never 0."""
    mins: Tensor
    """float32 [P, R], integers."""

    def values(self, of: GGUFType) -> Tensor:
        """Return the weights, float32 [C, R]."""
        part = len(self.codes) // len(self.scales)
        scale = self.d.repeat_interleave(of.parts, 0) * self.scales
        shift = self.dmin.repeat_interleave(of.parts, 0) * self.mins
        return (self.codes - of.offset) * scale.repeat_interleave(part, 0) - shift.repeat_interleave(part, 0)


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


def fit_type(Wt: Tensor, H: Tensor, U: Tensor, of: GGUFType, *, block_size: int = 128, tolerance: float = 0.02) -> Parts:
    """Quantize stacked rows to a type: a sweep, then descent.

    Args:
        Wt: float32 [C, R], columns in the order of `block_order`; left as it is.
        H: float32 [C, C], undamped, and U, the upper Cholesky factor of its damped inverse; both in that order.
        block_size: columns per lazy update.
        tolerance: see `descend`.
    """
    work = Wt.clone()
    fit = _Fit(work, U.diagonal() ** -2.0, of)
    maxq = torch.full((Wt.shape[1],), float(of.maxq), device=Wt.device)
    codes, _, _ = sweep(work, U, maxq, of.width // of.parts, fit, block_size=block_size)
    parts = Parts(codes.to(Wt.dtype), *(torch.stack(numbers) for numbers in (fit.d, fit.dmin, fit.scales, fit.mins)))
    descend_parts(Wt, H, parts, of, tolerance=tolerance)
    return parts


class _Fit:
    """Fits the grid of each part when a sweep reaches it."""

    def __init__(self, work: Tensor, weights: Tensor, of: GGUFType) -> None:
        """Take the weights that the sweep works on, [C, R], and the cost of a squared error in each column, [C]."""
        self._work, self._weights, self._of = work, weights, of
        self.d: list[Tensor] = []
        self.dmin: list[Tensor] = []
        self.scales: list[Tensor] = []
        self.mins: list[Tensor] = []

    def __call__(self, group: Tensor, first: int) -> Grid:
        """Return a part's grid, its shift already added to the weights [part, R], a view of the sweep's own.

        What the sweep then rounds is w + dmin · mn to a multiple of d · sc.
        """
        if first % self._of.width == 0:
            self._start_block(first)
        d, dmin, of = self.d[-1], self.dmin[-1], self._of
        weights = self._weights[first : first + len(group)]
        best_cost = torch.full_like(d, torch.inf)
        scales, mins = torch.ones_like(d), torch.full_like(d, float(of.mins[0]))
        for scale, shift in _ranges(group.unsqueeze(0), of) if of.part else ():  # else d and dmin are all that there is
            sc, mn = _rounded_scale(scale[0] / d, of), _rounded_min(shift[0], dmin, of)
            step, taken = d * sc, dmin * mn
            steps = ((group + taken) / step).round_().clamp_(-of.offset, of.maxq - of.offset)
            cost = weights @ (steps.mul_(step).sub_(taken).sub_(group)).square_()
            better = cost < best_cost
            best_cost = torch.where(better, cost, best_cost)
            scales, mins = torch.where(better, sc, scales), torch.where(better, mn, mins)
        self.scales.append(scales)
        self.mins.append(mins)
        group += dmin * mins
        return Grid(scale=d * scales, zero=torch.full_like(d, float(of.offset)))

    def _start_block(self, first: int) -> None:
        """Set d and dmin by what each part of a block would choose alone."""
        of = self._of
        block = self._work[first : first + of.width].reshape(of.parts, -1, self._work.shape[1])  # [parts, part, R]
        weights = self._weights[first : first + of.width].reshape(of.parts, 1, -1)
        best_cost = torch.full((of.parts, block.shape[2]), torch.inf, device=block.device)
        scales, shifts = torch.ones_like(best_cost), torch.zeros_like(best_cost)
        for scale, shift in _ranges(block, of):
            steps = ((block + shift.unsqueeze(1)) / scale.unsqueeze(1)).round_().clamp_(-of.offset, of.maxq - of.offset)
            error = steps.mul_(scale.unsqueeze(1)).sub_(shift.unsqueeze(1)).sub_(block).square_()
            cost = (weights @ error).squeeze(1)
            better = cost < best_cost
            best_cost = torch.where(better, cost, best_cost)
            scales, shifts = torch.where(better, scale, scales), torch.where(better, shift, shifts)
        largest = scales.gather(0, scales.abs().argmax(0, keepdim=True)).squeeze(0)
        # The scale furthest from 0 takes the integer furthest from 0, on whichever side that is.
        furthest = of.scales[0] if -of.scales[0] > of.scales[1] else of.scales[1]
        self.d.append(_half(largest / furthest, never_zero=True))
        self.dmin.append(_half(shifts.amax(0) / max(of.mins[1], 1)) if of.mins != (1, 1) else _half(shifts[0]))


def _ranges(group: Tensor, of: GGUFType) -> list[tuple[Tensor, Tensor]]:
    """Return grids to try for each part, from one that spans all weights to one that spans a part that depends on the bits.

    Args: group: [parts, part, R].

    Returns: pairs of scale and shift, [parts, R] each; scales are never 0.
    """
    least = 1.0 - 1.2 * 2.0 ** (-of.bits / 2)
    low, high = group.amin(1), group.amax(1)
    if of.offset:
        extreme = torch.where(high.abs() > low.abs(), high, low)  # on the side that has one code more
        full = _not_zero(extreme / -of.offset)
        nothing = torch.zeros_like(full)
        shares = [1.0, *torch.linspace(1.0 + 0.5 / of.offset, least, _NUM_RANGES).tolist()]
        return [(full * share, nothing) for share in shares]
    if of.part:
        low = low.clamp(max=0.0)  # what is taken away is never negative
    found = []
    for share in torch.linspace(1.0, least, _NUM_RANGES).tolist():
        scale = _not_zero((high - low) * (share / of.maxq))
        found.append((scale, -low * share if of.part else -(low + high) / 2 + (high - low) * (share / 2)))
    return found


def _not_zero(scale: Tensor) -> Tensor:
    return torch.where(scale.abs() < _LEAST_HALF, torch.full_like(scale, _LEAST_HALF), scale)


def _half(numbers: Tensor, *, never_zero: bool = False) -> Tensor:
    """Round to float16 without reaching infinity, or 0 where that would be none."""
    largest = torch.finfo(torch.float16).max
    halves = numbers.clamp(-largest, largest).to(torch.float16).to(numbers.dtype)
    return torch.where(halves == 0, torch.full_like(halves, _LEAST_HALF), halves) if never_zero else halves


def _rounded_scale(wanted: Tensor, of: GGUFType) -> Tensor:
    """Round to a scale's integers, never to 0."""
    sc = wanted.round().clamp(*of.scales)
    return torch.where(sc == 0, torch.where((wanted < 0) & (of.scales[0] < 0), -1.0, 1.0).to(sc.dtype), sc)


def _rounded_min(wanted: Tensor, dmin: Tensor, of: GGUFType) -> Tensor:
    """Round to the integer whose multiple of dmin is nearest."""
    return torch.where(dmin == 0, torch.zeros_like(wanted), wanted / dmin).round().clamp(*of.mins)


def descend_parts(Wt: Tensor, H: Tensor, parts: Parts, of: GGUFType, *, tolerance: float = 0.02, max_passes: int = 4) -> None:
    """Lower tr(E H Eᵀ) of stacked rows by passes over all codes, sc, mn, d and dmin; no move raises the error of a row.

    Args:
        Wt: [C, R], the weights, and H: [C, C], columns in one order; left as they are.
        parts: overwritten.
        tolerance: a row is done once a pass takes less than this share of its error away.
        max_passes: passes at most.
    """
    rows = torch.arange(Wt.shape[1], device=Wt.device)  # those that are not done yet
    error = Wt - parts.values(of)
    slope = H @ error
    before = energies(error, slope)
    now = Parts(*(numbers.clone() for numbers in vars(parts).values()))
    for _ in range(max_passes):
        for block in range(len(now.d)):
            _pass_over_block(H, now, error, slope, of, block)
        after = energies(error, slope)
        for name, numbers in vars(now).items():
            getattr(parts, name)[:, rows] = numbers
        going = (before - after) > tolerance * before
        if not bool(going.any()):
            return
        rows, before = rows[going], after[going]
        error, slope = error[:, going], slope[:, going]
        now = Parts(*(numbers[:, going] for numbers in vars(now).values()))


def _pass_over_block(H: Tensor, now: Parts, error: Tensor, slope: Tensor, of: GGUFType, block: int) -> None:
    """Move every number of a block once; error and slope = H · error are kept up with it."""
    size = of.width // of.parts
    d, dmin = now.d[block], now.dmin[block]
    low, high = torch.full_like(d, -float(of.offset)), torch.full_like(d, float(of.maxq - of.offset))
    for part in range(block * of.parts, (block + 1) * of.parts):
        here = slice(part * size, (part + 1) * size)
        inner, steps = H[here, here], now.codes[here] - of.offset
        moved = codes_of_group(inner, steps, slope[here], d * now.scales[part], low, high)
        now.codes[here] = steps + of.offset
        if of.part:
            wanted = _rounded_scale(now.scales[part] + _best(inner, steps, slope[here], moved) / d, of)
            moved += _kept(inner, steps, slope[here], moved, d * (wanted - now.scales[part]), now.scales[part], wanted)
        if of.mins[1] > 1:
            taken = torch.full_like(steps, -1.0)
            wanted = _rounded_min(dmin * now.mins[part] + _best(inner, taken, slope[here], moved), dmin, of)
            moved += _kept(inner, taken, slope[here], moved, dmin * (wanted - now.mins[part]), now.mins[part], wanted)
        error[here] += moved
        slope.addmm_(H[:, here], moved)
    here = slice(block * of.width, (block + 1) * of.width)
    parts = slice(block * of.parts, (block + 1) * of.parts)
    inner, moved = H[here, here], torch.zeros_like(error[here])
    steps = (now.codes[here] - of.offset) * now.scales[parts].repeat_interleave(size, 0)
    wanted = _half(d + _best(inner, steps, slope[here], moved), never_zero=True)
    moved += _kept(inner, steps, slope[here], moved, wanted - d, d, wanted)
    if of.mins[1]:
        taken = -now.mins[parts].repeat_interleave(size, 0)
        wanted = _half(dmin + _best(inner, taken, slope[here], moved))
        moved += _kept(inner, taken, slope[here], moved, wanted - dmin, dmin, wanted)
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


def _best(H: Tensor, direction: Tensor, slope: Tensor, moved: Tensor) -> Tensor:
    """Return the move of a number that lowers the error most, [R]."""
    gain, curvature = _along(H, direction, slope, moved)
    best = torch.where(curvature > 0, gain / curvature, torch.zeros_like(gain))
    return torch.where(torch.isfinite(best), best, torch.zeros_like(best))


def _kept(H: Tensor, direction: Tensor, slope: Tensor, moved: Tensor, move: Tensor, number: Tensor, wanted: Tensor) -> Tensor:
    """Make a move where it lowers the error.

    Args: number: [R]; overwritten by what is wanted where it does.

    Returns: what the errors change by, [c, R].
    """
    gain, curvature = _along(H, direction, slope, moved)
    better = 2.0 * gain * move - curvature * move.square() > 0
    number.copy_(torch.where(better, wanted, number))
    return direction * torch.where(better, -move, torch.zeros_like(move))
