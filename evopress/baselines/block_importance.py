"""Scores of transformer blocks, and the order in which they are removed: the depth-pruning baselines.

Source: paper, section 4.1 and appendix D. A *span* (start, stop) is the run of blocks start to stop - 1: one block, a pair, or a
whole window; its input h_start and output h_stop are the residual stream before and after it.

Shapes: N sequences of L tokens, T tokens in all, d hidden size.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from evopress.baselines.baseline import MODULES, Baseline, Pass, Planned, Problem, check_importance, remembered
from evopress.data.tokens import tokens_digest
from evopress.errors import EvoPressError
from evopress.levels.modules import PAIR, modules_of
from evopress.models.blocks import BlockModel
from evopress.progress import track
from evopress.settings import RunSettings
from evopress.units import Genome, Space

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


@dataclass(frozen=True)
class RankedBlocks(Baseline):
    """Drops the blocks that a ranking puts first, attention and MLP together, as many as the target says (paper, Table 13).

    The sliding window has no order. Scores are kept beside the run's manifest, so that another sparsity or seed finds them there.
    """

    name: str
    """A key of RANKINGS."""
    tokens: int
    """Calibration tokens that blocks are scored on."""
    serves = (MODULES,)

    def check(self, run: RunSettings) -> None:
        """See `Baseline`."""
        check_importance(run, self.tokens)

    def passes(self, plan: Planned) -> list[Pass]:
        """See `Baseline`."""
        if RANKINGS[self.name].score in ("perplexity", "kl"):
            return [Pass(len(spans_of(plan.space)) + 1, self.tokens, shared="blocks by their removal")]
        shared = None if self.name == "sliding_window" else "blocks by their activations"  # windows are as long as what is dropped
        return [Pass(1, self.tokens, alone=True, shared=shared)]

    def find(self, problem: Problem) -> dict[str, Genome]:
        """See `Baseline`."""
        space = problem.space
        spans = spans_of(space)
        count = (len(space) - problem.budget.total) * len(spans) // len(space)
        stuck = {unit.block for unit in space.units if len(unit.levels) == 1}
        excluded = {i for i, (start, stop) in enumerate(spans) if stuck & set(range(start, stop))}
        if len(spans) - len(excluded) < count:
            raise EvoPressError(
                f"method.exclude leaves {len(spans) - len(excluded)} whole blocks, but {self.name} drops {count}: exclude fewer, "
                f"or leave {self.name} out of baselines.names"
            )
        scores = _Scores(problem, spans, self.tokens)
        if self.name == "sliding_window":
            joined = windows(spans, count, excluded=excluded)
            best = removal_order(self.name, scores.of_windows(list(joined)))[0]
            return {self.name: without(space, [spans[i] for i in list(joined.values())[best]])}
        ranking = RANKINGS[self.name].score
        values = scores.of_removal(ranking) if ranking in ("perplexity", "kl") else scores.of_activations(ranking)
        order = removal_order(self.name, values, excluded=excluded)
        problem.note_order(self.name, [spans[i][0] for i in order])
        return {self.name: without(space, [spans[i] for i in order[:count]])}


class _Scores:
    """The scores of a model's blocks on calibration text, measured when they are first asked for and kept in a file."""

    def __init__(self, problem: Problem, spans: Sequence[Span], tokens: int) -> None:
        text = problem.calibration_tokens
        self._text = text[: max(tokens // text.shape[1], 1)]
        self._problem, self._spans = problem, list(spans)
        self._kept = problem.kept("scores", {"tokens": tokens_digest(self._text), "spans": self._spans})

    def _get(self, key: str, measure: Callable[[], dict[str, list[float]]]) -> dict[str, list[float]]:
        stored: dict[str, list[Any]] = remembered(self._problem, self._kept, key, measure)  # what is not finite is null in the file
        return {name: [math.inf if x is None else x for x in values] for name, values in stored.items()}

    def of_activations(self, score: str) -> list[float]:
        """Return what one pass of the dense model says of every span."""
        return self._get("activations", lambda: self._measured(self._spans))[score]

    def of_windows(self, joined: Sequence[Span]) -> list[float]:
        """Return the cosine similarity over every window."""
        key = "windows " + " ".join(f"{start}-{stop - 1}" for start, stop in joined)
        return self._get(key, lambda: self._measured(joined))["cosine_similarity"]

    def of_removal(self, score: str) -> list[float]:
        """Return the perplexity, or the KL divergence, of the model without each span."""
        return self._get("removal", self._removed)[score]

    def _measured(self, spans: Sequence[Span]) -> dict[str, list[float]]:
        self._problem.spend(tokens=self._text.numel())
        return measure_spans(self._problem.blocks, self._text, spans, batch_tokens=self._problem.batch_tokens)

    def _removed(self) -> dict[str, list[float]]:
        genomes = [without(self._problem.space, [span]) for span in self._spans]
        scores = self._problem.measure(genomes, self._text, what="scoring blocks by their removal")
        return {"perplexity": [score.perplexity for score in scores], "kl": [score.kl for score in scores]}


def spans_of(space: Space) -> list[Span]:
    """Return the runs of blocks that are ranked: single blocks, or pairs where units are pairs."""
    width = 2 if space.units[0].kind == PAIR else 1
    blocks = {block for unit in space.units for block, _ in modules_of(unit)}
    return [(start, start + width) for start in range(0, len(blocks), width)]


def without(space: Space, spans: Sequence[Span]) -> Genome:
    """Return the genome that drops these runs of blocks and nothing else."""
    gone = {block for start, stop in spans for block in range(start, stop)}
    return tuple(len(unit.levels) - 1 if unit.block in gone else 0 for unit in space.units)


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
            f"no {count} consecutive units of {len(spans)} can be dropped ({len(set(excluded))} are excluded): drop or exclude "
            "fewer, or leave sliding_window out of baselines.names"
        )
    return found
