"""The plain way: the whole model, one candidate at a time.

The reference that the population evaluator must equal, and the fallback for models whose blocks cannot be called alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from evopress.levels.live import Live
from evopress.units import Genome


class PlainEvaluator:
    """Runs the model's own forward for every candidate."""

    def __init__(self, live: Live, *, max_tokens_in_flight: int = 4096) -> None:
        self.live = live
        self.max_tokens_in_flight = max_tokens_in_flight
        self.known_as: Any = None

    @torch.no_grad()
    def final_states(
        self, genomes: Sequence[Genome | None], ids: Tensor, *, apart: int | None = None
    ) -> tuple[list[int], list[Tensor]]:
        """See `Evaluator.final_states`; states of equal genomes are computed anew."""
        blocks = self.live.blocks
        states = []
        for genome in genomes:
            with self.live.applied(genome):
                parts = [
                    blocks.decoder(input_ids=part.to(blocks.device), use_cache=False).last_hidden_state
                    for part in ids.split(apart or max(self.max_tokens_in_flight // ids.shape[1], 1))
                ]
            states.append(torch.cat(parts))
        return list(range(len(genomes))), states

    def alone(self, num_sequences: int, length: int) -> bool:
        """See `Evaluator`: every genome has forwards of its own."""
        return True
