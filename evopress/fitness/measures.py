"""What is measured per token: KL divergence, sparse (top-k) KL divergence, perplexity, and what is reported.

Logits exist for one chunk of tokens at a time. The base model's part of a chunk is computed once for all candidates. On a CPU what
follows the head's product is done for a few tokens after the other, so that their logits stay in the core's cache.

Shapes: T tokens of a chunk, d hidden size, V vocabulary, k tokens kept by the sparse KL.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from evopress.errors import EvoPressError
from evopress.fitness.fusion import compiled
from evopress.models.head import Head
from evopress.registry import Registry

_IN_CACHE = 2**17
"""Logits that are worked on at a time on a CPU: in float32, with what is made of them, a core's cache holds them."""


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


def per_token(measure: Measure, hidden: Tensor, reference: Any, head: Head) -> Tensor:
    """Call a measure; raise EvoPressError if what it returns is not [len(names), T]."""
    found = measure(hidden, reference, head)
    if found.shape != (expected := (len(measure.names), len(hidden))):
        raise EvoPressError(
            f"the measure {', '.join(measure.names)} returned {list(found.shape)} for {len(hidden)} tokens, expected "
            f"{list(expected)}: let its __call__ end with .unsqueeze(0), or choose another fitness.name"
        )
    return found


@dataclass(frozen=True)
class KLDivergence:
    """KL(base ‖ compressed) in nats, exact over the vocabulary (paper section 3, fitness environment)."""

    names: tuple[str, ...] = ("kl",)
    fused: bool = False
    """Through torch.compile: one pass over a candidate's logits."""

    def reference(self, base: Tensor, labels: Tensor, head: Head) -> tuple[Tensor, Tensor]:
        return _of_base(head.scores(base))

    def __call__(self, hidden: Tensor, reference: tuple[Tensor, Tensor], head: Head) -> Tensor:
        p, negative_entropy = reference
        if self.fused:
            return compiled(_divergence)(head.scores(hidden), p, negative_entropy).unsqueeze(0)
        found = _by_tokens(lambda scores, p: torch.linalg.vecdot(p, _logarithms(scores)), head.scores(hidden), p)
        return (negative_entropy - found).unsqueeze(0)


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
        return -_by_tokens(
            lambda scores, labels: _logarithms(scores).gather(-1, labels.unsqueeze(-1)).T, head.scores(hidden), reference
        )


@dataclass(frozen=True)
class HeldOut:
    """What is reported, per token.

    KL divergence and negative log-likelihood; whether the most likely token is the base model's; Σ min(p, q), the probability
    that lossless speculative decoding keeps a token that the candidate has drafted (arXiv:2211.17192); and whether one of the two
    is right about the next token and the other is not, a flip (arXiv:2407.09141).
    """

    names: tuple[str, ...] = ("kl", "nll", "top1_agreement", "acceptance_rate", "flips")

    def reference(self, base: Tensor, labels: Tensor, head: Head) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        scores = head.scores(base)  # CPUs find the greatest of them faster in float32
        return *_of_base(scores), _by_tokens(lambda scores: scores.float().argmax(-1), scores), labels

    def __call__(self, hidden: Tensor, reference: tuple[Tensor, Tensor, Tensor, Tensor], head: Head) -> Tensor:
        return _by_tokens(_held_out, head.scores(hidden), *reference)


MEASURES: Registry[Callable[..., Measure]] = Registry(
    "measure", {"kl": KLDivergence, "topk_kl": TopkKL, "perplexity": NegativeLogLikelihood}, group="evopress.measures"
)
"""What a search can minimise, by its name in `fitness.name`; called with its options as keywords."""


def make_measure(name: str, options: Mapping[str, Any]) -> Measure:
    """Make what a search minimises.

    Args: options: what it is told, by keyword.

    Raises: EvoPressError if there is none of that name, it does not take these options, or it does not give one number per token.
    """
    measure: Measure = MEASURES.make(name, options, key="fitness.name", told_by="fitness.options")
    names = getattr(measure, "names", ())
    if not callable(measure) or not hasattr(measure, "reference") or len(names) != 1:
        raise EvoPressError(
            f"fitness.name={name} is no measure of one number per token: give it `names` of one, `reference(base, labels, head)` "
            "and `__call__(hidden, reference, head)`, or choose another"
        )
    return measure


def unfused(measure: Measure) -> Measure:
    """Return the measure in the form that can be gone back through, and that nothing is compiled for."""
    return replace(measure, fused=False) if isinstance(measure, KLDivergence) else measure


def _held_out(scores: Tensor, p: Tensor, negative_entropy: Tensor, top1: Tensor, labels: Tensor) -> Tensor:
    """Return what `HeldOut` names, [5, T], of a candidate's logits [T, V] and of the base's part."""
    logq = _logarithms(scores)
    kl = negative_entropy - torch.linalg.vecdot(p, logq)
    nll = -logq.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    most_likely = logq.argmax(-1)
    q = logq.exp_()  # of no further use as logarithms
    accepted = torch.minimum(p, q, out=q).sum(-1)
    flips = (most_likely == labels) != (top1 == labels)
    return torch.stack([kl, nll, (most_likely == top1).float(), accepted, flips.float()])


def _of_base(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return p [T, V] and Σ p log p, [T], of logits [T, V]."""
    if scores.device.type != "cpu":  # no more is held at a time than `population.PER_LOGIT` says
        logp = _logarithms(scores)
        p = logp.exp()
        return p, logp.mul_(p).sum(-1)
    p = torch.empty_like(scores, dtype=_wide(scores.dtype))

    def expected(scores: Tensor, p: Tensor) -> Tensor:
        logp = _logarithms(scores)
        return torch.linalg.vecdot(torch.exp(logp, out=p), logp)

    return p, _by_tokens(expected, scores, p)


def _divergence(scores: Tensor, p: Tensor, negative_entropy: Tensor) -> Tensor:
    """Return Σ p log p - Σ p log q, [T], for logits of q in any floating dtype [T, V]."""
    return negative_entropy - (p * torch.log_softmax(scores.float(), dim=-1)).sum(-1)


def _by_tokens(function: Callable[..., Tensor], scores: Tensor, *others: Tensor) -> Tensor:
    """Return a function's value, [..., T], for logits [T, V] and others [T, ...]: on a CPU for a few tokens at a time."""
    if scores.device.type != "cpu":
        return function(scores, *others)
    few = max(_IN_CACHE // scores.shape[-1], 1)
    return torch.cat([function(*parts) for parts in zip(*(each.split(few) for each in (scores, *others)), strict=True)], dim=-1)


def _logarithms(scores: Tensor) -> Tensor:
    """Return the logarithms of the probabilities, in float32, of logits [T, V]."""
    return torch.log_softmax(scores.to(_wide(scores.dtype)), dim=-1)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Return float32, or the dtype where it is wider."""
    return torch.promote_types(dtype, torch.float32)
