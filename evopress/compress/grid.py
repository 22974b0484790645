"""The integer grid of a group of weights: scale and zero from a range."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

ZERO_LIMIT = 32767
"""Zeros are stored as int16."""


@dataclass(frozen=True)
class Grid:
    """Scales and zeros, one per row [R]: value = scale · (code - zero), code in 0..maxq."""

    scale: Tensor
    """float32, already rounded to the dtype it is stored in, so that the sweep sees the grid that is stored."""
    zero: Tensor
    """float32 integers within ±ZERO_LIMIT; not confined to 0..maxq, as the range need not contain 0."""


def fit_grid(
    low: Tensor, high: Tensor, maxq: Tensor, *, zero_codes: bool = False, scale_dtype: torch.dtype = torch.float16
) -> Grid:
    """Span the grid from the least to the greatest weight of each row's group.

    Source: GPTQ's asymmetric quantizer without its grid search, as the paper uses it (section 4.3). Differs from it: a group of
    equal values is kept (as 1 · scale or 0), and scales are rounded to their storage dtype before use, not after.

    Args:
        low, high: float32 [R], minimum and maximum of the group.
        maxq: float32 [R], 2^bits - 1.
        zero_codes: zeros are codes too, 0..maxq: the range is widened to contain 0 where it does not.
        scale_dtype: dtype in which scales are stored.
    """
    if zero_codes:
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    # Beyond this ratio the zero would leave int16: widen such far-off, narrow ranges to contain 0.
    far = torch.minimum(low.abs(), high.abs()) > (high - low) * (ZERO_LIMIT / 2) / maxq
    far &= (low * high > 0) & (high > low)
    low = torch.where(far, low.clamp(max=0.0), low)
    high = torch.where(far, high.clamp(min=0.0), high)
    constant = high == low
    scale = torch.where(constant, high.abs(), (high - low) / maxq)
    scale = _storable(torch.where(scale == 0, torch.ones_like(scale), scale), scale_dtype)
    zero = torch.round(-low / scale)
    zero = torch.where(constant, (low < 0).to(zero.dtype), zero)
    if zero_codes:
        zero = torch.minimum(zero, maxq)  # a scale is rounded
    return Grid(scale=scale, zero=zero.clamp(-ZERO_LIMIT, ZERO_LIMIT))


def symmetric_grid(low: Tensor, high: Tensor, maxq: Tensor, *, scale_dtype: torch.dtype = torch.float16) -> Grid:
    """Span a grid whose zero is its middle code, (maxq + 1) / 2, over the greatest magnitude of each row's group.

    Source: GPTQ's symmetric quantizer: the range is [-m, m], so that the grid reaches past m on the negative side.

    Args: as `fit_grid`.
    """
    reach = torch.maximum(low.abs(), high.abs())
    scale = torch.where(reach == 0, torch.ones_like(reach), 2.0 * reach / maxq)
    return Grid(scale=_storable(scale, scale_dtype), zero=torch.floor((maxq + 1.0) / 2.0))


def spanning(*, symmetric: bool, zero_codes: bool) -> Callable[..., Grid]:
    """Return what spans a grid over a range: `symmetric_grid`, or `fit_grid` with zeros that are codes or may be any number."""
    return symmetric_grid if symmetric else partial(fit_grid, zero_codes=zero_codes)


def _storable(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Round positive float32 scales to `dtype` without reaching 0 or infinity."""
    limits = torch.finfo(dtype)
    # Below float16's normal numbers (6e-5: 6 bits over a range of 0.004) steps are even; rounded up, a grid still spans its group.
    step = max(limits.smallest_normal * limits.eps, torch.finfo(torch.float32).smallest_normal)
    scale = torch.where(scale < limits.smallest_normal, torch.ceil(scale / step) * step, scale)
    return scale.clamp(min=step, max=limits.max).to(dtype).to(torch.float32)


def to_codes(w: Tensor, grid: Grid, maxq: Tensor) -> Tensor:
    """Round weights float32 [R] to their grid; return codes as float32 integers in 0..maxq, [R]."""
    return torch.minimum(torch.round(w / grid.scale).add_(grid.zero).clamp_(min=0.0), maxq)


def from_codes(codes: Tensor, grid: Grid) -> Tensor:
    """Return scale · (code - zero), float32 [R]."""
    return (codes - grid.zero) * grid.scale


def round_in_place(w: Tensor, scale: Tensor, low: Tensor, high: Tensor, *, steps: Tensor, error: Tensor) -> None:
    """Round weights to their grid as `to_codes` and `from_codes` do, in four passes and without new memory.

    Args:
        w: float32 [R]; left as it is.
        scale, low, high: float32 [R], the grid's scale, the negative of its zero, and maxq less its zero.
        steps: takes code - zero, float32 [R].
        error: takes w less its rounded value, float32 [R].
    """
    torch.div(w, scale, out=steps).round_()
    torch.clamp(steps, low, high, out=steps)
    torch.addcmul(w, steps, scale, value=-1.0, out=error)
