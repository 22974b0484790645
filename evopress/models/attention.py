"""Causal attention for CPUs: matrix products over runs of queries, each with the keys that it may see.

torch's fused attention runs at a fraction of the matrix-product rate of CPUs with bfloat16 units but no tiles (an AMD EPYC): the
plain products, with the half above the diagonal left out, take a third of its time (512 tokens, head size 64). On a Xeon with tiles
(AMX) the fused one takes half as long as these. Registered with transformers as `causal_chunks`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "causal_chunks"
_QUERIES = 128


def causal_attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
    """Return softmax(scale · Q Kᵀ, causal) V for queries [b, h, l, d] and as many keys and values, [b, h, l, d].

    Scores are in the dtype of the queries, as in transformers' eager attention; the softmax sums in float32.
    """
    length = query.shape[2]
    # The diagonal square of the longest run serves them all.
    above = torch.full((_QUERIES, _QUERIES), -torch.inf, dtype=query.dtype, device=query.device).triu_(1)
    parts = []
    for start in range(0, length, _QUERIES):
        end = min(start + _QUERIES, length)
        scores = torch.matmul(query[:, :, start:end] * scale, key[:, :, :end].transpose(-1, -2))
        scores[..., start:].add_(above[: end - start, : end - start])
        parts.append(torch.matmul(torch.softmax(scores, dim=-1), value[:, :, :end]))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers asks; anything but plain causal attention is left to torch's own."""
    plain = attention_mask is None and is_causal is not False and getattr(module, "is_causal", True)
    if not plain or dropout or query.shape[2] != key.shape[2] or query.is_cuda:
        output: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
        return output
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return causal_attention(query, key, value, scale=scale).transpose(1, 2).contiguous(), None


def suits(device: torch.device | str, dtype: torch.dtype) -> bool:
    """Tell whether plain causal attention is faster in chunks than as torch fuses it: on a CPU, but for bfloat16 tiles."""
    if torch.device(device).type != "cpu":
        return False
    ask: Callable[[], Mapping[str, Any]] = getattr(torch.cpu, "get_capabilities", dict)  # newer versions of torch have it
    capabilities = ask()
    return dtype != torch.bfloat16 or not capabilities.get("amx_bf16", False)


def register() -> str:
    """Make `causal_chunks` known to transformers and return the name."""
    AttentionInterface.register(NAME, _forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME
