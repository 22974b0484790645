"""Average what found genomes spend by projection and by block, and judge what the paper says of its profiles.

Source: paper, sections 4.2 and 4.3, appendices E.2 and F.3, Figures 8, 9, 11 and 12.

    python -m experiments.guided.measure --recipes best --targets 2.5 --rows evolution guided --results multirun/p.csv
    python -m experiments.profile.run multirun/guided/quant-best-2.5-evolution-[012] multirun/guided/quant-best-2.5-guided-[012]
    python -m experiments.profile.run --draw           # the picture, from results.csv

Reads finished runs of methods quant and sparsity, and of their level databases the manifests. Runs that differ in their seed alone
are one profile. Writes results.csv (a row per profile and projection or block), table.md and profile.png.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from evopress.currencies import QUANT, SPARSITY
from evopress.errors import EvoPressError
from evopress.levels.store import read_manifest, space_of
from evopress.progress import counted
from evopress.reporting.drawing import COLOURS, MARKERS, STYLES, legend_below, new_figure, open_frame, save, search_styles
from evopress.reporting.figures import averages, measure, measure_name, measured_size
from evopress.reporting.records import read_genome, read_json
from evopress.reporting.tables import significant
from evopress.units import Genome, Space
from experiments.claims import SURE, chance
from experiments.depth import publish, run
from experiments.heldout.run import Run, finished_runs
from experiments.profile.statements import STATEMENTS, Profile, Statement
from experiments.scripts import existing
from experiments.single_runs import has_finished
from experiments.sweeps import Job
from experiments.tables import about_sweep, markdown

FOLDER = Path(__file__).parent
TITLES = {QUANT: "Figures 11 and 12: profiles of bits", SPARSITY: "Figures 8 and 9: profiles of sparsity"}
"""By method; the paper has profiles of no other."""


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone."""

    name: str
    """"evolution, 2.5 bits, best levels"."""
    method: str
    measure: str
    profiles: dict[str, Profile]
    """By seed; they are added as runs are read."""


def profile_of(space: Space, genome: Genome) -> Profile:
    """Average a genome.

    Raises: EvoPressError if it is of less than two blocks.
    """
    inside = {unit.block for unit in space.units if not unit.is_outside}
    if len(inside) < 2:
        raise EvoPressError(f"a profile needs at least two blocks that have units, and this model has {len(inside)}")
    by_block = averages(space, genome, by="block")
    whole = measure(space, space.cost(genome), sum(measured_size(space, unit) for unit in space.units))
    return Profile(whole, averages(space, genome, by="kind"), [by_block[block] for block in sorted(inside)])


def space_of_run(found: Run) -> Space:
    """Read the units and levels that a run's genome is of.

    Raises: EvoPressError if its level database is not there.
    """
    root = Path(found.settings.level_db.root).expanduser()
    folders = sorted(path.parent for path in root.glob(f"*/*-{found.database}/manifest.json"))
    if not folders:
        raise EvoPressError(
            f"{found.folder} was found on level database {found.database}, which is not in {root}: its manifest says what "
            "the units are; set EVOPRESS_CACHE to where it lies, or build it again"
        )
    return space_of(read_manifest(folders[0]))


def target_of(found: Run) -> str:
    """Say what a run was to reach: "2.5 bits", "70% sparsity", or a size as it was typed."""
    bits, sparsity = found.settings.bits, found.settings.sparsity
    if bits is not None:
        return f"{bits:g} bits"
    return found.axes["target"] if sparsity is None else f"{100 * sparsity:g}% sparsity"


def read_groups(folders: Sequence[Path]) -> tuple[list[Group], list[Job]]:
    """Read finished runs, those together that differ in their seed alone.

    Raises: EvoPressError if one is not finished, is of another method, or was given twice.
    """
    for folder in folders:
        if not has_finished(folder) or not (folder / "genome.json").is_file():
            raise EvoPressError(
                f"{folder} is no finished run with a genome: run python -m evopress resume={folder} first, or leave it out"
            )
    groups: dict[tuple[str, ...], Group] = {}
    jobs: list[Job] = []
    for found in finished_runs(folders, {}):
        if (method := str(found.settings.method.name)) not in TITLES:
            raise EvoPressError(f"{found.folder} is of method {method}: the paper has profiles of {' and '.join(TITLES)}")
        space = space_of_run(found)
        genome = read_genome(found.folder / "genome.json", space, database=found.database)
        name = f"{found.strategy}, {target_of(found)}, {found.axes['levels']} levels"
        model = str(found.settings.model.name or found.settings.model.path)
        group = groups.setdefault((model, name), Group(name, method, measure_name(space), {}))
        if found.axes["seed"] in group.profiles:
            raise EvoPressError(f"{found.folder}: seed {found.axes['seed']} of {name} is there twice; leave one out")
        group.profiles[found.axes["seed"]] = profile_of(space, genome)
        jobs.append(Job(found.folder, found.axes, asdict(found.settings), {}, read_json(found.folder / "environment.json")))
    if len({model for model, _ in groups}) > 1 or len({group.measure for group in groups.values()}) > 1:
        raise EvoPressError("these runs are of several models or methods: give those of one, and the others with another --out")
    return list(groups.values()), jobs


def spread(values: Sequence[float]) -> str:
    """Show a mean with its least and greatest value."""
    mean = significant(statistics.fmean(values), 3)
    return mean if len(values) < 2 else f"{mean} ({significant(min(values), 3)}..{significant(max(values), 3)})"


