"""Measure how many candidate tokens are evaluated per second, against the share of modules or blocks that are dropped.

A candidate's fitness is the KL divergence of a random genome on search text, as in the search: one genome at a time, and λ = 8
offspring of one parent together, which share the blocks up to where they differ. The order of measurements goes forwards and
backwards by turns, so that a machine that slows down slows all alike.

    python -m experiments.drop_speed.run

writes results.csv (a row per setting), table.md and drop_speed.png.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from evopress.errors import EvoPressError
from evopress.progress import track
from evopress.reporting.drawing import COLOURS, MARKERS, new_figure, open_frame, save
from experiments.depth import BATCH_TOKENS, DepthModel, load, model_options, publish, run
from experiments.scripts import check_positive
from experiments.tables import markdown

if TYPE_CHECKING:
    from torch import Tensor

    from evopress.fitness.measures import Measure
    from evopress.fitness.population import PopulationEvaluator
    from evopress.units import Genome

TITLE = "Speed of evaluation against the share that is dropped"
GRANULARITIES = ("module", "block")
ONE = 1


@dataclass(frozen=True)
class Setting:
    """What is measured."""

    granularity: str
    sparsity: float
    num_candidates: int
    """1, or offspring of one parent."""


@dataclass(frozen=True)
class Sample:
    """One evaluation, per candidate token."""

    block_seconds: float
    """Embedding, blocks and final norm."""
    head_seconds: float
    """Logits and KL divergence, those of the dense model included, which are computed once for all candidates."""
    blocks_run: float
    """Blocks run for each candidate's tokens; one with a single module left counts whole."""

    @property
    def seconds(self) -> float:
        return self.block_seconds + self.head_seconds


@dataclass(frozen=True)
class Speed:
    """The medians of a setting."""

    setting: Setting
    tokens_per_second: float
    least: float
    most: float
    block_seconds: float
    """Per 1,000 candidate tokens."""
    head_seconds: float
    blocks_run: float
    num_samples: int

    @classmethod
    def of(cls, setting: Setting, samples: Sequence[Sample]) -> Speed:
        """Take the medians of samples."""
        speeds = [1 / sample.seconds for sample in samples]
        return cls(
            setting,
            tokens_per_second=statistics.median(speeds),
            least=min(speeds),
            most=max(speeds),
            block_seconds=1000 * statistics.median(sample.block_seconds for sample in samples),
            head_seconds=1000 * statistics.median(sample.head_seconds for sample in samples),
            blocks_run=statistics.fmean(sample.blocks_run for sample in samples),
            num_samples=len(samples),
        )

    @property
    def head_share(self) -> float:
        return self.head_seconds / (self.head_seconds + self.block_seconds)


class _Timed:
    """An evaluator that takes the time of its blocks."""

    def __init__(self, evaluator: PopulationEvaluator) -> None:
        self.live = evaluator.live
        self.known_as = None
        self.seconds = 0.0
        self._evaluator = evaluator

    def final_states(
        self, genomes: Sequence[Genome | None], ids: Tensor, *, apart: int | None = None
    ) -> tuple[list[int], list[Tensor]]:
        import torch

        started = time.perf_counter()
        found = self._evaluator.final_states(genomes, ids, apart=apart)
        if found[1][0].is_cuda:
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - started
        return found

    def alone(self, num_sequences: int, length: int) -> bool:
        return self._evaluator.alone(num_sequences, length)


def measure(evaluator: PopulationEvaluator, genomes: Sequence[Genome], tokens: Tensor, base: Tensor, measure: Measure) -> Sample:
    """Evaluate genomes on sequences, int64 [N, L], and take the time."""
    from evopress.fitness.population import measure_sums

    timed, before = _Timed(evaluator), evaluator.num_block_tokens
    started = time.perf_counter()
    measure_sums(timed, genomes, tokens, base, measure)  # its sums arrive on the host
    seconds = time.perf_counter() - started
    count = tokens.numel() * len(genomes)
    return Sample(timed.seconds / count, (seconds - timed.seconds) / count, (evaluator.num_block_tokens - before) / count)


def draw_genomes(model: DepthModel, setting: Setting, rng: np.random.Generator) -> list[Genome]:
    """Draw a random genome, or offspring of one.

    Raises: EvoPressError if the sparsity drops nothing or all and is not 0.
    """
    from evopress.search.initial import random_mix
    from evopress.search.mutation import LevelSwitch, offspring

    space = model.space(setting.granularity)
    if setting.sparsity == 0:
        return [(0,) * len(space)]
    budget = model.budget(setting.granularity, setting.sparsity)
    parent = random_mix(space, budget, rng)
    if setting.num_candidates == ONE:
        return [parent]
    return offspring(LevelSwitch(space, budget, exchange="name"), parent, setting.num_candidates, rng)


def all_settings(sparsities: Sequence[float], num_offspring: int) -> list[Setting]:
    """List what is measured; at sparsity 0 there are no offspring."""
    return [
        Setting(granularity, sparsity, count)
        for granularity in GRANULARITIES
        for count in (ONE, num_offspring)
        for sparsity in sparsities
        if count == ONE or sparsity > 0
    ]


