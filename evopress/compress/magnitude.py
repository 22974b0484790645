"""Magnitude pruning: each unit keeps its largest weights as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from evopress.compress.compressor import Compressed, with_errors
from evopress.compress.sparse import Sparse, SparsityLevels, lowest, to_float32


@dataclass(frozen=True, kw_only=True)
class Magnitude(SparsityLevels):
    """Prune weights to several sparsities by their magnitude."""

    def settings(self) -> dict[str, Any]:
        """Return what decides the result."""
        return asdict(self) | {"compressor": "magnitude", "numerics": 1}

    def prune(self, weights: Mapping[str, Tensor], H: Tensor, kept: Mapping[str, Sequence[int]]) -> dict[str, Sequence[Compressed]]:
        """Prune weights that share one input to any numbers of kept weights; see `magnitude`."""
        return magnitude(weights, H, kept)


def magnitude(weights: Mapping[str, Tensor], H: Tensor, kept: Mapping[str, Sequence[int]]) -> dict[str, Sequence[Compressed]]:
    """Keep the weights of greatest |w| over a whole unit, unchanged; among equal ones the later index.

    Args and result: as `sparsegpt`; H serves the errors only.
    """
    results: dict[str, Sequence[Compressed]] = {}
    for name, W in to_float32(weights, H.device).items():
        scores = W.abs().reshape(-1)
        masks = [~lowest(scores, W.numel() - count).reshape(W.shape) for count in kept[name]]
        original = weights[name].to(H.device)
        results[name] = with_errors([Sparse.of(original, mask, original.dtype) for mask in masks], W, H)
    return results
