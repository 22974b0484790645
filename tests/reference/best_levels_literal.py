"""`recipe=best` as its sources say it: one row, one bit width, one weight at a time, everything computed anew, in float64."""

from __future__ import annotations

import math

import torch
from gptq_literal import inverse_cholesky
from torch import Tensor


def order_literal(H: Tensor, group_size: int) -> list[int]:
    """Groups by mean diagonal, falling; inside a group columns by theirs."""
    diagonal = H.diagonal().tolist()
    groups = [list(range(start, start + group_size)) for start in range(0, len(diagonal), group_size)]
    groups.sort(key=lambda group: -math.fsum(diagonal[c] for c in group))
    return [c for group in groups for c in sorted(group, key=lambda c: -diagonal[c])]


def range_literal(
    w: list[float], weights: list[float], bits: int, *, num_ranges: int, scale_dtype: torch.dtype, symmetric: bool = False
) -> tuple[float, float]:
    """Scale and zero with the least Σ weight · (w - rounded)² among ranges that shrink in equal steps."""
    maxq = 2**bits - 1
    least = 1.0 - 1.2 / math.sqrt(maxq + 1)
    found = (math.inf, 1.0, 0.0)
    for i in range(num_ranges):
        part = 1.0 - i / (num_ranges - 1) * (1.0 - least)
        low, high = part * min(w), part * max(w)
        if symmetric:
            reach = max(abs(low), abs(high))
            low, high = -reach, reach
        scale = float(torch.tensor((high - low) / maxq).to(scale_dtype))
        zero = (maxq + 1) // 2 if symmetric else round(-low / scale)
        rounded = [scale * (min(max(round(x / scale) + zero, 0), maxq) - zero) for x in w]
        cost = math.fsum(h * (x - q) ** 2 for h, x, q in zip(weights, w, rounded, strict=True))
        if cost < found[0]:
            found = (cost, scale, float(zero))
    return found[1], found[2]


def energy(e: Tensor, H: Tensor) -> float:
    """e H eᵀ."""
    return float(e @ H @ e)


def descend_literal(
    w: Tensor,
    H: Tensor,
    codes: list[float],
    scales: list[float],
    zeros: list[float],
    bits: int,
    *,
    tolerance: float,
    max_passes: int,
    scale_dtype: torch.dtype,
) -> None:
    """Move each code, then its group's scale, to where e H eᵀ is least, pass after pass; `codes` and `scales` are overwritten."""
    count, maxq = len(codes), 2**bits - 1
    group_size = count // len(scales)

    def error() -> Tensor:
        decoded = [scales[c // group_size] * (codes[c] - zeros[c // group_size]) for c in range(count)]
        return w - torch.tensor(decoded, dtype=torch.float64)

    before = energy(error(), H)
    for _ in range(max_passes):
        for g in range(len(scales)):
            group = range(g * group_size, (g + 1) * group_size)
            for c in group:
                if H[c, c] <= 0:
                    continue
                slope = float(H[c] @ error())
                wanted = codes[c] - zeros[g] + slope / float(H[c, c]) / scales[g]
                codes[c] = float(min(max(round(wanted), -zeros[g]), maxq - zeros[g]) + zeros[g])
            steps = torch.zeros(count, dtype=torch.float64)
            for c in group:
                steps[c] = codes[c] - zeros[g]
            curvature = float(steps @ H @ steps)
            if curvature > 0:
                wanted = scales[g] + float(steps @ H @ error()) / curvature
                stored = float(torch.tensor(wanted).to(scale_dtype))
                kept, old = scales[g], energy(error(), H)
                if stored > 0 and math.isfinite(stored):
                    scales[g] = stored
                    if energy(error(), H) >= old:
                        scales[g] = kept
        after = energy(error(), H)
        if before - after <= tolerance * before:
            return
        before = after


def best_literal(
    W: Tensor,
    H: Tensor,
    *,
    bits: int,
    group_size: int,
    num_ranges: int,
    damping: float = 0.01,
    tolerance: float = 0.02,
    max_passes: int = 8,
    scale_dtype: torch.dtype = torch.float16,
    symmetric: bool = False,
) -> Tensor:
    """Return the dequantized weight [R, C]."""
    order = order_literal(H, group_size)
    W, H = W.double()[:, order], H.double()[order][:, order]
    W[:, H.diagonal() == 0] = 0.0
    U = inverse_cholesky(H, damping)
    maxq, columns = 2**bits - 1, W.shape[1]
    decoded = torch.zeros_like(W)
    for r, row in enumerate(W):
        w = row.clone()
        codes, scales, zeros = [0.0] * columns, [], []
        for c in range(columns):
            if c % group_size == 0:
                group = range(c, c + group_size)
                weights = [float(U[i, i]) ** -2 for i in group]
                scale, zero = range_literal(
                    [float(w[i]) for i in group],
                    weights,
                    bits,
                    num_ranges=num_ranges,
                    scale_dtype=scale_dtype,
                    symmetric=symmetric,
                )
                scales.append(scale)
                zeros.append(zero)
            codes[c] = float(min(max(round(float(w[c]) / scale) + zero, 0), maxq))
            w[c:] -= (w[c] - scale * (codes[c] - zero)) / U[c, c] * U[c, c:]
        descend_literal(row, H, codes, scales, zeros, bits, tolerance=tolerance, max_passes=max_passes, scale_dtype=scale_dtype)
        for c in range(columns):
            g = c // group_size
            decoded[r, order[c]] = scales[g] * (codes[c] - zeros[g])
    return decoded
