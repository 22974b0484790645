"""What is measured per token: KL divergence, sparse (top-k) KL divergence, perplexity, and what is reported.

Logits exist for one chunk of tokens at a time. The base model's part of a chunk is computed once for all candidates.

Shapes: T tokens of a chunk, d hidden size, V vocabulary, k tokens kept by the sparse KL.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from evopress.fitness.fusion import compiled
from evopress.models.head import Head


class Measure(Protocol):
    """One or more numbers per token that compare a candidate with the base model or with the text."""

    @property
    def names(self) -> tuple[str, ...]:
        """What each row of the result is."""

    def reference(self, base: Tensor, labels: Tensor, head: Head) -> Any:
        """Prepare a chunk once for all candidates.

        Args:
            base: the base model's last hidden states [T, d].
            labels: next tokens int64 [T].
        """

    def __call__(self, hidden: Tensor, reference: Any, head: Head) -> Tensor:
        """Measure a candidate's last hidden states [T, d]; return float32 [len(names), T]."""


@dataclass(frozen=True)
class KLDivergence:
    """KL(base ‖ compressed) in nats, exact over the vocabulary (paper section 3, fitness environment)."""

    names: tuple[str, ...] = ("kl",)
    fused: bool = False
    """Through torch.compile: one pass over a candidate's logits."""

    def reference(self, base: Tensor, labels: Tensor, head: Head) -> tuple[Tensor, Tensor]:
        logp = torch.log_softmax(head.logits(base), dim=-1)
        p = logp.exp()
        return p, _expected(p, logp)  # [T, V] and Σ p log p, [T]

    def __call__(self, hidden: Tensor, reference: tuple[Tensor, Tensor], head: Head) -> Tensor:
        p, negative_entropy = reference
        if self.fused:
            return compiled(_divergence)(head.scores(hidden), p, negative_entropy).unsqueeze(0)
        return (negative_entropy - _expected(p, torch.log_softmax(head.logits(hidden), dim=-1))).unsqueeze(0)


@dataclass(frozen=True)
class TopkKL:
    """KL divergence over the base model's k most likely tokens, both distributions renormalised over them, in nats.

    Source: `sparse_kl` of the authors' code. It needs k logits of a candidate instead of V.
    """

    k: int = 10
    names: tuple[str, ...] = ("kl",)

    def reference(self, base: Tensor, labels: Tensor, head: Head) -> tuple[Tensor, Tensor]:
        top = head.logits(base).topk(self.k, dim=-1)
        return torch.log_softmax(top.values, dim=-1), top.indices

    def __call__(self, hidden: Tensor, reference: tuple[Tensor, Tensor], head: Head) -> Tensor:
        logp, kept = reference
        logq = torch.log_softmax(head.logits_of(hidden, kept), dim=-1)
        return (logp.exp() * (logp - logq)).sum(-1).unsqueeze(0)


@dataclass(frozen=True)
class NegativeLogLikelihood:
    """-log q(next token) in nats; its mean is the logarithm of the perplexity (paper B.3)."""

    names: tuple[str, ...] = ("nll",)

    def reference(self, base: Tensor, labels: Tensor, head: Head) -> Tensor:
        return labels

    def __call__(self, hidden: Tensor, reference: Tensor, head: Head) -> Tensor:
        logq = torch.log_softmax(head.logits(hidden), dim=-1)
        return -logq.gather(-1, reference.unsqueeze(-1)).T


@dataclass(frozen=True)
class HeldOut:
    """What is reported, per token.

    KL divergence and negative log-likelihood; whether the most likely token is the base model's; Σ min(p, q), the probability
    that lossless speculative decoding keeps a token that the candidate has drafted (arXiv:2211.17192); and whether one of the two
    is right about the next token and the other is not, a flip (arXiv:2407.09141).
    """

    names: tuple[str, ...] = ("kl", "nll", "top1_agreement", "acceptance_rate", "flips")

    def reference(self, base: Tensor, labels: Tensor, head: Head) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        logits = head.logits(base)
        logp = torch.log_softmax(logits, dim=-1)
        p = logp.exp()
        return p, _expected(p, logp), logits.argmax(-1), labels

    def __call__(self, hidden: Tensor, reference: tuple[Tensor, Tensor, Tensor, Tensor], head: Head) -> Tensor:
        p, negative_entropy, top1, labels = reference
        logq = torch.log_softmax(head.logits(hidden), dim=-1)
        kl = negative_entropy - _expected(p, logq)
        nll = -logq.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        most_likely = logq.argmax(-1)
        q = logq.exp_()  # of no further use as logarithms
        accepted = torch.minimum(p, q, out=q).sum(-1)
        flips = (most_likely == labels) != (top1 == labels)
        return torch.stack([kl, nll, (most_likely == top1).float(), accepted, flips.float()])


def _divergence(scores: Tensor, p: Tensor, negative_entropy: Tensor) -> Tensor:
    """Return Σ p log p - Σ p log q, [T], for logits of q in any floating dtype [T, V]."""
    return negative_entropy - (p * torch.log_softmax(scores.float(), dim=-1)).sum(-1)


def _expected(p: Tensor, values: Tensor) -> Tensor:
    """Return Σ p · values over the vocabulary, [T], of two float32 [T, V]; one pass, no temporary.

    On a GPU a batch of products of one row and one column each takes nearly twice as long (experiments/benchmark, gpu).
    """
    if p.is_cuda:
        return torch.linalg.vecdot(p, values)
    return torch.bmm(p.unsqueeze(1), values.unsqueeze(2)).reshape(-1)
