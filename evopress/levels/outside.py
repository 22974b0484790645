"""What the levels of the head and of the embedding go by.

The head is a linear whose inputs are the last hidden states, after the final norm. The embedding's inputs are tokens: each row of
its weight is read as it is, as often as its token occurs, so its Hessian is the identity and its error is weighted by row. Where
the two are tied, one weight serves both: its levels are made by the head's Hessian, and both relative errors count.

Shapes: V vocabulary, d hidden size.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from evopress.compress.compressor import Compressed, Compressor
from evopress.models.slots import Slot

_ANY_TOKEN = 0.1
"""Share of the embedding's error that all rows have alike, whether calibration text has their token or not."""


def compress_embedding(slot: Slot, tokens: Tensor, compressor: Compressor, *, H: Tensor | None = None) -> list[Compressed]:
    """Compress an embedding to all levels; a level's error is Σ p |E_v|² / Σ p |W_v|², p each token's share of the text.

    A tied head adds its own relative error, and its Hessian is what the weight is compressed by: that of both sides together, each
    divided by its ‖XW‖², comes out further from the dense model (SmolLM2, 3 bits, all else dense: KL 0.20 against 0.13).

    Args:
        tokens: calibration token ids int64 [N, L].
        H: Hessian of the last hidden states where the head is tied, float32 [d, d]; left as it is.
    """
    shared = torch.eye(slot.weight.shape[1], device=slot.weight.device) if H is None else H
    results = compressor.compress({slot.name: slot.weight}, shared)[slot.name]
    W = slot.weight.to(torch.float32)  # after the compressor has given up its own
    of_head = [0.0 if H is None else result.error for result in results]
    shares = token_shares(tokens, W.shape[0]).to(W.device)
    whole = float(shares @ W.square().sum(1))
    return [
        replace(
            result, error=head + float(shares @ (W - result.payload.decode().to(W)).square_().sum(1)) / whole if whole else head
        )
        for result, head in zip(results, of_head, strict=True)
    ]


def token_shares(tokens: Tensor, vocabulary: int) -> Tensor:
    """Return each token's share of a text, float32 [V], with a tenth given to all tokens alike: unseen ones count a little."""
    counts = torch.bincount(tokens.reshape(-1).cpu(), minlength=vocabulary).to(torch.float32)
    return (1.0 - _ANY_TOKEN) * counts / counts.sum() + _ANY_TOKEN / vocabulary
