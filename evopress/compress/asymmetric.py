"""Asymmetric calibration: weights that make good what the inputs of the compressed model have lost.

Source: GPTAQ (arXiv:2504.02692). A compressor approximates W on the inputs x̂ that reach it. What the dense model has there is W x
of its own inputs x, and where that is added to a stream r, the compressed model's r̂ is another one too. The weight with
Σ ‖r̂ + V x̂ - (r + W x)‖² least is V = W + (W D + E) H⁻¹, where D = Σ (x - x̂) x̂ᵀ, E = Σ (r - r̂) x̂ᵀ, H = Σ x̂ x̂ᵀ. What compresses V
loses tr((V - Q) H (V - Q)ᵀ) more than that least, so every compressor takes V in W's place.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from evopress.compress.hessian import HessianSum, add_product, damp, multiplies_exactly
from evopress.errors import EvoPressError


@dataclass(frozen=True)
class Seen:
    """What a forward has at a linear."""

    inputs: Tensor
    """[b, ..., C], b sequences, any floating dtype."""
    stream: Tensor | None = None
    """[b, ..., R]: what its output is added to; None: nothing, or it is not known."""


@dataclass(frozen=True)
class Lost:
    """What the compressed model's inputs of a linear have lost, summed over tokens."""

    H: Tensor
    """Σ x̂ x̂ᵀ, float32 [C, C]."""
    D: Tensor
    """Σ (x - x̂) x̂ᵀ, float32 [C, C]."""
    E: Tensor | None
    """Σ (r - r̂) x̂ᵀ, float32 [R, C]; None: its output is added to nothing."""


class PairedSum:
    """Accumulate `Lost` over batches, in float32, times 2 / n as a Hessian is, n the sequences."""

    def __init__(self) -> None:
        self._own: HessianSum | None = None
        self._inputs: Tensor | None = None
        self._stream: Tensor | None = None

    def add(self, dense: Seen, compressed: Seen) -> None:
        """Add what the two models have of the same tokens."""
        if self._own is None:
            self._own = HessianSum(compressed.inputs.shape[-1], device=compressed.inputs.device)
        self._own.add(compressed.inputs)
        self._inputs = _added(self._inputs, dense.inputs - compressed.inputs, compressed.inputs)
        if dense.stream is not None and compressed.stream is not None:
            self._stream = _added(self._stream, dense.stream - compressed.stream, compressed.inputs)

    def result(self) -> Lost:
        """Return the sums.

        Raises: EvoPressError if an activation was not finite, or too large to be squared.
        """
        assert self._own is not None and self._inputs is not None, "nothing was added"
        scale = 2.0 / max(self._own.num_sequences, 1)
        return Lost(self._own.result(), self._inputs * scale, None if self._stream is None else self._stream * scale)


def corrected(W: Tensor, lost: Lost, *, share: float, damping: float) -> Tensor:
    """Return the weight, in W's dtype [R, C], that lies so far on the way from W to V: (1 - share) W + share V.

    The whole way is too far: what inputs have lost is partly noise of this text.

    Args: damping: share of H's mean diagonal added to the diagonal, more where that is not enough.

    Raises: SingularHessianError if no damping makes H positive definite; EvoPressError if V is not finite.
    """
    moved = W.to(torch.float32) @ lost.D
    moved = moved if lost.E is None else moved + lost.E
    factor = torch.linalg.cholesky(damp(lost.H, damping=damping)[0])
    V = W.to(torch.float32) + share * torch.cholesky_solve(moved.T, factor).T
    if not bool(torch.isfinite(V).all()):
        raise EvoPressError("what corrects it for its inputs is not finite: set refine.correction or method.correction to 0")
    return V.to(W.dtype)


def _added(total: Tensor | None, apart: Tensor, inputs: Tensor) -> Tensor:
    """Return a sum with apartᵀ inputs added, rows being tokens."""
    apart, rows = (each.reshape(-1, each.shape[-1]) for each in (apart, inputs))
    if not multiplies_exactly(rows):
        apart, rows = apart.to(torch.float32), rows.to(torch.float32)
    if total is None:
        total = torch.zeros(apart.shape[-1], rows.shape[-1], dtype=torch.float32, device=rows.device)
    add_product(total, apart, rows)
    return total
