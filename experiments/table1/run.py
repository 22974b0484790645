"""Find removals of modules that get better when strictly more is removed.

Source: paper, section 1 and Table 1. Random sets A of modules are removed, at several sparsities, as many attention as MLP modules;
then A and one more module, for every other module. The pairs with the lowest ratio of perplexities go on: one more module at a
time, the best one, as long as the perplexity falls. What was selected is measured again on held-out text.

    python -m experiments.table1.run

writes results.csv, table.md and table1.png.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from evopress.errors import EvoPressError
from evopress.progress import track
from evopress.reporting.dropped import dropped_modules_figure
from evopress.reporting.tables import significant
from evopress.units import Genome, Space
from experiments.depth import load, model_options, perplexities, publish, run
from experiments.scripts import check_positive
from experiments.tables import markdown

if TYPE_CHECKING:
    from torch import Tensor

    from evopress.evaluation.heldout import Scores
    from evopress.fitness.population import PopulationEvaluator

TITLE = "Table 1: removing strictly more can improve perplexity"


@dataclass(frozen=True)
class Pair:
    """Two removals, the second of which drops all that the first does and more; perplexities on the text that chose them."""

    fewer: Genome
    more: Genome
    fewer_perplexity: float
    more_perplexity: float

    @property
    def ratio(self) -> float:
        """Below 1 where removing more is better; infinite where that cannot be said."""
        if not (math.isfinite(self.more_perplexity) and math.isfinite(self.fewer_perplexity)):
            return math.inf
        return self.more_perplexity / self.fewer_perplexity


@dataclass(frozen=True)
class Tally:
    """What came of all sets of one sparsity."""

    sparsity: float
    sets: int
    supersets: int
    """With one more module, over all sets."""
    better: int
    """Supersets with a lower perplexity than their set."""
    helped: int
    """Sets with such a superset."""
    best_ratio: float


def supersets(genome: Genome) -> list[Genome]:
    """Return the genomes that drop one more module."""
    return [(*genome[:i], 1, *genome[i + 1 :]) for i, level in enumerate(genome) if level == 0]


def measure_supersets(evaluator: PopulationEvaluator, tokens: Tensor, fewer: Genome) -> list[Pair]:
    """Measure a set with all sets of one more module, which share prefixes with it."""
    larger = supersets(fewer)
    first, *others = perplexities(evaluator, [fewer, *larger], tokens)
    return [Pair(fewer, more, first, other) for more, other in zip(larger, others, strict=True)]


def tally(sparsity: float, of_sets: Sequence[Sequence[Pair]]) -> Tally:
    """Count how often one more module helped."""
    pairs = [pair for of_set in of_sets for pair in of_set]
    return Tally(
        sparsity,
        sets=len(of_sets),
        supersets=len(pairs),
        better=sum(pair.ratio < 1 for pair in pairs),
        helped=sum(any(pair.ratio < 1 for pair in of_set) for of_set in of_sets),
        best_ratio=min((pair.ratio for pair in pairs), default=math.inf),
    )


def climb(evaluator: PopulationEvaluator, tokens: Tensor, pair: Pair, *, steps: int) -> Pair:
    """Let a pair's larger set grow by the best further module, up to `steps` times, as long as that lowers its perplexity."""
    for _ in range(steps):
        larger = [genome for genome in supersets(pair.more) if 0 in genome]
        values = perplexities(evaluator, larger, tokens) if larger else []
        best = min(range(len(values)), key=values.__getitem__, default=None)
        if best is None or not values[best] < pair.more_perplexity:
            break
        pair = replace(pair, more=larger[best], more_perplexity=values[best])
    return pair


def select(of_sets: Sequence[Sequence[Pair]], count: int) -> list[Pair]:
    """Return the lowest ratios, one of each set."""
    best = [min(of_set, key=lambda pair: pair.ratio) for of_set in of_sets if of_set]
    return sorted(best, key=lambda pair: pair.ratio)[:count]


def count_dropped(space: Space, genome: Genome | None) -> str:
    """Say how many modules of each kind a genome drops: "7 + 9"."""
    kinds = [unit.kind for unit, level in zip(space.units, genome or (), strict=genome is not None) if level]
    return f"{kinds.count('attention')} + {kinds.count('mlp')}"


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    name: str
    genome: Genome | None
    smaller: Genome | None
    """Of a set that drops more: the one that drops less."""
    search_perplexity: float
    scores: Scores


def draw(space: Space, rows: Sequence[Row], folder: Path) -> None:
    """Draw the configurations as the paper's Table 1 does."""
    from evopress.levels.modules import dropped_modules

    names = [f"{row.name}: perplexity {significant(row.scores.perplexity)}, KL {significant(row.scores.kl, 3)}" for row in rows]
    genomes = [row.genome or (0,) * len(space) for row in rows]
    dropped = {name: dropped_modules(space, genome) for name, genome in zip(names, genomes, strict=True)}
    dropped_modules_figure(dropped, 1 + max(unit.block for unit in space.units), folder, name="table1")


