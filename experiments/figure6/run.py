"""Draw which modules the searches of the depth-pruning sweep drop, at every sparsity, beside ShortGPT's blocks.

Source: paper, appendix D.3 and Figure 6.

    python -m evopress +experiment=table9_12
    python -m experiments.figure6.run [--root multirun]

reads the run folders of granularity module in <root>/table9_12 and writes results.csv (a row per sparsity, block and kind of
module), table.md and figure6.png.
"""

from __future__ import annotations

import argparse
import itertools
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evopress.errors import EvoPressError
from evopress.reporting.drawing import new_figure, save
from evopress.reporting.records import read_json
from experiments.depth import publish, run, sweep_options
from experiments.sweeps import Job, describe, expected_jobs, read_sweep
from experiments.tables import about_sweep, markdown

SWEEP = "table9_12"
TITLE = "Figure 6: which modules are dropped"
KINDS = ("attention", "mlp")
FIRST = 2
"""Blocks of which the paper says that they are never pruned."""
_UNIT = re.compile(r"\.(\d+)\.(attention|mlp)$")
_DROP = "drop"

Module = tuple[int, str]
"""Block and kind."""


@dataclass(frozen=True)
class Found:
    """What one seed's search and ShortGPT drop."""

    sparsity: str
    seed: str
    num_blocks: int
    dropped: frozenset[Module]
    shortgpt: frozenset[Module] | None
    """None where the run has no such baseline."""


def read_found(job: Job) -> Found:
    """Read what a job of granularity module drops.

    Raises: EvoPressError if it has no genome, or one of other units.
    """
    units = read_json(job.folder / "genome.json")["units"]
    places = [_UNIT.search(unit["name"]) for unit in units]
    if not units or not all(places):
        raise EvoPressError(f"{job.folder / 'genome.json'} is not of attention and MLP modules: expected method.granularity=module")
    modules = [(int(place[1]), place[2]) for place in places if place]
    dropped = frozenset(module for module, unit in zip(modules, units, strict=True) if unit["label"] == _DROP)
    path = job.folder / "baselines.json"
    genome = read_json(path)["genomes"].get("shortgpt") if path.is_file() else None
    shortgpt = None if genome is None else frozenset(module for module, level in zip(modules, genome, strict=True) if level)
    return Found(job.axes["sparsity"], job.axes["seed"], 1 + max(block for block, _ in modules), dropped, shortgpt)


def share(sets: Sequence[frozenset[Module]], module: Module) -> float:
    """Return the share of sets that have a module."""
    return sum(module in each for each in sets) / len(sets)


def overlap(pairs: Sequence[tuple[frozenset[Module], frozenset[Module]]]) -> float | None:
    """Return the mean share of the smaller set that is in the other, over pairs of sets; None without pairs."""
    shares = [len(one & other) / min(len(one), len(other)) for one, other in pairs if one and other]
    return statistics.fmean(shares) if shares else None


def summarize(found: Sequence[Found]) -> list[str]:
    """Return the cells of one sparsity's row."""
    sets = [each.dropped for each in found]
    modules = [(block, kind) for block in range(found[0].num_blocks) for kind in KINDS]
    always = [module for module in modules if share(sets, module) == 1]
    last = found[0].num_blocks - 1
    whole = [sum(all((block, kind) in each for kind in KINDS) for block in range(last + 1)) for each in sets]
    return [
        f"{100 * float(found[0].sparsity):g}%",
        str(len(found)),
        f"{statistics.fmean(map(len, sets)):g}",
        _module_names(always),
        _percent(overlap(list(itertools.combinations(sets, 2)))),
        _percent(overlap([(each.dropped, each.shortgpt) for each in found if each.shortgpt])),
        f"{statistics.fmean(whole):.1f}",
        f"{statistics.fmean(sum(block < FIRST for block, _ in each) for each in sets):.1f}",
        f"{statistics.fmean(sum(block == last for block, _ in each) for each in sets):.1f}",
    ]


HEADERS = [
    *("sparsity", "seeds", "modules dropped", "dropped by every seed"),
    *("shared by two seeds", "shared with ShortGPT", "whole blocks", f"in the first {FIRST} blocks", "in the last block"),
]


def _module_names(modules: Sequence[Module]) -> str:
    parts = []
    for kind, name in zip(KINDS, ("attention", "MLP"), strict=True):
        blocks = [str(block) for block, of_kind in modules if of_kind == kind]
        if blocks:
            parts.append(f"{name} {' '.join(blocks)}")
    return "; ".join(parts) or "none"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f}%"


