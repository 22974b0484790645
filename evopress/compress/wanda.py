"""Wanda: each output keeps the weights whose input matters most, as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from evopress.compress.compressor import Compressed, with_errors
from evopress.compress.sparse import Sparse, SparsityLevels, distribute, runs, to_float32


@dataclass(frozen=True, kw_only=True)
class Wanda(SparsityLevels):
    """Prune weights to several sparsities by |w| · ‖x‖."""

    def settings(self) -> dict[str, Any]:
        """Return what decides the result."""
        return asdict(self) | {"compressor": "wanda", "numerics": 1}

    def prune(self, weights: Mapping[str, Tensor], H: Tensor, kept: Mapping[str, Sequence[int]]) -> dict[str, Sequence[Compressed]]:
        """Prune weights that share one input to any numbers of kept weights; see `wanda`."""
        return wanda(weights, H, kept)


def wanda_scores(W: Tensor, H: Tensor) -> Tensor:
    """Return |w| · √(H_cc), float32 [R, C]: |w| · ‖x_c‖ but for a factor that all weights share.

    Args: W float32 [R, C], H float32 [C, C].
    """
    return W.abs() * H.diagonal().sqrt()


def wanda(weights: Mapping[str, Tensor], H: Tensor, kept: Mapping[str, Sequence[int]]) -> dict[str, Sequence[Compressed]]:
    """Prune the lowest |w| · ‖x‖ within each row, unchanged otherwise; among equal ones the earlier column.

    Source: Wanda (arXiv:2306.11695). Rows prune equally many weights, but for one where the unit's exact count asks for it.

    Args and result: as `sparsegpt`.
    """
    results: dict[str, Sequence[Compressed]] = {}
    for name, W in to_float32(weights, H.device).items():
        rows, columns = W.shape
        original = weights[name].to(H.device)
        first_kept = [torch.tensor(distribute(W.numel() - count, [columns] * rows), device=W.device) for count in kept[name]]
        masks = [torch.empty(W.shape, dtype=torch.bool, device=W.device) for _ in first_kept]
        for run in runs(W):
            ranks = _ranks(wanda_scores(W[run], H))
            for mask, first in zip(masks, first_kept, strict=True):
                torch.ge(ranks, first[run].unsqueeze(1), out=mask[run])
        payloads = [Sparse.of(original, mask, original.dtype) for mask in masks]
        results[name] = with_errors(payloads, W, H)
    return results


def _ranks(scores: Tensor) -> Tensor:
    """Return the place of each score among those of its row, int64 [R, C], the lowest first, the earlier among equal ones."""
    order = scores.argsort(dim=1, stable=True)
    return torch.empty_like(order).scatter_(1, order, torch.arange(scores.shape[1], device=scores.device).expand_as(order))
