"""Hessians of layer inputs and the Cholesky factor of their inverse."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from evopress.errors import EvoPressError
from evopress.machine import has_half_products


def panels(columns: int) -> Iterator[tuple[int, int]]:
    """Split the rows of a symmetric matrix into panels that products run well on: eight where it is wide."""
    width = max(columns // 8, 192)
    for start in range(0, columns, width):
        yield start, min(start + width, columns)


def multiplies_exactly(X: Tensor) -> bool:
    """Tell whether `add_product` takes inputs of this dtype and device as they are, without float32 copies."""
    if X.device.type == "cuda":
        return X.dtype in (torch.bfloat16, torch.float16) and _gives_float32(X.device, X.dtype)
    return X.device.type == "cpu" and X.dtype == torch.bfloat16 and _splits_products()


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add leftᵀ right to `total`, float32 [A, B], for left [T, A] and right [T, B] of one dtype.

    Half-precision products are exact in float32, in which processors sum them; what would lose their last bits is that the result
    has the inputs' dtype. A GPU can be asked for float32. On a CPU a second product, from which the rounded first one is
    taken before it is rounded itself, brings the lost bits back: 17 of float32's 24, an error of about 5e-6 √(H_aa H_bb), where
    float32 sums of as many terms are off by about 1e-6. Two such products take half of the time of one in float32.
    """
    if not multiplies_exactly(left):
        total.addmm_(left.T, right)
    elif left.device.type == "cuda":
        total.add_(torch.mm(left.T, right, out_dtype=torch.float32))
    else:
        rounded, rest = _in_two(left, right)
        total.add_(rounded).add_(rest)


