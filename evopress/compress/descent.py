"""Coordinate descent on the layer's output error, after GPTQ's one sweep.

GPTQ rounds each column once, knowing nothing of how later columns will be rounded. Here all other columns are known: a column's
best code is the one nearest to where its own derivative is 0. Codes and the scales of their grids take turns. Rows are independent:
those of many units and bit widths are stacked as in `gptq`. Everything is held transposed, [C, R].
"""

from __future__ import annotations

import torch
from torch import Tensor

from evopress.compress.columns import descend_run, move_scale, run_length


def descend(
    Wt: Tensor,
    H: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    maxq: Tensor,
    *,
    tolerance: float = 0.02,
    max_passes: int = 4,
    scale_dtype: torch.dtype = torch.float16,
) -> None:
    """Lower tr(E H Eᵀ) of stacked rows by passes over all codes and scales; E = W - scale · (code - zero).

    Source: QuantEase (arXiv:2309.01885), Algorithm 1, for the codes; the scales are those of LNQ's least squares
    (arXiv:2505.07004), taken a group at a time, each rounded to its storage dtype and kept only where it lowers the error. No step
    raises the error of a row. A row is done once a pass takes less than `tolerance` of its error away.

    Args:
        Wt: float32 [C, R], the weights, transposed and stacked; left as they are.
        H: float32 [C, C], undamped, columns in the order of Wt's rows; left as it is.
        codes: float32 [C, R], integers in 0..maxq; overwritten.
        scales, zeros: float32 [G, R]; the scales are overwritten.
        maxq: float32 [R].
        tolerance: share of a row's error, in (0, 1).
        max_passes: passes at most; 0 leaves all as it is.
    """
    columns, groups = len(Wt), len(scales)
    group_size = columns // groups
    rows = torch.arange(Wt.shape[1], device=Wt.device)  # those that are not done yet
    steps = codes - zeros.repeat_interleave(group_size, 0)
    error = torch.addcmul(Wt, steps, scales.repeat_interleave(group_size, 0), value=-1.0)  # E
    slope = H @ error  # H E, half of what the error falls by with each weight
    scale, low, high = scales.clone(), -zeros, maxq - zeros
    before = energies(error, slope)
    for _ in range(max_passes):
        for group in range(groups):
            here = slice(group * group_size, (group + 1) * group_size)
            moved = codes_of_group(H[here, here], steps[here], slope[here], scale[group], low[group], high[group])
            reach = H[here, here] @ steps[here]
            move_scale(reach, steps[here], slope[here], scale[group], moved=moved, dtype=scale_dtype)
            error[here] += moved
            slope.addmm_(H[:, here], moved)
        after = energies(error, slope)
        going = (before - after) > tolerance * before
        codes[:, rows] = steps + (-low).repeat_interleave(group_size, 0)
        scales[:, rows] = scale
        if not bool(going.any()):
            return
        rows, before = rows[going], after[going]
        steps, error, slope, scale, low, high = (part[:, going] for part in (steps, error, slope, scale, low, high))


def energies(error: Tensor, slope: Tensor) -> Tensor:
    """Return e H eᵀ of every row, [R]."""
    return torch.linalg.vecdot(error, slope, dim=0)


def codes_of_group(H: Tensor, steps: Tensor, slope: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Move every code of a group, one column after the other, to the best one given all others.

    Args:
        H: [c, c], of the group's columns.
        steps: code - zero, [c, R]; overwritten.
        slope: H E of the group's columns, [c, R]; left as it is.
        scale, low, high: [R], the grid and the least and greatest step.

    Returns: what the errors E changed by, [c, R].
    """
    slope = slope.clone()
    moved = torch.empty_like(slope)
    length = run_length(steps.device)
    for first in range(0, len(steps), length):
        end = min(first + length, len(steps))
        run = slice(first, end)
        descend_run(H[run, run], steps[run], slope[run], scale, low, high, moved=moved[run])
        if end < len(steps):
            slope[end:].addmm_(H[end:, run], moved[run])
    return moved