def render(about: str, speeds: Sequence[Speed]) -> str:
    """Return the text of table.md."""
    dense = {
        speed.setting.granularity: speed.tokens_per_second
        for speed in speeds
        if speed.setting.sparsity == 0 and speed.setting.num_candidates == ONE
    }
    headers = ["dropped", "candidates", "sparsity", "candidate tokens per second", "over dense"]
    headers += ["blocks run per candidate", "blocks, s per 1,000 tokens", "head, s per 1,000 tokens", "head's share"]
    body = []
    for speed in speeds:
        setting, reference = speed.setting, dense.get(speed.setting.granularity)
        body.append(
            [
                f"{setting.granularity}s",
                "one" if setting.num_candidates == ONE else f"{setting.num_candidates} offspring",
                f"{100 * setting.sparsity:g}%",
                f"{speed.tokens_per_second:,.0f} ({speed.least:,.0f}..{speed.most:,.0f})",
                "" if reference is None else f"{speed.tokens_per_second / reference:.2f}",
                f"{speed.blocks_run:.1f}",
                f"{speed.block_seconds:.3f}",
                f"{speed.head_seconds:.3f}",
                f"{speed.head_share:.0%}",
            ]
        )
    medians = f"Medians (least..greatest) of {speeds[0].num_samples} measurements of each, of random genomes."
    return f"{about}\n\n{medians}\n\n{markdown(headers, body)}"


def draw(speeds: Sequence[Speed], folder: Path) -> None:
    """Draw tokens per second, and the time of blocks and head, against sparsity."""
    figure = new_figure(11, 4.4)
    left, right = figure.subplots(1, 2)
    lines: dict[tuple[str, int], list[Speed]] = {}
    for speed in speeds:
        lines.setdefault((speed.setting.granularity, speed.setting.num_candidates), []).append(speed)
    for index, ((granularity, count), of) in enumerate(lines.items()):
        label = f"{granularity}s, {'one genome at a time' if count == ONE else f'{count} offspring together'}"
        xs = [100 * speed.setting.sparsity for speed in of]
        look: dict[str, Any] = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)], "markersize": 4.5}
        medians = [speed.tokens_per_second for speed in of]
        spread = [[speed.tokens_per_second - speed.least for speed in of], [speed.most - speed.tokens_per_second for speed in of]]
        left.errorbar(xs, medians, yerr=spread, elinewidth=0.8, linewidth=1.8, label=label, **look)
        right.plot(xs, [speed.block_seconds for speed in of], linewidth=1.8, **look)
        right.plot(xs, [speed.head_seconds for speed in of], linewidth=1.2, linestyle="--", **look)
    right.plot([], [], color="#444444", linewidth=1.8, label="embedding, blocks, final norm")
    right.plot([], [], color="#444444", linewidth=1.2, linestyle="--", label="head: logits and KL divergence")
    right.legend(frameon=False)
    left.set_ylabel("candidate tokens per second")
    right.set_ylabel("seconds per 1,000 candidate tokens")
    for axis in (left, right):
        axis.set_xlabel("dropped (%)")
        axis.set_ylim(bottom=0)
        open_frame(axis)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    save(figure, folder, "drop_speed")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and write table and figure."""
    parser = argparse.ArgumentParser(description="Measure how fast genomes with dropped modules are evaluated.")
    model_options(parser, out=Path(__file__).parent)
    parser.add_argument("--tokens", type=int, default=512, help="search tokens per candidate (default %(default)s)")
    parser.add_argument(
        "--sparsity", type=float, nargs="+", default=[0, 0.125, 0.25, 0.375, 0.5], help="default: eighths up to 0.5"
    )
    parser.add_argument("--offspring", type=int, default=8, help="candidates that are evaluated together (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each setting (default %(default)s)")
    arguments = parser.parse_args(argv)
    check_positive(arguments, "repeats")
    if arguments.offspring < 2:
        raise EvoPressError(f"--offspring {arguments.offspring} is out of range: expected at least 2")
    from evopress.fitness.measures import KLDivergence
    from evopress.fitness.minibatch import base_states

    model = load(arguments)
    rng = np.random.default_rng(arguments.seed)
    settings = all_settings(arguments.sparsity, arguments.offspring)
    for setting in settings:
        draw_genomes(model, setting, np.random.default_rng(0))  # refuses a sparsity before anything is measured
    tokens = model.tokens("search", arguments.tokens)
    evaluators = {granularity: model.evaluator(granularity) for granularity in GRANULARITIES}
    base = base_states(evaluators["block"], tokens, batch_tokens=BATCH_TOKENS)
    samples: dict[Setting, list[Sample]] = {setting: [] for setting in settings}
    order = [setting for turn in range(arguments.repeats) for setting in (settings if turn % 2 == 0 else settings[::-1])]
    kl = KLDivergence()
    measure(evaluators["block"], draw_genomes(model, settings[0], rng), tokens, base, kl)  # warms up
    for setting in track(order, "measuring"):
        genomes = draw_genomes(model, setting, rng)
        samples[setting].append(measure(evaluators[setting.granularity], genomes, tokens, base, kl))
    speeds = [Speed.of(setting, of) for setting, of in samples.items()]
    rows = [
        {
            "granularity": speed.setting.granularity,
            "candidates": speed.setting.num_candidates,
            "sparsity": speed.setting.sparsity,
            "tokens_per_second": speed.tokens_per_second,
            "least": speed.least,
            "most": speed.most,
            "blocks_run": speed.blocks_run,
            "block_seconds_per_1000_tokens": speed.block_seconds,
            "head_seconds_per_1000_tokens": speed.head_seconds,
            "head_share": speed.head_share,
            "samples": speed.num_samples,
        }
        for speed in speeds
    ]
    publish(arguments.out, TITLE, render(f"{model.about} {tokens.numel():,} tokens per candidate.", speeds), rows)
    draw(speeds, arguments.out)


if __name__ == "__main__":
    run(main)
