"""GPTQ as Algorithm 1 says it: one weight, one bit width, one column at a time, every later column updated at once."""

from __future__ import annotations

import torch
from torch import Tensor


def inverse_cholesky(H: Tensor, damping: float) -> Tensor:
    """Return the upper Cholesky factor of the inverse of H with a share of its mean diagonal added; dead columns get 1."""
    H = H.clone()
    dead = H.diagonal() == 0
    H.diagonal()[dead] = 1.0
    H += torch.eye(len(H), dtype=H.dtype) * damping * H.diagonal().mean()
    return torch.linalg.cholesky(torch.linalg.inv(H), upper=True)


def authors_grid(w: Tensor, maxq: int) -> tuple[Tensor, Tensor]:
    """Scale and zero [R] from the minimum and maximum of w [R, g], as in the authors' code."""
    low, high = w.amin(1), w.amax(1)
    equal = low == high
    low, high = torch.where(equal, -1.0, low), torch.where(equal, 1.0, high)
    scale = (high - low) / maxq
    return scale, torch.round(-low / scale)


def stored_grid(w: Tensor, maxq: int, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The same with scales rounded to their storage dtype before use; for ordinary ranges only."""
    low, high = w.amin(1), w.amax(1)
    scale = ((high - low) / maxq).to(scale_dtype).to(w.dtype)
    return scale, torch.round(-low / scale)


def gptq_literal(
    W: Tensor,
    H: Tensor,
    *,
    bits: int,
    group_size: int,
    damping: float = 0.01,
    scale_dtype: torch.dtype = torch.float16,
    stale_groups: bool = False,
    block_size: int = 128,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Return the dequantized weight [R, C].

    Args:
        stale_groups: the authors' semantics: a group's grid is fitted to weights that carry the updates of finished blocks of
            `block_size` columns only, and scales are not rounded.
        dtype: of the arithmetic.
    """
    W, H = W.to(dtype, copy=True), H.to(dtype)
    W[:, H.diagonal() == 0] = 0.0
    U = inverse_cholesky(H, damping)
    maxq = 2**bits - 1
    Q = torch.zeros_like(W)
    stale = W.clone()
    for c in range(W.shape[1]):
        if c % block_size == 0:
            stale = W.clone()
        if c % group_size == 0:
            group = slice(c, c + group_size)
            scale, zero = authors_grid(stale[:, group], maxq) if stale_groups else stored_grid(W[:, group], maxq, scale_dtype)
        code = torch.clamp(torch.round(W[:, c] / scale) + zero, 0, maxq)
        Q[:, c] = scale * (code - zero)
        W[:, c:] -= torch.outer((W[:, c] - Q[:, c]) / U[c, c], U[c, c:])
    return Q


def round_to_nearest(W: Tensor, *, bits: int, group_size: int, scale_dtype: torch.dtype = torch.float16) -> Tensor:
    """Round every group to its grid without error feedback."""
    parts = []
    for group in W.split(group_size, dim=1):
        scale, zero = stored_grid(group, 2**bits - 1, scale_dtype)
        code = torch.clamp(torch.round(group / scale[:, None] + zero[:, None]), 0, 2**bits - 1)
        parts.append(scale[:, None] * (code - zero[:, None]))
    return torch.cat(parts, dim=1)


def relative_error(Q: Tensor, W: Tensor, H: Tensor) -> float:
    """tr(E H Eᵀ) / tr(W H Wᵀ) in float64."""
    Q, W, H = Q.double(), W.double(), H.double()
    E = W - Q
    return float(((E @ H) * E).sum() / ((W @ H) * W).sum())
