"""SparseGPT at many sparsities in one column sweep, the paper's levels; and what `recipe=best` puts in its place, see `alps`.

Rows are independent given the Hessian's factor and their mask, so the rows of every unit on one input, times every level, are
stacked and swept together, as in `gptq`; a mask is chosen per unit, level and block of columns. W is held transposed, [C, R], so
that a column is contiguous.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from evopress.compress.alps import regularized, walk
from evopress.compress.columns import lowest_of_each, prune_run, run_length
from evopress.compress.compressor import Compressed, Working, check_numbers, sweep_bytes, with_errors
from evopress.compress.hessian import damp, inverse_factor
from evopress.compress.sparse import Sparse, SparsityLevels, distribute, packed, to_float32, unpacked
from evopress.errors import EvoPressError

RECIPES = ("paper", "best")


@dataclass(frozen=True, kw_only=True)
class SparseGPT(SparsityLevels):
    """Prune weights to several sparsities, those left making up for those pruned: `sparsegpt` or `alps_levels` around a target."""

    recipe: str = "paper"
    """paper (`sparsegpt`) or best (`alps_levels`)."""

    damping: float = 0.01
    """Share of H's mean diagonal added to its diagonal, in (0, 1)."""
    block_size: int = 128
    """recipe=paper: columns that are masked together, and per lazy update."""
    slice_bytes: int | None = None
    """recipe=paper: working memory of one sweep; what does not fit is swept in slices, no less than one level of one unit at a
    time. Changes the result only by rounding. None: see `sweep_bytes`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(damping=self.damping, block_size=self.block_size)
        if self.recipe not in RECIPES:
            raise EvoPressError(f"method.recipe={self.recipe} is unknown: choose {' or '.join(RECIPES)}")

    def settings(self) -> dict[str, Any]:
        """Return what decides the result; those of recipe=paper are what they were before there were recipes."""
        settings = asdict(self)
        del settings["slice_bytes"], settings["recipe" if self.recipe == "paper" else "block_size"]
        return settings | {"compressor": "sparsegpt", "numerics": 1}

    @property
    def working(self) -> Working:
        """See `Working`: inverses at every ρ and a unit at a time, or slices of whole units."""
        forms: dict[str, Any] = {"unpacked": unpacked, "packed": packed}
        if self.recipe == "best":
            return Working(factoring=6.5, sweeping=4.0, per_weight=32, cut_by=2**62, whole_units=True, **forms)
        block = (self.block_size, 10)  # scores, errors, and masks, twice
        return Working(factoring=4.5, sweeping=1.0, per_weight=5, block=block, left=5, cut_by=5, whole_units=True, **forms)

    def prune(self, weights: Mapping[str, Tensor], H: Tensor, kept: Mapping[str, Sequence[int]]) -> dict[str, Sequence[Compressed]]:
        """Prune weights that share one input to any numbers of kept weights; see `sparsegpt` and `alps_levels`."""
        if self.recipe == "best":
            return alps_levels(weights, H, kept, damping=self.damping)
        return sparsegpt(weights, H, kept, damping=self.damping, block_size=self.block_size, slice_bytes=self.slice_bytes)


def sparsegpt(
    weights: Mapping[str, Tensor],
    H: Tensor,
    kept: Mapping[str, Sequence[int]],
    *,
    damping: float = 0.01,
    block_size: int = 128,
    slice_bytes: int | None = None,
) -> dict[str, Sequence[Compressed]]:
    """Prune weights that share one input to any numbers of kept weights, those left making up for those pruned.

    Source: SparseGPT (arXiv:2301.00774), Algorithm 1, unstructured. Differs from the authors' code: counts are exact, so ties are
    broken by index (column, then row) and rounding is carried from block to block. Columns never activated are zeroed
    and pruned first. A weight kept whole is W bit for bit, one pruned whole is 0.

    Args:
        weights: unit name to weight [R, C]; left as they are. C is the same for all.
        H: Hessian of their input, float32 [C, C], undamped; left as it is.
        kept: unit name to the weights to keep, each in 0..size, in any order.

    Returns: unit name to one result per entry of `kept`.
    Raises: SingularHessianError if no damping makes H positive definite; EvoPressError if a weight is not finite.
    """
    U, used_damping = inverse_factor(H, damping=damping)
    originals, payloads = _begun(weights, H, kept)
    jobs = [(name, count) for name in weights for count in dict.fromkeys(kept[name]) if count not in payloads[name]]
    room = rows_within(sweep_bytes(H.device) if slice_bytes is None else slice_bytes, H.shape[0], block_size=block_size)
    for part in _slices(jobs, {name: len(W) for name, W in originals.items()}, room):
        Wt = torch.cat([originals[name].T for name, _ in part], dim=1)  # [C, stacked rows]
        rows = [len(originals[name]) for name, _ in part]
        mask = sweep(Wt, U, rows, [count for _, count in part], block_size=block_size)
        for (name, count), w, m in zip(part, Wt.split(rows, dim=1), mask.split(rows, dim=1), strict=True):
            payloads[name][count] = Sparse.of(w.T, m.T.contiguous(), weights[name].dtype)
    return {
        name: with_errors([payloads[name][count] for count in kept[name]], originals[name], H, damping=used_damping, name=name)
        for name in weights
    }


def alps_levels(
    weights: Mapping[str, Tensor], H: Tensor, kept: Mapping[str, Sequence[int]], *, damping: float = 0.01
) -> dict[str, Sequence[Compressed]]:
    """Prune weights that share one input to any numbers of kept weights, mask and values by `alps.walk`.

    Levels of a unit are made from the densest to the sparsest, each from where the last one led. Columns never activated are zeroed
    and pruned first. A weight kept whole is W bit for bit, one pruned whole is 0.

    Args, result and errors: as `sparsegpt`.
    """
    damped, used_damping = damp(H, damping=damping)
    originals, payloads = _begun(weights, H, kept)
    scale, inverses = regularized(damped)
    del damped
    for name, W in originals.items():
        counts = sorted(set(kept[name]) - set(payloads[name]), reverse=True)
        for count, (pruned, mask) in zip(counts, walk(W, scale, inverses, counts), strict=True):
            payloads[name][count] = Sparse.of(pruned, mask, weights[name].dtype)
    return {
        name: with_errors([payloads[name][count] for count in kept[name]], originals[name], H, damping=used_damping, name=name)
        for name in weights
    }


def _begun(
    weights: Mapping[str, Tensor], H: Tensor, kept: Mapping[str, Sequence[int]]
) -> tuple[dict[str, Tensor], dict[str, dict[int, Sparse]]]:
    """Return the weights in float32, 0 where never activated, and by unit and count what is kept or pruned whole.

    Raises: EvoPressError if a weight is not finite or has not as many weights as it is to keep.
    """
    originals = to_float32(weights, H.device)
    dead = H.diagonal() == 0
    payloads: dict[str, dict[int, Sparse]] = {name: {} for name in weights}
    for name, W in originals.items():
        for count in kept[name]:
            if not 0 <= count <= W.numel():
                raise EvoPressError(f"{name} has {W.numel()} weights and cannot keep {count}: choose 0 to {W.numel()}")
            if count in (0, W.numel()):
                mask = torch.full(W.shape, count > 0, device=H.device)
                payloads[name][count] = Sparse.of(weights[name].to(H.device), mask, weights[name].dtype)
        W[:, dead] = 0.0
    return originals, payloads


def rows_within(room: int, columns: int, *, block_size: int = 128) -> int:
    """Return how many stacked rows a sweep takes within some bytes: weights, masks, and a block's scores, factors and errors."""
    return room // (columns * 5 + block_size * 12)


