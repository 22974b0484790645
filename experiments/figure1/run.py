"""Compare searches over pairs of blocks with the optimum that the exhaustive search found.

Source: paper, section 3 and Figure 1. The Hamming distance counts pairs of which one genome drops the one and the other another:
half the number of units in which they differ.

    python -m evopress +experiment=figure1
    python -m experiments.figure1.run [--root multirun]

reads the run folders in <root>/figure1 and writes results.csv (a row per seed and generation), table.md and figure1.png.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evopress.errors import EvoPressError
from evopress.reporting.drawing import COLOURS, new_figure, open_frame, save
from evopress.reporting.records import read_json, read_records
from evopress.reporting.tables import number, significant
from evopress.units import Genome
from experiments.depth import publish, run, sweep_options
from experiments.sweeps import Job, describe, expected_jobs, read_sweep
from experiments.tables import about_sweep, markdown

EXPERIMENT = "figure1"
TITLE = "Figure 1: pairs of blocks, the search against the optimum"


def distance(one: Genome, other: Genome) -> int:
    """Count the exchanges of a dropped for a kept unit that turn one genome into another that drops as many."""
    return sum(a != b for a, b in zip(one, other, strict=True)) // 2


@dataclass(frozen=True)
class Search:
    """One seed's search and the optimum of its space; lists have an entry per generation, from 0."""

    sparsity: str
    seed: str
    optimum: Genome
    genomes: tuple[Genome, ...]
    fitnesses: tuple[float | None, ...]
    evaluations: tuple[int, ...]
    """Candidates evaluated so far, the parents' again in each generation."""
    landscape: Mapping[Genome, float]
    """Fitness of every genome of the space; empty where the exhaustive search's file is gone."""

    @property
    def distances(self) -> list[int]:
        return [distance(genome, self.optimum) for genome in self.genomes]

    @property
    def reached(self) -> int | None:
        """The first generation whose winner is the optimum."""
        return next((generation for generation, genome in enumerate(self.genomes) if genome == self.optimum), None)

    @property
    def rank(self) -> int | None:
        """How many genomes of the space are fitter than the found one, plus one."""
        mine = self.landscape.get(self.genomes[-1])
        return None if mine is None else 1 + sum(fitness < mine for fitness in self.landscape.values())


def read_search(job: Job) -> Search:
    """Read a job of the sweep; raise EvoPressError if its search or the exhaustive one is missing."""
    records = read_records(job.folder / "metrics.jsonl")
    genomes = read_json(job.folder / "baselines.json").get("genomes", {})
    if not records or "exhaustive" not in genomes:
        what = "search" if not records else "exhaustive search"
        raise EvoPressError(f"{job.folder} has no {what}: run python -m evopress resume={job.folder} with all its stages")
    optimum = tuple(map(int, genomes["exhaustive"]))
    found = tuple(tuple(map(int, record["genome"])) for record in records)
    fitnesses = tuple(number(record["fitness"]) for record in records)
    return Search(
        sparsity=job.axes["sparsity"],
        seed=job.axes["seed"],
        optimum=optimum,
        genomes=found,
        fitnesses=fitnesses,
        evaluations=tuple(record["evaluations"] for record in records),
        landscape=read_landscape(Path(job.result["database"]["path"]), optimum, dict(zip(found, fitnesses, strict=True))),
    )


def read_landscape(database: Path, optimum: Genome, seen: Mapping[Genome, float | None]) -> dict[Genome, float]:
    """Return the fitness of every genome, from what the exhaustive search left beside the manifest; empty if that is gone.

    Searches of other targets and text lie there too: the one is taken that has this optimum and agrees, to 3%, with the fitnesses
    that this search saw.
    """
    for path in sorted(database.glob("exhaustive-*.jsonl")):
        measured = {
            tuple(map(int, genome)): float(fitness)
            for record in read_records(path)
            for genome, fitness in zip(record["genomes"], record["fitnesses"], strict=True)
            if fitness is not None
        }
        if optimum not in measured or min(measured, key=measured.__getitem__) != optimum:
            continue
        pairs = [(measured[genome], fitness) for genome, fitness in seen.items() if genome in measured and fitness is not None]
        if pairs and all(abs(mine - theirs) <= 0.03 * abs(theirs) + 1e-6 for mine, theirs in pairs):
            return measured
    return {}


