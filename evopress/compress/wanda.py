"""Wanda: each output keeps the weights whose input matters most, as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from evopress.compress.compressor import Compressed, with_errors
from evopress.compress.sparse import Sparse, SparsityLevels, distribute, to_float32


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
        order = wanda_scores(W, H).argsort(dim=1, stable=True)
        ranks = torch.empty_like(order).scatter_(1, order, torch.arange(columns, device=W.device).expand(rows, -1))
        original = weights[name].to(H.device)
        payloads = []
        for count in kept[name]:
            pruned = torch.tensor(distribute(W.numel() - count, [columns] * rows), device=W.device)
            payloads.append(Sparse.of(original, ranks >= pruned.unsqueeze(1), original.dtype))
        results[name] = with_errors(payloads, W, H)
    return results
