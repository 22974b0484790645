"""Hessians of layer inputs and the Cholesky factor of their inverse."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from evopress.errors import EvoPressError


class SingularHessianError(EvoPressError):
    """A Hessian that no damping makes positive definite; the caller adds the unit's name."""


class HessianSum:
    """Accumulate H = 2 X Xᵀ / n over batches, in float32.

    Source: GPTQ, section 3.1 (arXiv:2210.17323); n counts sequences as in the authors' code. Methods do not depend on H's scale.
    """

    def __init__(self, columns: int, *, device: torch.device | str = "cpu") -> None:
        self._sum = torch.zeros(columns, columns, dtype=torch.float32, device=device)
        self.num_sequences = 0

    def add(self, X: Tensor) -> None:
        """Add a batch of layer inputs [b, ..., C], b sequences, any floating dtype."""
        rows = X.reshape(-1, X.shape[-1]).to(torch.float32)
        for start, end in self._panels():  # H is symmetric: what lies left of a panel's diagonal is in an earlier one
            self._sum[start:end, start:].addmm_(rows[:, start:end].T, rows[:, start:])
        self.num_sequences += X.shape[0]

    def _panels(self) -> Iterator[tuple[int, int]]:
        """Split the rows of H into panels that products run well on: eight where it is wide."""
        columns = len(self._sum)
        width = max(columns // 8, 192)
        for start in range(0, columns, width):
            yield start, min(start + width, columns)

    @property
    def finite(self) -> bool:
        """Tell whether all sums so far are finite; no product exceeds the diagonal's."""
        return bool(torch.isfinite(self._sum.diagonal()).all())

    def result(self) -> Tensor:
        """Return H, float32 [C, C].

        Raises: EvoPressError if an activation was not finite, or too large to be squared.
        """
        if not self.finite:
            raise EvoPressError(
                "its input activations are not finite, or too large to be squared: load the model in bfloat16 or float32 "
                "(model.dtype), or check its weights"
            )
        H = self._sum * (2.0 / max(self.num_sequences, 1))
        for start, end in self._panels():
            H[end:, start:end] = H[start:end, end:].T
        return H


def inverse_factor(H: Tensor, *, damping: float, attempts: int = 4) -> tuple[Tensor, float]:
    """Return the upper Cholesky factor U of the damped inverse, H⁻¹ = Uᵀ U, and the damping that it took.

    Columns that were never active (H[c, c] = 0) get a unit diagonal, as in GPTQ; their weights must be zero.

    Args:
        H: float32 [C, C], undamped; left as it is.
        damping: share of H's mean diagonal added to the diagonal, in (0, 1); ten times more at each further attempt.

    Returns: U float32 [C, C], upper triangular, and the share used.
    Raises: SingularHessianError after `attempts` tries; EvoPressError if H is not finite.
    """
    diagonal = H.diagonal()
    dead = diagonal == 0
    mean = float(torch.where(dead, torch.ones_like(diagonal), diagonal).mean())
    if not math.isfinite(mean):
        raise EvoPressError("its Hessian is not finite: check the model's activations on the calibration text")
    share = damping
    for _ in range(attempts):
        damped = H.clone()
        damped.diagonal()[dead] = 1.0
        damped.diagonal().add_(share * mean)
        L, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            inverse = torch.cholesky_inverse(L)
            U, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not int(failed) and bool(torch.isfinite(U).all()):
                return U, share
        share *= 10.0
    raise SingularHessianError(
        f"its Hessian has no Cholesky factor even with damping {share / 10.0:g} of the mean diagonal: use more calibration tokens "
        "or a larger method.damping"
    )
