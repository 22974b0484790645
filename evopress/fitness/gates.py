"""Gates on what is compressed whole: of a module that can be dropped, and of a head whose levels are units.

Shapes: b sequences, T tokens, d hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from evopress.models.head import Head


class Gate:
    """Collects the derivative in s of what a module adds, (1 - s) times its output, on each sequence."""

    def __init__(self, closed: bool, num_sequences: int) -> None:
        self.closed, self.num_sequences = closed, num_sequences
        self.held = torch.zeros(num_sequences, dtype=torch.float64)
        """Of the last way back, [b]."""
        self.zeros: Tensor | None = None
        """What a closed gate lets through, before anything is added to it; its gradient is for `take`."""
        self._output: Tensor | None = None

    def forward(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> Any:
        """See `register_forward_hook`."""
        added = output[0] if isinstance(output, tuple) else output
        self._output = added.detach().clone()  # Falcon adds to what it is handed in place
        if not self.closed:
            added.register_hook(self.take)
            return output
        self.zeros = torch.zeros_like(added).requires_grad_()
        through = self.zeros + 0  # no leaf, which nothing may be added to in place
        return (through, *output[1:]) if isinstance(output, tuple) else through

    def take(self, gradient: Tensor) -> None:
        """Take the gradient of what is added."""
        assert self._output is not None
        self.held = -(gradient.float() * self._output.float()).reshape(self.num_sequences, -1).sum(1).double()


@dataclass(frozen=True)
class GatedHead(Head):
    """A head whose difference to the dense one is multiplied by a gate a token, float32 [T, 1] of ones."""

    delta: Tensor | None = None
    """[V, d]."""
    gate: Tensor | None = None

    def scores(self, hidden: Tensor) -> Tensor:
        assert self.delta is not None and self.gate is not None
        logits = nn.functional.linear(hidden, self.weight, self.bias)
        return self._capped(logits + (self.gate - 1) * nn.functional.linear(hidden, self.delta))

    def logits_of(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        assert self.delta is not None and self.gate is not None
        logits = torch.einsum("td,tkd->tk", hidden, self.weight[tokens])
        logits = logits + (self.gate - 1) * torch.einsum("td,tkd->tk", hidden, self.delta[tokens])
        return self._capped(logits if self.bias is None else logits + self.bias[tokens]).float()
