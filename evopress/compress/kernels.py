"""The functions of `columns.py` as Triton kernels: a program takes some rows through a whole run of columns.

Runs are at most `LONGEST` columns. What a column owes to those before it is summed when its turn comes, so that nothing but the
run's own changes is held, in registers. Sums run in another order than in torch: results differ by rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LONGEST = 128
_ROWS = 32
"""Of a program."""
_TILE = 8192
"""Scores that a program looks at together."""
_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
_LEAST = tl.constexpr(2.0**-126)  # as of `columns._LEAST`
_HALF_EVEN = tl.constexpr(12582912.0)  # 1.5 · 2^23: adding it leaves no bits for fractions


@triton.jit
def _to_step(x, low, high):
    """Round half to even, and clamp; beyond 2^22, where adding is not rounding, the clamp decides."""
    return tl.minimum(tl.maximum((x + _HALF_EVEN) - _HALF_EVEN, low), high)


@triton.jit
def _grid_of(SCALE, LOW, HIGH, r, inside):
    """Load the grids of some rows."""
    scale = tl.load(SCALE + r, mask=inside, other=1.0)
    low = tl.load(LOW + r, mask=inside, other=0.0)
    high = tl.load(HIGH + r, mask=inside, other=0.0)
    return scale, low, high


@triton.jit
def _round_run(
    W,
    SPREAD,
    SCALE,
    LOW,
    HIGH,
    STEPS,
    ERRORS,
    columns,
    rows,
    w_row,
    spread_row,
    spread_column,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, COLUMNS)
    inside = r < rows
    scale, low, high = _grid_of(SCALE, LOW, HIGH, r, inside)
    errors = tl.zeros((COLUMNS, ROWS), dtype=tl.float32)
    for c in range(columns):
        spread = tl.load(SPREAD + k * spread_row + c * spread_column, mask=k < c, other=0.0)
        w = tl.load(W + c * w_row + r, mask=inside, other=0.0) - tl.sum(spread[:, None] * errors, axis=0)
        step = _to_step(tl.div_rn(w, scale), low, high)
        error = w - step * scale
        tl.store(STEPS + c * rows + r, step, mask=inside)
        tl.store(ERRORS + c * rows + r, error, mask=inside)
        errors = tl.where(k[:, None] == c, error[None, :], errors)


@triton.jit
def _prune_run(W, U, FACTORS, ERRORS, columns, rows, w_row, u_row, u_column, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, COLUMNS)
    inside = r < rows
    errors = tl.zeros((COLUMNS, ROWS), dtype=tl.float32)
    for c in range(columns):
        u = tl.load(U + k * u_row + c * u_column, mask=k < c, other=0.0)
        w = tl.load(W + c * w_row + r, mask=inside, other=0.0) - tl.sum(u[:, None] * errors, axis=0)
        error = w * tl.load(FACTORS + c * rows + r, mask=inside, other=0.0)
        tl.store(W + c * w_row + r, w, mask=inside)
        tl.store(ERRORS + c * rows + r, error, mask=inside)
        errors = tl.where(k[:, None] == c, error[None, :], errors)


@triton.jit
def _load_bits(SCORES, start, rows, size, all_rows, TILE: tl.constexpr):
    """Load some scores of a part, column by column, as integers, which are in the order of what they stand for."""
    at = start + tl.arange(0, TILE)
    column = at // rows
    where = column * all_rows + at - column * rows
    inside = at < size
    return tl.load(SCORES + where, mask=inside, other=0.0).to(tl.int32, bitcast=True), where, inside


@triton.jit
def _lowest_of_each(SCORES, PARTS, COUNTS, MARKED, columns, all_rows, NUM: tl.constexpr, TILE: tl.constexpr):
    part = tl.program_id(0)
    k = tl.arange(0, NUM)
    first = tl.sum(tl.load(PARTS + k, mask=k < part, other=0))
    rows = tl.load(PARTS + part)
    size = columns * rows
    left = tl.load(COUNTS + part)  # to mark of those that begin like the greatest one that is marked
    greatest = tl.zeros((), dtype=tl.int32)  # as far as it is known, 6 bits at a time
    bins = tl.arange(0, 128)
    for digit in tl.static_range(6):
        shift = 30 - 6 * digit
        histogram = tl.zeros((128,), dtype=tl.int32)
        for start in range(0, size, TILE):
            bits, _, inside = _load_bits(SCORES + first, start, rows, size, all_rows, TILE)
            alike = inside & (((bits >> shift) >> 6) == greatest)
            histogram += tl.histogram(tl.where(alike, (bits >> shift) & 63, 64), 128)
        before = (tl.cumsum(histogram) < left) & (bins < 64)
        left -= tl.sum(tl.where(before, histogram, 0))
        greatest = greatest * 64 + tl.sum(before.to(tl.int32))
    for start in range(0, size, TILE):
        bits, where, inside = _load_bits(SCORES + first, start, rows, size, all_rows, TILE)
        equal = (inside & (bits == greatest)).to(tl.int32)
        marked = (bits < greatest) | ((equal > 0) & (tl.cumsum(equal) <= left))
        tl.store(MARKED + first + where, marked, mask=inside)
        left -= tl.sum(equal)


@triton.jit
def _descend_run(
    H, STEPS, SLOPE, SCALE, LOW, HIGH, MOVED, columns, rows, h_row, h_column, COLUMNS: tl.constexpr, ROWS: tl.constexpr
):
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, COLUMNS)
    inside = r < rows
    scale, low, high = _grid_of(SCALE, LOW, HIGH, r, inside)
    moved = tl.zeros((COLUMNS, ROWS), dtype=tl.float32)
    for c in range(columns):
        curvature = tl.load(H + c * (h_row + h_column))
        active = curvature >= _LEAST
        h = tl.load(H + c * h_row + k * h_column, mask=k < c, other=0.0)
        slope = tl.load(SLOPE + c * rows + r, mask=inside, other=0.0) + tl.sum(h[:, None] * moved, axis=0)
        step = tl.load(STEPS + c * rows + r, mask=inside, other=0.0)
        best = _to_step(step + tl.div_rn(slope, scale * tl.where(active, curvature, 1.0)), low, high)
        best = tl.where(active, best, step)
        move = (step - best) * scale
        tl.store(STEPS + c * rows + r, best, mask=inside)
        tl.store(MOVED + c * rows + r, move, mask=inside)
        moved = tl.where(k[:, None] == c, move[None, :], moved)


@triton.jit
def _move_scale(REACH, STEPS, SLOPE, SCALE, MOVED, columns, rows, DTYPE: tl.constexpr, ROWS: tl.constexpr):
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = r < rows
    scale = tl.load(SCALE + r, mask=inside, other=1.0)
    curvature = tl.zeros((ROWS,), dtype=tl.float32)
    gain = tl.zeros((ROWS,), dtype=tl.float32)
    for c in range(columns):
        reach = tl.load(REACH + c * rows + r, mask=inside, other=0.0)
        step = tl.load(STEPS + c * rows + r, mask=inside, other=0.0)
        curvature += step * reach
        gain += step * tl.load(SLOPE + c * rows + r, mask=inside, other=0.0)
        gain += reach * tl.load(MOVED + c * rows + r, mask=inside, other=0.0)
    wanted = (scale + gain / tl.where(curvature > 0, curvature, 1.0)).to(DTYPE).to(tl.float32)
    change = wanted - scale
    better = ((2.0 * gain - change * curvature) * change > 0) & (curvature > 0) & (wanted > 0) & (wanted < float("inf"))
    change = tl.where(better, change, 0.0)
    tl.store(SCALE + r, scale + change, mask=inside)
    for c in range(columns):
        step = tl.load(STEPS + c * rows + r, mask=inside, other=0.0)
        moved = tl.load(MOVED + c * rows + r, mask=inside, other=0.0)
        tl.store(MOVED + c * rows + r, moved - step * change, mask=inside)


@triton.jit
def _range_costs(GROUP, WEIGHTS, SCALES, LOWS, HIGHS, COSTS, columns, rows, group_row, ROWS: tl.constexpr):
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = r < rows
    here = tl.program_id(1) * rows + r
    scale, low, high = _grid_of(SCALES, LOWS, HIGHS, here, inside)
    cost = tl.zeros((ROWS,), dtype=tl.float32)
    for c in range(columns):
        w = tl.load(GROUP + c * group_row + r, mask=inside, other=0.0)
        error = w - _to_step(tl.div_rn(w, scale), low, high) * scale
        cost += tl.load(WEIGHTS + c) * error * error
    tl.store(COSTS + here, cost, mask=inside)


def _on_its_device(launch: Callable[..., Any]) -> Callable[..., Any]:
    """Launch where the first tensor lies: Triton takes the current device, whichever the tensors are on."""

    @functools.wraps(launch)
    def launched(first: Tensor, *rest: Any) -> Any:
        with torch.cuda.device_of(first):
            return launch(first, *rest)

    return launched


@_on_its_device
def round_run(Wt: Tensor, spread: Tensor, scale: Tensor, low: Tensor, high: Tensor, steps: Tensor, errors: Tensor) -> None:
    """See `columns.round_run`."""
    _dense(Wt, scale, low, high, steps, errors)
    columns, rows = Wt.shape
    _round_run[_programs(rows)](
        Wt, spread, scale, low, high, steps, errors, columns, rows, Wt.stride(0), *spread.stride(), **_tile(columns)
    )


@_on_its_device
def prune_run(Wt: Tensor, U: Tensor, factors: Tensor, errors: Tensor) -> None:
    """See `columns.prune_run`."""
    _dense(Wt, factors, errors)
    columns, rows = Wt.shape
    _prune_run[_programs(rows)](Wt, U, factors, errors, columns, rows, Wt.stride(0), *U.stride(), **_tile(columns))


@_on_its_device
def lowest_of_each(scores: Tensor, rows: Tensor, counts: Tensor) -> Tensor:
    """See `columns.lowest_of_each`: a program for each part finds the bits of the greatest score that is marked."""
    _dense(scores, rows, counts)
    marked = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    parts = len(rows)
    _lowest_of_each[(parts,)](
        scores, rows, counts, marked, *scores.shape, NUM=max(triton.next_power_of_2(parts), 2), TILE=_TILE, num_warps=16
    )
    return marked


@_on_its_device
def descend_run(H: Tensor, steps: Tensor, slope: Tensor, scale: Tensor, low: Tensor, high: Tensor, moved: Tensor) -> None:
    """See `columns.descend_run`."""
    _dense(steps, slope, scale, low, high, moved)
    columns, rows = steps.shape
    _descend_run[_programs(rows)](H, steps, slope, scale, low, high, moved, columns, rows, *H.stride(), **_tile(columns))


@_on_its_device
def move_scale(reach: Tensor, steps: Tensor, slope: Tensor, scale: Tensor, moved: Tensor, dtype: torch.dtype) -> None:
    """See `columns.move_scale`."""
    _dense(reach, steps, slope, scale, moved)
    columns, rows = steps.shape
    _move_scale[_programs(rows)](reach, steps, slope, scale, moved, columns, rows, DTYPE=_DTYPES[dtype], ROWS=_ROWS, num_warps=1)


@_on_its_device
def range_costs(group: Tensor, weights: Tensor, scales: Tensor, lows: Tensor, highs: Tensor) -> Tensor:
    """See `columns.range_costs`."""
    _dense(group, weights, scales, lows, highs)
    costs = torch.empty_like(scales)
    columns, rows = group.shape
    _range_costs[(*_programs(rows), len(scales))](
        group, weights, scales, lows, highs, costs, columns, rows, group.stride(0), ROWS=_ROWS, num_warps=1
    )
    return costs


def _programs(rows: int) -> tuple[int]:
    return (triton.cdiv(rows, _ROWS),)


def _dense(*tensors: Tensor) -> None:
    assert all(tensor.is_contiguous() for tensor in tensors), "kernels take tensors without gaps"


def _tile(columns: int) -> dict[str, int]:
    """Return what a run of columns is compiled for: columns are held in a power of two."""
    assert columns <= LONGEST, f"a run of {columns} columns does not fit into registers"
    return {"COLUMNS": max(triton.next_power_of_2(columns), 2), "ROWS": _ROWS, "num_warps": 1}


def check(device: torch.device) -> None:
    """Run a kernel on two numbers; raises what Triton raises where it cannot build or start one."""
    ones = torch.ones(1, 2, device=device)
    costs = range_costs(ones, ones[0, :1], ones, ones, ones)
    if costs.tolist() != [[0.0, 0.0]]:
        raise RuntimeError(f"a kernel gives {costs.tolist()}, not zeros")
