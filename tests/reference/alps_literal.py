"""ALPS' iterations as its paper writes them, over-relaxed: a linear system a step, kept weights D and dual V apart. Slow."""

import numpy as np


def alps_literal(W: np.ndarray, H: np.ndarray, counts: list[int], *, damping: float = 0.01):
    """Prune one weight [R, C] to each of `counts` kept weights, descending; return the pruned weights and masks, float64 and bool.

    The walk from count to count is at ρ = 0.5; what is returned has gone two steps further from there, at ρ = 0.7 and 1.
    """
    W = W.astype(np.float64).copy()
    H = H.astype(np.float64).copy()
    dead = np.diag(H) == 0
    W[:, dead] = 0.0
    H[dead, dead] = 1.0
    H += damping * np.mean(np.diag(H)) * np.eye(len(H))
    scale = np.sqrt(np.diag(H))
    H = H / np.outer(scale, scale)
    W = W * scale
    D, V = W, np.zeros_like(W)
    results = []
    for index, count in enumerate(counts):
        for _ in range(2 if index else 6):
            D, V, _ = step(W, H, D, V, 0.5, count)
        last, dual = D, V
        for rho in (0.7, 1.0):
            last, dual, mask = step(W, H, last, dual, rho, count)
        results.append((last / scale, mask))
    return results


def step(W: np.ndarray, H: np.ndarray, D: np.ndarray, V: np.ndarray, rho: float, count: int):
    """One iteration: X = (H + ρI)⁻¹ (H W - V + ρ D), relaxed; D = the `count` largest of X + V/ρ; V += ρ (X - D)."""
    X = np.linalg.solve(H + rho * np.eye(len(H)), (W @ H - V + rho * D).T).T
    X = 1.6 * X - 0.6 * D
    target = X + V / rho
    order = sorted((abs(target[r, c]), r, c) for r in range(len(W)) for c in range(len(H)))
    mask = np.ones(W.shape, dtype=bool)
    for _, r, c in order[: W.size - count]:
        mask[r, c] = False
    D = np.where(mask, target, 0.0)
    return D, V + rho * (X - D), mask
