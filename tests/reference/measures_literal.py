"""Measures of a candidate against the base model, in float64, from whole logits."""

from __future__ import annotations

import torch
from torch import Tensor


def kl_divergence(base: Tensor, other: Tensor) -> Tensor:
    """Σ p (log p - log q) per token [T] from logits [T, V]."""
    p, q = base.double().softmax(-1), other.double().softmax(-1)
    return torch.where(p > 0, p * (p / q).log(), 0.0).sum(-1)


def topk_kl_divergence(base: Tensor, other: Tensor, k: int) -> Tensor:
    """The same over the base model's k most likely tokens, both distributions renormalised."""
    kept = base.double().argsort(dim=-1, descending=True)[:, :k]
    p, q = base.double().softmax(-1).gather(-1, kept), other.double().softmax(-1).gather(-1, kept)
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    return (p * (p / q).log()).sum(-1)


def negative_log_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    """-log q(label) per token [T]."""
    return -logits.double().softmax(-1)[torch.arange(len(labels)), labels].log()


def top1_agreement(base: Tensor, other: Tensor) -> Tensor:
    """Whether the most likely tokens are equal, per token [T]."""
    return (base.argmax(-1) == other.argmax(-1)).double()


def acceptance_rate(base: Tensor, other: Tensor) -> Tensor:
    """How likely a token that the other drafts is kept by lossless speculative decoding for the base, per token [T].

    Source: arXiv:2211.17192: a drafted token x is kept with probability min(1, p(x) / q(x)).
    """
    p, q = base.double().softmax(-1), other.double().softmax(-1)
    return (q * (p / q).clamp(max=1.0).nan_to_num(0.0)).sum(-1)


def flips(base: Tensor, other: Tensor, labels: Tensor) -> Tensor:
    """Whether right becomes wrong or wrong becomes right, per token [T]."""
    before, after = base.argmax(-1) == labels, other.argmax(-1) == labels
    return ((before & ~after) | (~before & after)).double()