def render(about: str, tallies: Sequence[Tally], space: Space, rows: Sequence[Row]) -> str:
    """Return the text of table.md."""
    counts = markdown(
        ["sparsity", "random sets", "with one more module", "of them better", "sets with a better one", "lowest ratio"],
        [
            [
                f"{100 * each.sparsity:g}%",
                str(each.sets),
                f"{each.supersets:,}",
                f"{each.better:,} ({each.better / max(each.supersets, 1):.1%})",
                str(each.helped),
                f"{each.best_ratio:.3f}",
            ]
            for each in tallies
        ],
    )
    chosen = markdown(
        ["set", "attention + MLP removed", "perplexity, text that chose it", "perplexity, held out", "KL, held out"],
        [
            [
                row.name,
                count_dropped(space, row.genome),
                *(significant(value) for value in (row.search_perplexity, row.scores.perplexity, row.scores.kl)),
            ]
            for row in rows
        ],
    )
    pairs = [(row, below) for row, below in itertools.pairwise(rows) if below.smaller is not None]
    held = sum(below.scores.perplexity < row.scores.perplexity for row, below in pairs)
    return (
        f"{about}\n\nHow often removing one more module lowers the perplexity of a random set:\n\n{counts}\n"
        f"The lowest ratios; B removes all that A does, and more. On held-out text {held} of {len(pairs)} B have a lower "
        f"perplexity than their A.\n\n{chosen}"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Search for pairs, measure the best on held-out text, and write table and figure."""
    parser = argparse.ArgumentParser(description="Find removals of modules that get better when strictly more is removed.")
    model_options(parser, out=Path(__file__).parent)
    parser.add_argument("--tokens", type=int, default=512, help="search tokens per candidate (default %(default)s)")
    parser.add_argument("--held-out-tokens", type=int, default=8192, help="default %(default)s")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.125, 0.25, 0.375, 0.5], help="default 0.125 0.25 0.375 0.5")
    parser.add_argument("--trials", type=int, default=4, help="random sets per sparsity (default %(default)s)")
    parser.add_argument("--pairs", type=int, default=3, help="pairs that are shown (default %(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="further modules that B may lose (default %(default)s)")
    arguments = parser.parse_args(argv)
    check_positive(arguments, "trials", "pairs")
    from evopress.evaluation.heldout import measure_held_out
    from evopress.search.initial import random_mixes

    model = load(arguments)
    budgets = [model.budget("module", sparsity) for sparsity in arguments.sparsity]
    tokens, held_out = model.tokens("search", arguments.tokens), model.tokens("evaluation", arguments.held_out_tokens)
    evaluator = model.evaluator("module")
    space = evaluator.live.space
    rng = np.random.default_rng(arguments.seed)
    sets = [
        (i, genome)
        for i, budget in enumerate(budgets)
        for genome in random_mixes(space, budget, num_candidates=arguments.trials, rng=rng)
    ]
    of_sets = [(i, measure_supersets(evaluator, tokens, fewer)) for i, fewer in track(sets, "random sets and their supersets")]
    tallies = [tally(sparsity, [pairs for place, pairs in of_sets if place == i]) for i, sparsity in enumerate(arguments.sparsity)]
    best = select([pairs for _, pairs in of_sets], arguments.pairs)
    if not best:
        raise EvoPressError("no set leaves a module to remove: give a lower --sparsity")
    best = [climb(evaluator, tokens, pair, steps=arguments.steps) for pair in track(best, "growing the best pairs")]
    (dense,) = perplexities(evaluator, [None], tokens)
    lines: list[tuple[str, Genome | None, Genome | None, float]] = [("dense", None, None, dense)]
    for i, pair in enumerate(best, start=1):
        lines += [(f"A{i}", pair.fewer, None, pair.fewer_perplexity), (f"B{i}", pair.more, pair.fewer, pair.more_perplexity)]
    scores = measure_held_out(evaluator, [genome for _, genome, _, _ in lines], held_out, what="measuring on held-out text")
    rows = [Row(*line, measured) for line, measured in zip(lines, scores, strict=True)]
    about = (
        f"{model.about} {tokens.numel():,} search tokens choose, {held_out.numel():,} held-out tokens judge; "
        f"up to {1 + arguments.steps} modules more in B."
    )
    publish(arguments.out, TITLE, render(about, tallies, space, rows), [_plain(space, row) for row in rows])
    draw(space, rows, arguments.out)


def _plain(space: Space, row: Row) -> dict[str, Any]:
    gone = [unit.name for unit, level in zip(space.units, row.genome or (0,) * len(space), strict=True) if level]
    return {
        "set": row.name,
        "modules_dropped": len(gone),
        "search_perplexity": row.search_perplexity,
        "perplexity": row.scores.perplexity,
        "kl": row.scores.kl,
        "dropped": " ".join(gone),
    }


if __name__ == "__main__":
    run(main)
