"""Scores of transformer blocks, and the order in which they are removed: the depth-pruning baselines.

Source: paper, section 4.1 and appendix D. A *span* (start, stop) is the run of blocks start to stop - 1: one block, a pair, or a
whole window; its input h_start and output h_stop are the residual stream before and after it.

Shapes: N sequences of L tokens, T tokens in all, d hidden size.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from evopress.errors import EvoPressError
from evopress.models.blocks import BlockModel
from evopress.progress import track

Span = tuple[int, int]
"""(start, stop): blocks start to stop - 1."""

ACTIVATION_SCORES = ("cosine_similarity", "norm_ratio", "l2", "l2_normalized")
"""What `measure_spans` returns."""


@dataclass(frozen=True)
class Ranking:
    """What a baseline looks at, and which end of it goes first."""

    score: str
    """One of ACTIVATION_SCORES, or the held-out "perplexity" or "kl" of the model without the span."""
    highest_first: bool = False


RANKINGS = {
    "shortgpt": Ranking("cosine_similarity", highest_first=True),
    "sliding_window": Ranking("cosine_similarity", highest_first=True),
    "weight_subcloning": Ranking("norm_ratio"),
    "shortened_llama": Ranking("perplexity"),
    "shortened_llama_kl": Ranking("kl"),
    "l2": Ranking("l2"),
    "l2_normalized": Ranking("l2_normalized"),
}
"""The baselines by name. `sliding_window` ranks whole removals, one span each (see `windows`); the others rank single spans."""


@torch.no_grad()
def measure_spans(blocks: BlockModel, tokens: Tensor, spans: Sequence[Span], *, batch_tokens: int = 4096) -> dict[str, list[float]]:
    """Compare what enters and what leaves each span, in one pass of the dense model.

    With x = h_start and f(x) = h_stop - h_start of one token, the scores are means over tokens of

    - cosine_similarity: cos(h_start, h_stop), residual stream included (ShortGPT; of a window: Gromov et al.);
    - norm_ratio: ‖f(x)‖ / ‖f(x) + x‖ (Weight Subcloning);
    - l2: ‖f(x)‖;
    - l2_normalized: ‖h_stop/‖h_stop‖ - h_start/‖h_start‖‖.

    Differs from the authors' code: h_stop of the last block is what leaves the block, not what leaves the final norm after it.
    Float32 whatever the model's dtype, sums in float64. Hidden states are held only as long as a span that is still open starts at
    them.

    Args:
        tokens: token ids int64 [N, L].
        batch_tokens: tokens per pass over the blocks; bounds memory.

    Returns: score name to one number per span.
    Raises: EvoPressError if a span does not exist or a hidden state is not finite.
    """
    num_blocks = len(blocks.blocks)
    for start, stop in spans:
        if not 0 <= start < stop <= num_blocks:
            raise EvoPressError(f"the span of blocks ({start}, {stop}) does not exist: expected 0 <= start < stop <= {num_blocks}")
    ending: defaultdict[int, list[int]] = defaultdict(list)
    needed_until: dict[int, int] = {}
    for i, (start, stop) in enumerate(spans):
        ending[stop].append(i)
        needed_until[start] = max(stop, needed_until.get(start, 0))
    sums = torch.zeros(len(ACTIVATION_SCORES), len(spans), dtype=torch.float64)
    batch = max(batch_tokens // tokens.shape[1], 1)
    for first in track(range(0, len(tokens), batch), "scoring blocks by their activations"):
        hidden = blocks.embed(tokens[first : first + batch])
        held: dict[int, Tensor] = {}
        for boundary in range(max(ending, default=-1) + 1):
            if boundary:
                with blocks.on_device(boundary - 1):
                    hidden = blocks.run(boundary - 1, hidden)
            state = hidden.float().flatten(0, 1)  # [T, d]
            for i in ending.get(boundary, ()):
                sums[:, i] += _token_scores(held[spans[i][0]], state).sum(1, dtype=torch.float64).cpu()
            held[boundary] = state
            held = {start: kept for start, kept in held.items() if needed_until.get(start, 0) > boundary}
        _check_finite(sums, spans)
    return dict(zip(ACTIVATION_SCORES, (sums / tokens.numel()).tolist(), strict=True))


def _token_scores(start: Tensor, stop: Tensor) -> Tensor:
    """Return the scores of every token, float32 [4, T] in the order of ACTIVATION_SCORES, from float32 [T, d] each."""
    change = (stop - start).norm(dim=-1)
    unit_start, unit_stop = normalize(start, dim=-1), normalize(stop, dim=-1)
    ratio = change / stop.norm(dim=-1).clamp_min(1e-12)
    return torch.stack([(unit_start * unit_stop).sum(-1), ratio, change, (unit_stop - unit_start).norm(dim=-1)])


def _check_finite(sums: Tensor, spans: Sequence[Span]) -> None:
    bad = (~sums.isfinite()).any(0).nonzero().flatten().tolist()
    if bad:
        start, stop = spans[bad[0]]
        where = f"block {start}" if stop == start + 1 else f"blocks {start} to {stop - 1}"
        raise EvoPressError(
            f"the dense model's hidden states before or after {where} are not finite: use model.dtype=bfloat16 or float32"
        )


def removal_order(name: str, values: Sequence[float], *, excluded: Collection[int] = ()) -> tuple[int, ...]:
    """Return the indices of what a baseline ranks, most expendable first; of equal ones the lower index first.

    Source: paper, Table 13.

    Args:
        name: a key of RANKINGS.
        values: the score that it names, of every span (sliding_window: of every window). NaN and infinities come last.
        excluded: indices that are never removed and do not appear.
    """
    sign = -1.0 if RANKINGS[name].highest_first else 1.0
    keys = [sign * value if math.isfinite(value) else math.inf for value in values]
    return tuple(sorted((i for i in range(len(values)) if i not in excluded), key=keys.__getitem__))


def windows(spans: Sequence[Span], count: int, *, excluded: Collection[int] = ()) -> dict[Span, tuple[int, ...]]:
    """List the runs of `count` consecutive spans that leave out no block and touch no excluded one, first block first.

    Source: Gromov et al. (2024): whole removals are scored, as one span each.

    Returns: the window as one span to the indices of its spans.
    Raises: EvoPressError if there is none.
    """
    found = {}
    for first in range(len(spans) - count + 1):
        run = range(first, first + count)
        joined = all(spans[i][1] == spans[i + 1][0] for i in run[:-1])
        if joined and not any(i in excluded for i in run):
            found[spans[run[0]][0], spans[run[-1]][1]] = tuple(run)
    if not found:
        raise EvoPressError(
            f"no {count} of {len(spans)} consecutive units are without an excluded one ({len(set(excluded))} are excluded): "
            "remove or exclude fewer, or leave sliding_window out of the baselines"
        )
    return found
