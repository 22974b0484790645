"""Compare scores of blocks with the perplexity of the model without random subsets of them.

Source: paper, appendix D.4 and Figure 7. Each block has three scores, means over tokens, with x before and y after the block: the
cosine similarity cos(x, y), the squared error ‖y - x‖², and the normalized squared error ‖y/‖y‖ - x/‖x‖‖², which is 2 - 2 cos(x, y)
token by token. A subset's score is the mean of its blocks' scores.

    python -m experiments.figure7.run

writes results.csv (a row per subset), table.md and figure7.png.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from evopress.errors import EvoPressError
from evopress.progress import track
from evopress.reporting.drawing import COLOURS, log_scale, new_figure, open_frame, save, show_tokens
from experiments.depth import BATCH_TOKENS, load, model_options, perplexities, publish, run
from experiments.scripts import check_positive
from experiments.tables import markdown

if TYPE_CHECKING:
    from torch import Tensor

    from evopress.models.blocks import BlockModel

TITLE = "Figure 7: scores of blocks against perplexity without random ones"
SCORES = {
    "cosine_similarity": "cosine similarity",
    "squared_error": "squared error",
    "squared_error_normalized": "normalized squared error",
}
STAYING = 2
"""Blocks at each end that are never removed."""
_SUBSETS_AT_A_TIME = 16


@dataclass(frozen=True)
class Removal:
    """A random subset of blocks, and the perplexity without them."""

    sparsity: float
    blocks: tuple[int, ...]
    perplexity: float


@dataclass(frozen=True)
class Correlation:
    """Of one score with perplexity, over the subsets of one sparsity."""

    pearson: float
    """With the logarithm of the perplexity; NaN where either is constant or fewer than three subsets are finite."""
    spearman: float
    num_subsets: int

    @property
    def interval(self) -> tuple[float, float]:
        """95% interval of Pearson's correlation, by Fisher's transformation."""
        if self.num_subsets < 4 or not abs(self.pearson) < 1:
            return (math.nan, math.nan) if math.isnan(self.pearson) else (self.pearson, self.pearson)
        centre, half = math.atanh(self.pearson), 1.96 / math.sqrt(self.num_subsets - 3)
        return math.tanh(centre - half), math.tanh(centre + half)


def squared_errors(blocks: BlockModel, tokens: Tensor) -> tuple[list[float], list[float]]:
    """Return ‖y - x‖² and ‖y/‖y‖ - x/‖x‖‖² of every block, means over tokens int64 [N, L], in one pass of the dense model."""
    import torch
    from torch.nn.functional import normalize

    sums = torch.zeros(2, len(blocks.blocks), dtype=torch.float64)
    batches = tokens.split(max(BATCH_TOKENS // tokens.shape[1], 1))
    for part in track(batches, "squared errors of the blocks"):
        hidden = blocks.embed(part)
        for index in range(len(blocks.blocks)):
            before = hidden.float()
            with blocks.on_device(index):
                hidden = blocks.run(index, hidden)
            after = hidden.float()
            for row, change in enumerate((after - before, normalize(after, dim=-1) - normalize(before, dim=-1))):
                sums[row, index] += change.square().sum(-1).sum(dtype=torch.float64).cpu()
    plain, normalized = (sums / tokens.numel()).tolist()
    return plain, normalized


def score_blocks(blocks: BlockModel, tokens: Tensor) -> dict[str, list[float]]:
    """Return the scores of every block by the names in SCORES."""
    from evopress.baselines.block_importance import measure_spans

    spans = [(index, index + 1) for index in range(len(blocks.blocks))]
    cosine = measure_spans(blocks, tokens, spans, batch_tokens=BATCH_TOKENS)["cosine_similarity"]
    return dict(zip(SCORES, (cosine, *squared_errors(blocks, tokens)), strict=True))


def random_subsets(num_blocks: int, count: int, number: int, rng: np.random.Generator) -> list[tuple[int, ...]]:
    """Draw distinct subsets of `count` blocks without the first and the last two; fewer than `number` if there are no more.

    Raises: EvoPressError if so many blocks cannot be removed.
    """
    inner = range(STAYING, num_blocks - STAYING)
    if not 0 < count <= len(inner):
        raise EvoPressError(
            f"{count} of {num_blocks} blocks cannot be removed while the first and last {STAYING} stay: choose a --sparsity that "
            f"removes 1 to {len(inner)}"
        )
    number = min(number, math.comb(len(inner), count))
    found: dict[tuple[int, ...], None] = {}
    for _ in range(100 + 20 * number):
        found[tuple(sorted(rng.choice(inner, size=count, replace=False).tolist()))] = None
        if len(found) == number:
            break
    return list(found)


def mean_score(scores: Sequence[float], blocks: Sequence[int]) -> float:
    """Return the mean of the scores of some blocks."""
    return sum(scores[block] for block in blocks) / len(blocks)


def correlate(scores: Sequence[float], removals: Sequence[Removal]) -> Correlation:
    """Correlate the mean scores of subsets with their perplexities; those that are not finite are left out."""
    from scipy.stats import pearsonr, spearmanr

    finite = [removal for removal in removals if math.isfinite(removal.perplexity)]
    xs = [mean_score(scores, removal.blocks) for removal in finite]
    ys = [math.log(removal.perplexity) for removal in finite]
    if len(finite) < 3 or np.ptp(xs) == 0 or np.ptp(ys) == 0:
        return Correlation(math.nan, math.nan, len(finite))
    return Correlation(float(pearsonr(xs, ys)[0]), float(spearmanr(xs, ys)[0]), len(finite))


Correlations = Mapping[float, Mapping[str, Correlation]]
"""Sparsity and name of a score to its correlation."""


def render(about: str, correlations: Correlations, num_dropped: Mapping[float, int]) -> str:
    """Return the text of table.md."""
    body = []
    for sparsity, of in correlations.items():
        for name, correlation in of.items():
            low, high = correlation.interval
            body.append(
                [
                    f"{100 * sparsity:g}%",
                    str(num_dropped[sparsity]),
                    SCORES[name],
                    f"{correlation.pearson:+.3f} ({low:+.2f}..{high:+.2f})",
                    f"{correlation.spearman:+.3f}",
                    str(correlation.num_subsets),
                ]
            )
    headers = ["sparsity", "blocks removed", "score", "Pearson, log perplexity (95%)", "Spearman", "subsets"]
    return (
        f"{about}\n\nA useful score has a strong correlation: negative for the similarity, positive for the errors.\n\n"
        f"{markdown(headers, body)}"
    )


def draw(scores: Mapping[str, Sequence[float]], removals: Sequence[Removal], correlations: Correlations, folder: Path) -> None:
    """Draw perplexity against mean score: a row per score, a column per sparsity."""
    figure = new_figure(1.0 + 2.9 * len(correlations), 0.8 + 2.6 * len(SCORES))
    axes = figure.subplots(len(SCORES), len(correlations), squeeze=False, sharey="col")
    for row, (name, label) in enumerate(SCORES.items()):
        for column, (sparsity, of) in enumerate(correlations.items()):
            axis = axes[row][column]
            mine = [removal for removal in removals if removal.sparsity == sparsity and math.isfinite(removal.perplexity)]
            axis.scatter(
                [mean_score(scores[name], removal.blocks) for removal in mine],
                [removal.perplexity for removal in mine],
                s=14,
                color=COLOURS[row],
                alpha=0.65,
                linewidths=0,
            )
            if mine:
                log_scale(axis)
            open_frame(axis)
            axis.set_xlabel(f"mean {label}")
            axis.xaxis.set_major_formatter(show_tokens)
            axis.set_title(f"{100 * sparsity:g}%: r = {of[name].pearson:+.2f}, ρ = {of[name].spearman:+.2f}", fontsize=9)
            axis.tick_params(labelsize=8)
        axes[row][0].set_ylabel("perplexity")
    save(figure, folder, "figure7")


def main(argv: Sequence[str] | None = None) -> None:
    """Score the blocks, measure random removals, and write table and figure."""
    parser = argparse.ArgumentParser(description="Compare scores of blocks with perplexity without random subsets of them.")
    model_options(parser, out=Path(__file__).parent)
    parser.add_argument("--tokens", type=int, default=1024, help="calibration tokens per subset (default %(default)s)")
    parser.add_argument("--score-tokens", type=int, default=8192, help="calibration tokens for the scores (default %(default)s)")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.1, 0.2, 0.3, 0.4], help="default 0.1 0.2 0.3 0.4")
    parser.add_argument("--subsets", type=int, default=64, help="random subsets per sparsity (default %(default)s)")
    arguments = parser.parse_args(argv)
    check_positive(arguments, "subsets")
    model = load(arguments)
    rng = np.random.default_rng(arguments.seed)
    num_dropped = {sparsity: model.num_dropped(sparsity) for sparsity in arguments.sparsity}
    subsets = [
        (sparsity, blocks)
        for sparsity, count in num_dropped.items()
        for blocks in random_subsets(model.num_blocks, count, arguments.subsets, rng)
    ]
    tokens = model.tokens("calibration", arguments.tokens)
    scores = score_blocks(model.blocks, model.tokens("calibration", arguments.score_tokens))
    evaluator = model.evaluator("block")
    removals = []
    batches = [subsets[start : start + _SUBSETS_AT_A_TIME] for start in range(0, len(subsets), _SUBSETS_AT_A_TIME)]
    for batch in track(batches, f"random removals, {_SUBSETS_AT_A_TIME} at a time"):
        genomes = [tuple(int(block in blocks) for block in range(model.num_blocks)) for _, blocks in batch]
        measured = perplexities(evaluator, genomes, tokens)
        removals += [Removal(*subset, perplexity) for subset, perplexity in zip(batch, measured, strict=True)]
    correlations = {
        sparsity: {name: correlate(scores[name], [each for each in removals if each.sparsity == sparsity]) for name in SCORES}
        for sparsity in num_dropped
    }
    about = (
        f"{model.about} Scores from {arguments.score_tokens:,} calibration tokens, perplexities from {tokens.numel():,}; the first "
        f"and last {STAYING} blocks stay."
    )
    rows: list[dict[str, Any]] = [
        {
            "sparsity": each.sparsity,
            "blocks": " ".join(map(str, each.blocks)),
            **{name: mean_score(scores[name], each.blocks) for name in SCORES},
            "perplexity": each.perplexity,
        }
        for each in removals
    ]
    publish(arguments.out, TITLE, render(about, correlations, num_dropped), rows)
    draw(scores, removals, correlations, arguments.out)


if __name__ == "__main__":
    run(main)
