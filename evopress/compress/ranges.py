"""The range of a group's grid that costs least in the layer's output."""

from __future__ import annotations

import torch
from torch import Tensor

from evopress.compress.columns import range_costs
from evopress.compress.grid import Grid, spanning

_NUM_RANGES = 12


def fit_range(
    group: Tensor,
    weights: Tensor,
    maxq: Tensor,
    *,
    symmetric: bool = False,
    zero_codes: bool = False,
    scale_dtype: torch.dtype = torch.float16,
) -> Grid:
    """Choose among ranges, from the whole to a part that depends on the bit width, the one with the least weighted squared error.

    Clipping a few outliers buys smaller steps for all others: at 2 bits the best range is about two thirds of the whole. Source:
    the grid search of GPTQ's quantizer (`mse`, arXiv:2210.17323), with errors weighted by what they cost in the layer's output.

    Args:
        group: float32 [c, R], the group's weights, transposed; left as they are.
        weights: float32 [c], the cost of a squared error in each column: 1 / U_cc², the variance of the input that later columns
            cannot make up for.
        maxq: float32 [R], 2^bits - 1.
        symmetric: zeros in the middle of the grid, see `symmetric_grid`.
        zero_codes: see `fit_grid`.
    """
    span = spanning(symmetric=symmetric, zero_codes=zero_codes)
    low, high = group.amin(0), group.amax(0)
    least = 1.0 - 1.2 * (maxq + 1.0).rsqrt()  # of the whole range: 0.40 at 2 bits, 0.58 at 3, 0.70, 0.79, 0.85 at 6
    shares = torch.linspace(0.0, 1.0, _NUM_RANGES, device=group.device).unsqueeze(1)
    parts = 1.0 - shares * (1.0 - least)  # [n, R]
    grids = span(low * parts, high * parts, maxq, scale_dtype=scale_dtype)
    zeros = grids.zero.expand_as(grids.scale)
    best = range_costs(group, weights, grids.scale, -zeros, maxq - zeros).argmin(0, keepdim=True)
    return Grid(scale=grids.scale.gather(0, best).squeeze(0), zero=zeros.gather(0, best).squeeze(0))
