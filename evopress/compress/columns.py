"""Runs of columns taken one after the other: what a sweep and a descent do between two matrix products.

Each function is a few operations per column in torch, and one kernel per run on a GPU where Triton is installed
(`compress/kernels.py`): columns wait for one another, rows do not.
"""

from __future__ import annotations

import functools
import importlib
import logging
from types import ModuleType

import torch
from torch import Tensor

from evopress.compress.grid import round_in_place
from evopress.compress.sparse import lowest
from evopress.errors import reason_of

log = logging.getLogger(__name__)
_LEAST = torch.finfo(torch.float32).tiny
"""Of the diagonal of a Hessian, below which an input counts as never active: one over it must be a number."""


def run_length(device: torch.device) -> int:
    """Return how many columns are finished before their changes reach others in one product."""
    return 16 if _kernels(device.type) is None else 64


def round_run(Wt: Tensor, spread: Tensor, scale: Tensor, low: Tensor, high: Tensor, *, steps: Tensor, errors: Tensor) -> None:
    """Round a run of columns of stacked rows; each column's error moves those of the run after it.

    Source: GPTQ, Algorithm 1, its inner loop.

    Args:
        Wt: float32 [c, R], transposed; overwritten with nothing that is of use.
        spread: float32 [c, c]; row i is what a unit of column i's error takes from every later column.
        scale, low, high: float32 [R], the grid and the least and greatest step.
        steps: takes code - zero, float32 [c, R].
        errors: takes what each column was before it was rounded less what it is then, float32 [c, R].
    """
    if (kernels := _kernels(Wt.device.type)) is not None:
        return kernels.round_run(Wt, spread, scale, low, high, steps, errors)
    w_of, error_of, step_of = Wt.unbind(), errors.unbind(), steps.unbind()
    for c in range(len(Wt)):
        round_in_place(w_of[c], scale, low, high, steps=step_of[c], error=error_of[c])
        if c + 1 < len(Wt):
            Wt[c + 1 :].addr_(spread[c, c + 1 :], error_of[c], alpha=-1.0)
    return None


def prune_run(Wt: Tensor, U: Tensor, factors: Tensor, *, errors: Tensor) -> None:
    """Take a run of columns of stacked rows through the errors of those before; what is pruned is left as it is then.

    Source: SparseGPT (arXiv:2301.00774), Algorithm 1, its inner loop.

    Args:
        Wt: float [c, R], transposed; overwritten.
        U: float [c, c], the run's part of the upper Cholesky factor of the inverse Hessian.
        factors: float [c, R], 1 / U_cc where a weight is pruned, else 0.
        errors: takes what each column is then times its factors, float [c, R].
    """
    if (kernels := _kernels(Wt.device.type)) is not None:
        return kernels.prune_run(Wt, U, factors, errors)
    for c in range(len(Wt)):
        torch.mul(Wt[c], factors[c], out=errors[c])
        if c + 1 < len(Wt):
            Wt[c + 1 :].addr_(U[c, c + 1 :], errors[c], alpha=-1.0)
    return None


def lowest_of_each(scores: Tensor, rows: Tensor, counts: Tensor) -> Tensor:
    """Mark the lowest scores of each of several stacked parts, by column, then row, among equal ones; see `lowest`.

    Args:
        scores: float [c, R], finite and at least 0.
        rows: int32 [n], of each part, in order; they add up to R.
        counts: int32 [n], how many to mark of each.

    Returns: bool [c, R].
    """
    if (kernels := _kernels(scores.device.type)) is not None:
        return kernels.lowest_of_each(scores, rows, counts)
    parts = zip(scores.split(rows.tolist(), dim=1), counts.tolist(), strict=True)
    return torch.cat([lowest(part.reshape(-1), count).reshape(part.shape) for part, count in parts], dim=1)