def by_projection(groups: Sequence[Group]) -> str:
    """Lay out the averages of each projection, and how far those of the blocks are from each other."""
    kinds = list(next(iter(groups[0].profiles.values())).kinds)
    body = []
    for group in groups:
        profiles = list(group.profiles.values())
        cells = [spread([profile.kinds[kind] for profile in profiles]) for kind in kinds]
        body.append([group.name, *cells, spread([statistics.stdev(profile.blocks) for profile in profiles]), str(len(profiles))])
    return markdown([groups[0].measure, *kinds, "standard deviation of the blocks", "seeds"], body)


def judged(groups: Sequence[Group]) -> str:
    """Lay out the paper's statements with what is found here."""
    body = []
    for group in groups:
        first = next(iter(group.profiles.values()))
        for statement in (each for each in STATEMENTS if each.method == group.method and each.fits(first)):
            body.append([group.name, statement.where, statement.says, *_against(statement, group.profiles)])
    return markdown(["found", "paper", "it says", "here", "against", "difference", "holds on", "verdict"], body)


def _against(statement: Statement, profiles: Mapping[str, Profile]) -> list[str]:
    difference, verdict = statement.difference(profiles), statement.verdict(profiles)
    if (p := chance(difference)) > SURE and verdict in ("holds", "does not hold"):
        verdict += f" (p={p:.2f})"
    error = f" ± {significant(difference.standard_error, 2)}" if difference.decided else ""
    numbers = [spread([of(profile) for profile in profiles.values()]) for of in (statement.one, statement.other)]
    holding = f"{statement.num_holding(profiles)} of {counted(len(profiles), 'seed')}"
    return [*numbers, f"{significant(difference.mean, 3)}{error}", holding, verdict]


def rows(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Return a row per group and projection or block, with its difference to the run's average."""
    found = []
    for group in groups:
        profiles = list(group.profiles.values())
        places: dict[tuple[str, str], list[float]] = {("all", ""): [profile.average for profile in profiles]}
        places |= {("projection", kind): [profile.kinds[kind] for profile in profiles] for kind in profiles[0].kinds}
        places |= {("block", str(i)): [profile.blocks[i] for profile in profiles] for i in range(len(profiles[0].blocks))}
        for (of, place), values in places.items():
            against = [value - profile.average for value, profile in zip(values, profiles, strict=True)]
            row = {"found": group.name, "measure": group.measure, "of": of, "place": place, "seeds": len(values)}
            row |= {"mean": statistics.fmean(values), "min": min(values), "max": max(values)}
            found.append(row | {"against_average": statistics.fmean(against)})
    return found


def draw(results: pd.DataFrame, folder: Path) -> list[Path]:
    """Draw what each projection and each block gets, against the average: means over seeds, with the least and the greatest.

    Args: results: a row for each of `rows`, or what results.csv has.

    Returns: the paths of the PNG and the SVG.
    """
    figure = new_figure(12, 4.3)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.5))
    names = list(dict.fromkeys(results.found))
    looks, bar = search_styles(names), 0.8 / len(names)
    for axis in (left, right):
        open_frame(axis)
        axis.axhline(0, color="#555555", linewidth=0.8)
        axis.set_ylabel(f"{results.measure.iloc[0]}, against the average")
    for index, name in enumerate(names):
        here, look = results[results.found == name], looks[name]
        kinds, blocks = here[here.of == "projection"], here[here.of == "block"]
        at = [place + (index - (len(names) - 1) / 2) * bar for place in range(len(kinds))]
        ends = [(far - near).clip(lower=0) for far, near in ((kinds["mean"], kinds["min"]), (kinds["max"], kinds["mean"]))]
        style: dict[str, Any] = {"color": COLOURS[look], "label": f"{name} ({counted(int(here.seeds.iloc[0]), 'seed')})"}
        left.bar(at, kinds.against_average, bar * 0.92, yerr=ends, error_kw={"elinewidth": 1}, **style)
        places, average = range(len(blocks)), blocks["mean"] - blocks.against_average
        right.fill_between(places, blocks["min"] - average, blocks["max"] - average, color=COLOURS[look], alpha=0.18, linewidth=0)
        style = {"color": COLOURS[look], "linestyle": STYLES[look], "marker": MARKERS[look]}
        right.plot(places, blocks.against_average, markersize=3.5, linewidth=1.6, **style)
        left.set_xticks(range(len(kinds)), kinds.place, rotation=25, ha="right", rotation_mode="anchor")
    left.set_title("by projection", fontsize=10)
    right.set_xlabel("transformer block")
    right.xaxis.get_major_locator().set_params(integer=True)
    right.set_title("by transformer block", fontsize=10)
    legend_below(figure, *left.get_legend_handles_labels(), most=3)
    return save(figure, folder, "profile")


def main(argv: Sequence[str] | None = None) -> None:
    """Read the runs that are named and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN_FOLDER", help="finished runs of one model and method")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder to write to (default: the experiment's own)")
    parser.add_argument("--draw", action="store_true", help="draw the results.csv that is there, read no runs")
    arguments = parser.parse_args(argv)
    if arguments.draw:
        draw(pd.read_csv(existing(arguments.out / "results.csv")), arguments.out)
        return
    if not arguments.runs:
        parser.error("no runs: name folders of finished runs, or give --draw")
    groups, jobs = read_groups(arguments.runs)
    parts = [
        f"{about_sweep(jobs)}\n",
        f"{groups[0].measure.capitalize()}: mean over seeds (least..greatest).\n",
        by_projection(groups),
        "What the paper says of its models, and the difference here, paired by seed; ± is its standard error, and a "
        "difference within two of them is a tie. p is of a paired t test, where that does not bear it out at 5%.\n",
        judged(groups),
    ]
    publish(arguments.out, TITLES[groups[0].method], "\n".join(parts), rows(groups))
    draw(pd.DataFrame(rows(groups)), arguments.out)


if __name__ == "__main__":
    run(main)