def table(searches: Sequence[Search]) -> str:
    """Lay out the searches of one sparsity, a row per seed, after a sentence on all of them."""
    first = searches[0]
    reached = [search.reached for search in searches if search.reached is not None]
    size = f", {len(first.landscape):,} genomes" if first.landscape else ""
    took = f", in generation {statistics.median(reached):g} at the median ({min(reached)} to {max(reached)})" if reached else ""
    best = first.landscape.get(first.optimum)
    headers = ["seed", "optimum reached in generation", "candidates evaluated by then"]
    headers += ["final Hamming distance", "final rank", "final KL", "KL over the optimum's"]
    body = []
    for search in searches:
        fitness, generation = search.fitnesses[-1], search.reached
        body.append(
            [
                search.seed,
                "never" if generation is None else str(generation),
                "" if generation is None else f"{search.evaluations[generation]:,}",
                str(search.distances[-1]),
                "" if search.rank is None else str(search.rank),
                "" if fitness is None else significant(fitness),
                "" if fitness is None or not best else f"{fitness / best:.3f}",
            ]
        )
    return (
        f"**sparsity={first.sparsity}: {sum(first.optimum)} of {len(first.optimum)} pairs{size}.** The optimum was reached by "
        f"{len(reached)} of {len(searches)} searches{took}.\n\n" + markdown(headers, body)
    )


def draw(groups: Mapping[str, Sequence[Search]], folder: Path) -> None:
    """Draw distance and fitness by generation: a row per sparsity, a thin line per seed, a thick one for their mean."""
    figure = new_figure(10.5, 0.9 + 2.7 * len(groups))
    axes = figure.subplots(len(groups), 2, squeeze=False)
    for (left, right), searches in zip(axes, groups.values(), strict=True):
        length = min(len(search.genomes) for search in searches)
        generations = range(length)
        distances = [search.distances[:length] for search in searches]
        fitnesses = [[f for f in search.fitnesses[:length] if f is not None] for search in searches]
        fitnesses = [values for values in fitnesses if len(values) == length]
        for axis, curves, colour in ((left, distances, COLOURS[0]), (right, fitnesses, COLOURS[1])):
            for curve in curves:
                axis.plot(generations, curve, color=colour, linewidth=0.9, alpha=0.35)
            if curves:
                means = [statistics.fmean(values) for values in zip(*curves, strict=True)]
                axis.plot(generations, means, color=colour, linewidth=2.2, label=f"mean of {len(curves)} seeds")
            open_frame(axis)
            axis.xaxis.get_major_locator().set_params(integer=True)
        first = searches[0]
        if best := first.landscape.get(first.optimum):
            right.axhline(best, color="#000000", linestyle="--", linewidth=1.2, label="optimum")
        left.yaxis.get_major_locator().set_params(integer=True)
        left.set_ylim(bottom=0)
        left.set_ylabel("Hamming distance (pairs)")
        right.set_ylabel("KL divergence (nats per token)")
        title = f"{sum(first.optimum)} of {len(first.optimum)} pairs dropped"
        left.set_title(f"{title}: distance to the optimum", fontsize=10)
        right.set_title(f"{title}: fitness", fontsize=10)
        right.legend(frameon=False)
    for axis in axes[-1]:
        axis.set_xlabel("generation")
    save(figure, folder, "figure1")


def rows(searches: Sequence[Search]) -> list[dict[str, Any]]:
    """Return a row per seed and generation."""
    return [
        {
            "sparsity": search.sparsity,
            "seed": search.seed,
            "generation": generation,
            "hamming_distance": search.distances[generation],
            "fitness": search.fitnesses[generation],
            "evaluations": search.evaluations[generation],
        }
        for search in searches
        for generation in range(len(search.genomes))
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Read the sweep and write its table and figure."""
    parser = argparse.ArgumentParser(description="Compare searches over pairs of blocks with the optimum.")
    sweep_options(parser, out=Path(__file__).parent)
    arguments = parser.parse_args(argv)
    folder = arguments.root / EXPERIMENT
    sweep = read_sweep(folder, expected_jobs(EXPERIMENT))
    if not sweep.jobs:
        raise EvoPressError(f"no finished job lies in {folder}: run python -m evopress +experiment={EXPERIMENT} first")
    groups: dict[str, list[Search]] = {}
    for job in sweep.jobs:
        groups.setdefault(job.axes["sparsity"], []).append(read_search(job))
    parts = [f"{about_sweep(sweep.jobs)}\n"]
    if sweep.missing:
        parts.append(f"**Half-finished.** Missing: {'; '.join(map(describe, sweep.missing))}.\n")
    parts += [table(searches) for searches in groups.values()]
    publish(arguments.out, TITLE, "\n".join(parts), rows([search for searches in groups.values() for search in searches]))
    draw(groups, arguments.out)


if __name__ == "__main__":
    run(main)
