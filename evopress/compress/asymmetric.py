"""Asymmetric calibration: weights that make good what the inputs of the compressed model have lost.

Source: GPTAQ (arXiv:2504.02692). A compressor approximates W on the inputs x̂ that reach it. What the dense model has there is W x
of its own inputs x, and where that is added to a stream r, the compressed model's r̂ is another one too. The weight with
Σ ‖r̂ + V x̂ - (r + W x)‖² least is V = W + (W D + E) H⁻¹, where D = Σ (x - x̂) x̂ᵀ, E = Σ (r - r̂) x̂ᵀ, H = Σ x̂ x̂ᵀ. What compresses V
loses tr((V - Q) H (V - Q)ᵀ) more than that least, so every compressor takes V in W's place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from evopress.compress.hessian import HessianSum, ProductSum, damp
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

    def __init__(self, sums: Mapping[str, ProductSum] | None = None) -> None:
        """Go on from sums, those that another one has."""
        self.sums = dict(sums or {})

    def add(self, dense: Seen, compressed: Seen) -> None:
        """Add what the two models have of the same tokens."""
        X = compressed.inputs
        if "own" not in self.sums:
            self.sums["own"] = HessianSum(X.shape[-1], device=X.device)
        own = self.sums["own"]
        assert isinstance(own, HessianSum)
        own.add(X)
        self._add("inputs", dense.inputs - X, X)
        if dense.stream is not None and compressed.stream is not None:
            self._add("stream", dense.stream - compressed.stream, X)

    def _add(self, name: str, apart: Tensor, X: Tensor) -> None:
        if name not in self.sums:
            self.sums[name] = ProductSum(apart.shape[-1], X.shape[-1], device=X.device)
        self.sums[name].add_both(apart, X)

    def result(self) -> Lost:
        """Return the sums.

        Raises: EvoPressError if an activation was not finite, or too large to be squared.
        """
        own, stream = self.sums["own"], self.sums.get("stream")
        assert isinstance(own, HessianSum)
        scale = 2.0 / max(own.num_sequences, 1)
        return Lost(own.result(), self.sums["inputs"].total * scale, None if stream is None else stream.total * scale)


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
        raise EvoPressError("its correction for compressed inputs is not finite: set refine.correction or method.correction to 0")
    return V.to(W.dtype)