def descend_run(H: Tensor, steps: Tensor, slope: Tensor, scale: Tensor, low: Tensor, high: Tensor, *, moved: Tensor) -> None:
    """Move the codes of a run of columns, one column after the other, to the best ones given all others.

    Source: QuantEase (arXiv:2309.01885), Algorithm 1.

    Args:
        H: float32 [c, c], of the run's columns.
        steps: code - zero, float32 [c, R]; overwritten.
        slope: H E of the run's columns, float32 [c, R]; overwritten with nothing that is of use.
        scale, low, high: float32 [R], the grid and the least and greatest step.
        moved: takes what the errors E changed by, float32 [c, R].
    """
    if (kernels := _kernels(H.device.type)) is not None:
        return kernels.descend_run(H, steps, slope, scale, low, high, moved)
    inverse_scale = scale.reciprocal()
    best = torch.empty_like(scale)
    diagonal = H.diagonal().tolist()
    for c in range(len(steps)):
        if diagonal[c] < _LEAST:
            moved[c] = 0.0
            continue
        torch.addcmul(steps[c], slope[c], inverse_scale, value=1.0 / diagonal[c], out=best)
        torch.clamp(best.round_(), low, high, out=best)
        torch.sub(steps[c], best, out=moved[c]).mul_(scale)
        steps[c] = best
        if c + 1 < len(steps):
            slope[c + 1 :].addr_(H[c, c + 1 :], moved[c])
    return None


def move_scale(reach: Tensor, steps: Tensor, slope: Tensor, scale: Tensor, *, moved: Tensor, dtype: torch.dtype) -> None:
    """Move a group's scale to the best storable one given all codes and the other groups.

    Source: LNQ's least squares (arXiv:2505.07004), a group at a time.

    Args:
        reach: H of the group's columns times `steps`, float32 [c, R].
        steps: code - zero, float32 [c, R].
        slope: H E of the group's columns before `moved` was added to E, float32 [c, R].
        scale: float32 [R]; overwritten.
        moved: what the errors E changed by, float32 [c, R]; takes the scale's change on top.
        dtype: in which scales are stored.
    """
    if (kernels := _kernels(steps.device.type)) is not None:
        return kernels.move_scale(reach, steps, slope, scale, moved, dtype)
    curvature = torch.linalg.vecdot(steps, reach, dim=0)  # of the error along the scale
    gain = torch.linalg.vecdot(steps, slope, dim=0) + torch.linalg.vecdot(reach, moved, dim=0)
    wanted = torch.where(curvature > 0, scale + gain / curvature, scale)
    wanted = torch.where(torch.isfinite(wanted), wanted, scale).to(dtype).to(scale.dtype)
    change = wanted - scale
    better = (2.0 * gain - change * curvature) * change > 0
    better &= (wanted > 0) & torch.isfinite(wanted)
    change = torch.where(better, change, torch.zeros_like(change))
    scale += change
    moved += steps * -change
    return None


def range_costs(group: Tensor, weights: Tensor, scales: Tensor, lows: Tensor, highs: Tensor) -> Tensor:
    """Return the weighted squared error of a group on each of several grids, float32 [n, R].

    Args:
        group: float32 [c, R], the group's weights, transposed.
        weights: float32 [c], the cost of a squared error in each column.
        scales, lows, highs: float32 [n, R], each grid's scale and its least and greatest step.
    """
    if (kernels := _kernels(group.device.type)) is not None:
        return kernels.range_costs(group, weights, scales, lows, highs)
    work = torch.empty_like(group)
    costs = torch.empty_like(scales)
    for scale, low, high, cost in zip(scales, lows, highs, costs, strict=True):
        torch.div(group, scale, out=work)
        torch.clamp(work.round_(), low, high, out=work)
        torch.addcmul(group, work, scale, value=-1.0, out=work)
        torch.mv(work.square_().T, weights, out=cost)
    return costs


@functools.cache
def _kernels(device: str) -> ModuleType | None:
    """Return the kernels where there are a GPU, Triton, and what Triton needs to build them; said once where there are not."""
    if device != "cuda":
        return None
    try:
        kernels = importlib.import_module("evopress.compress.kernels")
        kernels.check(torch.device(device))
    except Exception as error:  # whatever Triton meets on a machine: no compiler, no Triton, an unknown card
        log.warning("columns are swept without Triton kernels, which is several times slower: %s", reason_of(error))
        return None
    return kernels