def _slices(jobs: Sequence[tuple[str, int]], rows: Mapping[str, int], room: int) -> Iterator[list[tuple[str, int]]]:
    """Split (unit, kept) pairs into sweeps of at most `room` rows or of one pair."""
    part: list[tuple[str, int]] = []
    for job in jobs:
        if part and sum(rows[name] for name, _ in part) + rows[job[0]] > room:
            yield part
            part = []
        part.append(job)
    if part:
        yield part


def sweep(
    Wt: Tensor, U: Tensor, rows: Sequence[int], kept: Sequence[int], *, block_size: int = 128, inner_size: int | None = None
) -> Tensor:
    """Prune stacked rows column by column, spreading each column's error over the columns still open.

    Source: SparseGPT, Algorithm 1. The masks of a block of `block_size` columns are chosen when the sweep reaches it, over all
    rows of a unit and level together, by the least w² / U_cc². Updates are lazy at two depths, as in `gptq.sweep`.

    Args:
        Wt: float [C, R], transposed stacked weights; overwritten by the pruned ones.
        U: float [C, C], upper Cholesky factor of the damped inverse Hessian.
        rows: rows of each unit and level in Wt, in order; they add up to R.
        kept: weights that each of them keeps.

    Returns: mask bool [C, R], true where a weight is kept.
    """
    columns, device = len(Wt), Wt.device
    inner_size = inner_size or run_length(device)
    starts = range(0, columns, block_size)
    widths = [min(block_size, columns - first) for first in starts]
    shares = [distribute(count * columns - keep, widths) for count, keep in zip(rows, kept, strict=True)]
    counts = torch.tensor(shares, dtype=torch.int32).T.to(device).contiguous()  # [blocks, units and levels]
    rows_of = torch.tensor(rows, dtype=torch.int32, device=device)
    mask = torch.empty(Wt.shape, dtype=torch.bool, device=device)
    diagonal = U.diagonal().unsqueeze(1)  # [C, 1]
    errors = torch.empty(widths[0], Wt.shape[1], dtype=Wt.dtype, device=device)
    for index, first in enumerate(starts):
        end = first + widths[index]
        scores = Wt[first:end].abs().div_(diagonal[first:end])  # square roots of the paper's, in the same order
        pruned = lowest_of_each(scores, rows_of, counts[index])
        factors = torch.div(pruned, diagonal[first:end], out=scores)
        for inner in range(first, end, inner_size):
            inner_end = min(inner + inner_size, end)
            run, own = slice(inner, inner_end), slice(inner - first, inner_end - first)
            prune_run(Wt[run], U[run, run], factors[own], errors=errors[own])
            if inner_end < end:
                Wt[inner_end:end].addmm_(U[run, inner_end:end].T, errors[own], alpha=-1.0)
        if end < columns:
            Wt[end:].addmm_(U[first:end, end:].T, errors[: end - first], alpha=-1.0)
        Wt[first:end].masked_fill_(pruned, 0.0)
        torch.logical_not(pruned, out=mask[first:end])
    return mask
