"""SparseGPT as its paper derives it, column by column, without Cholesky factors or lazy updates. Slow."""

import numpy as np


def sparsegpt_literal(W: np.ndarray, H: np.ndarray, kept: int, *, damping: float = 0.01, block_size: int = 128):
    """Prune one weight [R, C] to `kept` weights; return the pruned weight and the mask, float64 and bool [R, C].

    For each column c, the optimal brain surgeon's inverse is that of the Hessian of the columns still open, H[c:, c:].
    """
    W = W.astype(np.float64).copy()
    H = H.astype(np.float64).copy()
    rows, columns = W.shape
    for c in range(columns):
        if H[c, c] == 0:
            H[c, c] = 1.0
            W[:, c] = 0.0
    H += damping * np.mean(np.diag(H)) * np.eye(columns)
    inverses = [np.linalg.inv(H[c:, c:]) for c in range(columns)]
    mask = np.ones((rows, columns), dtype=bool)
    pruned_so_far = 0
    for first in range(0, columns, block_size):
        end = min(first + block_size, columns)
        pruned_by_then = (rows * columns - kept) * end // columns
        candidates = [(W[r, c] ** 2 / inverses[c][0, 0], c, r) for c in range(first, end) for r in range(rows)]
        for _, c, r in sorted(candidates)[: pruned_by_then - pruned_so_far]:
            mask[r, c] = False
        pruned_so_far = pruned_by_then
        for c in range(first, end):
            for r in range(rows):
                if not mask[r, c]:
                    W[r, c:] -= W[r, c] / inverses[c][0, 0] * inverses[c][0]
                    W[r, c] = 0.0
    return W, mask