def _in_two(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Return leftᵀ right as a rounded product and what the rounding lost, both in the inputs' dtype."""
    rounded = left.T @ right
    return rounded, torch.addmm(rounded, left.T, right, beta=-1.0)


@functools.cache
def _splits_products() -> bool:
    """Tell whether this CPU has bfloat16 products (else they are slower than float32), and they round their sums only once."""
    if not has_half_products():
        return False
    X = torch.randn(1024, 256, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    rounded, rest = _in_two(X, X)
    found = rounded.double() + rest.double()
    exact = X.double().T @ X.double()
    return bool((found - exact).abs().max() < 2.0**-15 * exact.diagonal().max())


@functools.cache
def _gives_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Tell whether a GPU's library returns half-precision products in float32 (ROCm's and older ones do not)."""
    X = torch.ones(16, 16, dtype=dtype, device=device)
    try:
        return torch.mm(X, X, out_dtype=torch.float32).dtype == torch.float32
    except (RuntimeError, TypeError):
        return False


class SingularHessianError(EvoPressError):
    """A Hessian that no damping makes positive definite; the caller adds the unit's name."""


class ProductSum:
    """Accumulate leftᵀ right over batches, in float32; see `add_product` for what that means for bfloat16 inputs."""

    def __init__(self, left: int, right: int, *, device: torch.device | str = "cpu") -> None:
        self.total = torch.zeros(left, right, dtype=torch.float32, device=device)
        """float32 [A, B]."""
        self.num_sequences = 0

    @property
    def widths(self) -> tuple[int, ...]:
        """What such a sum is made with."""
        return tuple(self.total.shape)

    def add_both(self, left: Tensor, right: Tensor) -> None:
        """Add a batch: left [b, ..., A] and right [b, ..., B], b sequences, any floating dtypes."""
        rows, columns = (each.reshape(-1, each.shape[-1]) for each in (left, right))
        if not multiplies_exactly(columns):
            rows, columns = rows.to(torch.float32), columns.to(torch.float32)
        add_product(self.total, rows, columns)
        self.num_sequences += right.shape[0]

    def join(self, other: ProductSum) -> None:
        """Add another sum, of further sequences."""
        self.total += other.total
        self.num_sequences += other.num_sequences


class HessianSum(ProductSum):
    """Accumulate H = 2 X Xᵀ / n over batches; of `total`, what is left of the diagonal's panel is not there.

    Source: GPTQ, section 3.1 (arXiv:2210.17323); n counts sequences as in the authors' code. Methods do not depend on H's scale,
    but for how much they damp where columns were never active.
    """

    def __init__(self, columns: int, *, device: torch.device | str = "cpu") -> None:
        super().__init__(columns, columns, device=device)

    @property
    def widths(self) -> tuple[int, ...]:
        return (len(self.total),)

    def add(self, X: Tensor) -> None:
        """Add a batch of layer inputs [b, ..., C], b sequences, any floating dtype."""
        rows = X.reshape(-1, X.shape[-1])
        if not multiplies_exactly(rows):
            rows = rows.to(torch.float32)
        for start, end in panels(len(self.total)):  # H is symmetric: what lies left of a panel's diagonal is in an earlier one
            add_product(self.total[start:end, start:], rows[:, start:end], rows[:, start:])
        self.num_sequences += X.shape[0]

    @classmethod
    def together(cls, sums: Sequence[HessianSum]) -> HessianSum:
        """Return one sum of several, as if their inputs were those of one layer; they are left as they are."""
        total = cls(len(sums[0].total), device=sums[0].total.device)
        for each in sums:
            total.total += each.total
            total.num_sequences = max(total.num_sequences, each.num_sequences)
        return total

    @property
    def finite(self) -> bool:
        """Tell whether all sums so far are finite; no product exceeds the diagonal's."""
        return bool(torch.isfinite(self.total.diagonal()).all())

    def result(self) -> Tensor:
        """Return H, float32 [C, C].

        Raises: EvoPressError if an activation was not finite, or too large to be squared.
        """
        if not self.finite:
            raise EvoPressError(
                "its input activations are not finite, or too large to be squared: load the model in bfloat16 or float32 "
                "(model.dtype), or check its weights"
            )
        H = self.total * (2.0 / max(self.num_sequences, 1))
        for start, end in panels(len(H)):
            H[end:, start:end] = H[start:end, end:].T
        return H


def inverse_factor(H: Tensor, *, damping: float) -> tuple[Tensor, float]:
    """Return the upper Cholesky factor U of the damped inverse, H⁻¹ = Uᵀ U, and the damping that it took.

    Columns that were never active (H[c, c] = 0) get a unit diagonal, which counts in the mean, as in GPTQ; their weights must be 0.

    Args:
        H: float32 [C, C], undamped; left as it is.
        damping: share of H's mean diagonal added to the diagonal, in (0, 1); ten times more at each further attempt.

    Returns: U float32 [C, C], upper triangular, and the share used.
    Raises: SingularHessianError after four tries; EvoPressError if H is not finite.
    """
    for damped, share in _damped(H, damping):
        # J the reversal of rows: J H J = L Lᵀ, so H = (J L J) (J L J)ᵀ and U = (J L J)⁻¹ = J L⁻¹ J: one factorisation, not two.
        L, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not int(failed):
            U = _inverse_lower(L).flip(0, 1)
            if bool(torch.isfinite(U).all()):
                return U, share
    raise _singular(share)


def damp(H: Tensor, *, damping: float) -> tuple[Tensor, float]:
    """Return H with the damping that makes it positive definite, and that share; see `inverse_factor`."""
    for damped, share in _damped(H, damping):
        if not int(torch.linalg.cholesky_ex(damped).info):
            return damped, share
    raise _singular(share)


def _damped(H: Tensor, damping: float) -> Iterator[tuple[Tensor, float]]:
    """Yield H damped, float32 [C, C], and the share of its mean diagonal that was added, ten times more at each attempt."""
    diagonal = H.diagonal()
    dead = diagonal == 0
    mean = float(torch.where(dead, torch.ones_like(diagonal), diagonal).mean())
    if not math.isfinite(mean):
        raise EvoPressError("its Hessian is not finite: check the model's activations on the calibration text")
    share = damping
    for _ in range(4):
        damped = H.clone()
        damped.diagonal()[dead] = 1.0
        damped.diagonal().add_(share * mean)
        yield damped, share
        share *= 10.0


def _singular(share: float) -> SingularHessianError:
    return SingularHessianError(
        f"its Hessian has no Cholesky factor even with damping {share:g} of the mean diagonal: use more calibration tokens "
        "or a larger method.damping"
    )


def _inverse_lower(L: Tensor) -> Tensor:
    """Invert a lower triangular matrix [C, C] by halves: most of the work is in products."""
    columns = len(L)
    if columns <= 128:
        return torch.linalg.solve_triangular(L, torch.eye(columns, dtype=L.dtype, device=L.device), upper=False)
    half = columns // 2
    inverse = torch.zeros_like(L)
    inverse[:half, :half] = top = _inverse_lower(L[:half, :half])
    inverse[half:, half:] = bottom = _inverse_lower(L[half:, half:])
    inverse[half:, :half] = -(bottom @ (L[half:, :half] @ top))
    return inverse