def draw(groups: Mapping[str, Sequence[Found]], folder: Path) -> None:
    """Draw a panel per sparsity: blocks across; attention, MLP, and what ShortGPT drops; darker where more seeds drop it."""
    import numpy as np
    from matplotlib.colors import LinearSegmentedColormap

    num_blocks = max(found[0].num_blocks for found in groups.values())
    colours = LinearSegmentedColormap.from_list("dropped", ["#eef2f6", "#0072B2"])
    figure = new_figure(2.6 + 0.28 * num_blocks, 0.8 + 1.5 * len(groups))
    axes = figure.subplots(len(groups), 1, squeeze=False)[:, 0]
    mesh: Any = None
    for axis, found in zip(axes, groups.values(), strict=True):
        sets, theirs = [each.dropped for each in found], [each.shortgpt for each in found if each.shortgpt is not None]
        names = ["attention", "MLP", *(["ShortGPT"] if theirs else [])]
        image = np.full((len(names), found[0].num_blocks), np.nan)
        for block in range(found[0].num_blocks):
            image[:2, block] = [share(sets, (block, kind)) for kind in KINDS]
            if theirs:
                image[2, block] = share(theirs, (block, KINDS[0]))
        edges = np.array([0.0, 1.0, 2.0, 2.25, 3.25])  # ShortGPT's row stands apart
        for first, last in ((0, 2), (2, len(names))):
            if first < last:
                places = edges[[0, 1, 2]] if first == 0 else edges[[3, 4]]
                columns = np.arange(found[0].num_blocks + 1) - 0.5
                mesh = axis.pcolormesh(
                    columns, places, image[first:last], cmap=colours, vmin=0, vmax=1, edgecolors="white", linewidth=0.8
                )
        axis.set_yticks([0.5, 1.5, 2.75][: len(names)], names)
        axis.set_ylim(3.25 if theirs else 2, 0)
        axis.set_xticks(range(0, found[0].num_blocks, max(1, -(-num_blocks // 32))))
        axis.tick_params(length=0, labelsize=8)
        axis.spines[:].set_visible(False)
        seeds = f"{len(found)} seed{'s' if len(found) > 1 else ''}"
        axis.set_title(f"{100 * float(found[0].sparsity):g}% of attention and of MLP modules dropped ({seeds})", fontsize=10)
    axes[-1].set_xlabel("transformer block")
    bar = figure.colorbar(mesh, ax=list(axes), fraction=0.03, pad=0.01)
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}%")
    bar.set_label("share of seeds that drop it")
    bar.outline.set_visible(False)
    save(figure, folder, "figure6")


def rows(groups: Mapping[str, Sequence[Found]]) -> list[dict[str, Any]]:
    """Return a row per sparsity, block and kind of module."""
    return [
        {
            "sparsity": sparsity,
            "block": block,
            "module": kind,
            "seeds": len(found),
            "dropped": share([each.dropped for each in found], (block, kind)),
            **({"shortgpt": share(theirs, (block, kind))} if theirs else {}),
        }
        for sparsity, found in groups.items()
        for theirs in [[each.shortgpt for each in found if each.shortgpt is not None]]
        for block in range(found[0].num_blocks)
        for kind in KINDS
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Read the sweep and write table and figure."""
    parser = argparse.ArgumentParser(description="Draw which modules the searches of depth pruning drop.")
    sweep_options(parser, out=Path(__file__).parent)
    arguments = parser.parse_args(argv)
    folder, expected = arguments.root / SWEEP, expected_jobs(SWEEP)
    sweep = read_sweep(folder, expected)
    jobs = [job for job in sweep.jobs if job.axes["method.granularity"] == "module"]
    if not jobs:
        raise EvoPressError(
            f"no finished job of method.granularity=module lies in {folder}: run python -m evopress +experiment={SWEEP} first"
        )
    groups: dict[str, list[Found]] = {}
    for job in sorted(jobs, key=lambda job: float(job.axes["sparsity"])):
        groups.setdefault(job.axes["sparsity"], []).append(read_found(job))
    parts = [f"{about_sweep(jobs)}\n"]
    if missing := [axes for axes in sweep.missing if axes["method.granularity"] == "module"]:
        parts.append(f"**Half-finished.** Missing: {'; '.join(map(describe, missing))}.\n")
    parts.append("Numbers are means over seeds. ShortGPT drops whole blocks, as many modules of each kind as the search.\n")
    parts.append(markdown(HEADERS, [summarize(found) for found in groups.values()]))
    publish(arguments.out, TITLE, "\n".join(parts), rows(groups))
    draw(groups, arguments.out)


if __name__ == "__main__":
    run(main)
