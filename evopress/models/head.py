"""A model's head: from last hidden states to logits.

Shapes: T tokens, d hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Head:
    """The projection from last hidden states to logits, scaled or softly capped where the model's are."""

    weight: Tensor
    """[V, d], the model's dtype."""
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0

    def logits(self, hidden: Tensor) -> Tensor:
        """Return float32 logits [..., V] of last hidden states [..., d]; the product runs in the model's dtype."""
        return self.scores(hidden).float()

    def scores(self, hidden: Tensor) -> Tensor:
        """Return the logits [..., V] of last hidden states [..., d] in the model's dtype."""
        return self._capped(nn.functional.linear(hidden, self.weight, self.bias))

    def logits_of(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Return float32 logits [T, k] of k tokens int64 [T, k] only, from last hidden states [T, d].

        Each takes a row of the weight, of which no more are there at a time than take what all T V logits would.
        """
        few = max(len(tokens) * len(self.weight) // max(tokens.shape[-1] * hidden.shape[-1], 1), 1)
        parts = zip(hidden.split(few), tokens.split(few), strict=True)
        logits = torch.cat([torch.einsum("td,tkd->tk", states, self.weight[rows]) for states, rows in parts])
        return self._capped(logits if self.bias is None else logits + self.bias[tokens]).float()

    def _capped(self, logits: Tensor) -> Tensor:
        logits = logits if self.scale == 1.0 else logits * self.scale
        return torch.tanh(logits / self.softcap) * self.softcap if self.softcap else logits


def softcap_of(config: Any) -> float | None:
    """Return what a model's logits are capped at, softly; None: they are not."""
    keys = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    return next((float(cap) for key in keys if (cap := getattr(config, key, None))), None)


def scale_of(config: Any) -> float:
    """Return what a model's logits are multiplied by before they are capped."""
    for key in ("logit_scale", "lm_head_multiplier", "output_multiplier"):  # Cohere, Falcon H1, Muse
        if isinstance(scale := getattr(config, key, None), (int, float)):
            return float(scale)
    if isinstance(scale := getattr(config, "logits_scaling", None), (int, float)) and scale:
        return float(scale) if config.model_type == "hyperclovax" else 1.0 / float(scale)  # Granite divides by it
    if isinstance(base := getattr(config, "dim_model_base", None), int):  # MiniCPM 3
        return base / int(config.hidden_size)
    return 1.0
