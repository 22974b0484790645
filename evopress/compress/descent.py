"""Coordinate descent on the layer's output error, after GPTQ's one sweep.

GPTQ rounds each column once, knowing nothing of how later columns will be rounded. Here all other columns are known: a column's
best code is the one nearest to where its own derivative is 0. Codes and the scales of their grids take turns. Rows are independent:
those of many units and bit widths are stacked as in `gptq`. Everything is held transposed, [C, R].
"""

from __future__ import annotations

import torch
from torch import Tensor

_INNER = 16
"""Columns that are finished with rank-1 updates before their changes reach the rest of their group in one product."""


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
            moved += _scale_of_group(H[here, here], steps[here], slope[here], moved, scale[group], scale_dtype)
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
    inverse_scale = scale.reciprocal()
    best = torch.empty_like(scale)
    diagonal = H.diagonal().tolist()
    for inner in range(0, len(steps), _INNER):
        end = min(inner + _INNER, len(steps))
        for c in range(inner, end):
            if diagonal[c] <= 0.0:  # never active
                moved[c] = 0.0
                continue
            torch.addcmul(steps[c], slope[c], inverse_scale, value=1.0 / diagonal[c], out=best)
            torch.clamp(best.round_(), low, high, out=best)
            torch.sub(steps[c], best, out=moved[c]).mul_(scale)
            steps[c] = best
            if c + 1 < end:
                slope[c + 1 : end].addr_(H[c, c + 1 : end], moved[c])
        if end < len(steps):
            slope[end:].addmm_(H[end:, inner:end], moved[inner:end])
    return moved


def _scale_of_group(H: Tensor, steps: Tensor, slope: Tensor, moved: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Move a group's scale to the best storable one given all codes and the other groups.

    Args:
        slope: H E of the group's columns before `moved` was added to E, [c, R].
        scale: [R]; overwritten.

    Returns: what the errors E changed by, [c, R].
    """
    reach = H @ steps
    curvature = torch.linalg.vecdot(steps, reach, dim=0)  # of the error along the scale
    gain = torch.linalg.vecdot(steps, slope, dim=0) + torch.linalg.vecdot(reach, moved, dim=0)
    wanted = torch.where(curvature > 0, scale + gain / curvature, scale)
    wanted = torch.where(torch.isfinite(wanted), wanted, scale).to(dtype).to(scale.dtype)
    change = wanted - scale
    better = (2.0 * gain - change * curvature) * change > 0
    better &= (wanted > 0) & torch.isfinite(wanted)
    change = torch.where(better, change, torch.zeros_like(change))
    scale += change
    return steps * -change
