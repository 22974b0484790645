"""Draw how the searches of a sweep converged: held-out KL and perplexity against generations, candidate tokens and time.

    python -m evopress +experiment=table7
    python -m experiments.convergence table7 [--root multirun]

reads the run folders in <root>/table7 and writes experiments/table7/: convergence.csv with every measurement, and a figure for each
group (convergence_bits-3.0.png and .svg) with a curve per variant of the table: mean over seeds, and their range. So come the
paper's Figures 3 to 5 and 10; `COMPANIONS` says what of other sweeps is drawn beside. Curves and the baselines' lines are of one
text, that which the searches were measured on; it is all of the held-out text unless `evaluation.every_tokens` said less; of jobs
that were told otherwise, those on the text that most have. A sweep that is still going on gives what there is.
"""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from evopress.errors import EvoPressError
from evopress.progress import counted
from evopress.reporting.curve import HeldOutCurve, held_out_curve
from evopress.reporting.drawing import (
    COLOURS,
    MARKERS,
    STYLES,
    log_scale,
    new_figure,
    open_frame,
    save,
    show_tokens,
    time_unit,
)
from evopress.reporting.records import read_records
from evopress.reporting.tables import display_name, is_found, number
from experiments.commands import of_sweep
from experiments.specs import SPECS, Spec
from experiments.sweeps import Job, Sweep, describe
from experiments.tables import SEED, Group, Table, Values, sweep_of, write_csv

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COMPANIONS = {"figure3": ("full search", "table2_sparsity", "evopress")}
"""Experiment to a curve of another sweep that is drawn beside its own: its name there, the sweep, and the variant."""

X_AXES = ("generation", "tokens", "seconds")
KL = "held-out KL"


@dataclass(frozen=True)
class Point:
    """One held-out measurement during a search."""

    x: Mapping[str, float]
    """Of each name in `X_AXES`."""
    values: Mapping[str, float]
    """Measure, named as in the tables ("held-out KL", "ppl wikitext2"), to value."""


Curve = dict[str, list[Point]]
"""Seed to the measurements of its search."""


def curves(sweep: Sweep, spec: Spec) -> dict[Group, dict[str, Curve]]:
    """Return the curves of all variants of a sweep; jobs whose search measured nothing, or on another text, are left out."""
    found: dict[Group, dict[str, Curve]] = {}
    for job, curve in on_one_text(sweep.jobs):
        variant = spec.variant(job.axes, "evopress")
        points = list(_points(curve.records))
        if variant is not None and points:
            group = tuple(job.axes[key] for key in spec.group)
            found.setdefault(group, {}).setdefault(variant, {})[job.axes.get(SEED, "0")] = points
    return found


def on_one_text(jobs: Sequence[Job]) -> list[tuple[Job, HeldOutCurve]]:
    """Return the jobs whose searches were measured on the text that most were, with what they measured.

    The larger text where two have as many.
    """
    found = [(job, of_job(job)) for job in jobs]
    most = _most(curve for _, curve in found)
    return [(job, curve) for job, curve in found if curve.tokens == most]


def _most(found: Iterable[HeldOutCurve]) -> int | None:
    """Return the tokens of the text that most curves are of; None: none says."""
    counts = Counter(curve.tokens for curve in found if curve.tokens is not None)
    return max(counts, key=lambda number: (counts[number], number)) if counts else None


def of_job(job: Job) -> HeldOutCurve:
    """Return what a job's search measured on the way, and its rows on the same text."""
    return held_out_curve(read_records(job.folder / "metrics.jsonl"), job.result["rows"])


def on_curves_text(jobs: Sequence[Job], spec: Spec) -> Values:
    """Return the values of all rows on the text of the curves: not the tables' where searches were measured on less."""
    measured = [(job, [{"name": name, **of} for name, of in curve.rows.items()]) for job, curve in on_one_text(jobs)]
    return Table([replace(job, result={"rows": rows}) for job, rows in measured], spec).values


def text_of(jobs: Sequence[Job]) -> str:
    """Say which text the curves of jobs are of, and how many jobs were measured on another."""
    found = [of_job(job) for job in jobs]
    most = _most(found)
    text = " or ".join(dict.fromkeys(curve.text for curve in found if curve.tokens == most and curve.text))
    of_another = sum(curve.tokens not in (None, most) for curve in found)
    return f"{text}; without {counted(of_another, 'job')} on another text" if of_another else text


def _points(records: Sequence[Mapping[str, Any]]) -> Iterator[Point]:
    for record in records:
        held_out = record.get("held_out") or {}
        numbers = {KL: number(held_out.get("kl"))}
        numbers |= {f"ppl {name}": number(value) for name, value in (held_out.get("perplexity") or {}).items()}
        values = {measure: value for measure, value in numbers.items() if value is not None}
        if values:
            yield Point({name: float(record[name]) for name in X_AXES}, values)


def band(curve: Curve, x: str, measure: str) -> list[tuple[float, float, float, float]]:
    """Return (x, mean, least, greatest) over seeds at every measured x from where all have begun; linear between measurements.

    A search that has ended keeps what it had found while slower ones go on, so that the last mean is that of the ends.
    """
    lines = [[(point.x[x], point.values[measure]) for point in points if measure in point.values] for points in curve.values()]
    lines = [line for line in lines if line]
    if not lines:
        return []
    first = max(line[0][0] for line in lines)
    places = sorted({place for line in lines for place, _ in line if place >= first})
    result = []
    for place in places:
        values = [_at(line, place) for line in lines]
        result.append((place, statistics.fmean(values), min(values), max(values)))
    return result


def _at(line: Sequence[tuple[float, float]], x: float) -> float:
    """Interpolate a line at an x from its first on; beyond its last it stays."""
    before = max(i for i, (place, _) in enumerate(line) if place <= x)
    (x0, y0), (x1, y1) = line[before], line[min(before + 1, len(line) - 1)]
    return y0 if x1 == x0 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def draw(
    group: Mapping[str, Curve],
    baselines: Mapping[str, Mapping[str, float]],
    folder: Path,
    name: str,
    *,
    title: str,
    timed: bool = True,
) -> list[Path]:
    """Draw a row of panels per measure: against generations, candidate tokens and, where times are told, time.

    Args:
        group: variant to its curve.
        baselines: measure to the value of each baseline on the curves' text; drawn as horizontal lines.

    Returns: the paths of the PNG and the SVG.
    """
    measures = list(dict.fromkeys(m for curve in group.values() for points in curve.values() for p in points for m in p.values))
    most = max(point.x["seconds"] for curve in group.values() for points in curve.values() for point in points)
    unit, unit_name = time_unit(most)
    names = list(dict.fromkeys(name for values in baselines.values() for name in values))
    colours = COLOURS[len(group) :] + COLOURS[: len(group)]  # those that no curve has, as far as there are so many
    dashes = STYLES[1:]
    looks = {name: {"color": colours[i % len(colours)], "linestyle": dashes[i % len(dashes)]} for i, name in enumerate(names)}
    across = X_AXES if timed else tuple(x for x in X_AXES if x != "seconds")
    figure = new_figure(4 * len(across), 1.4 + 3.2 * len(measures))
    axes = figure.subplots(len(measures), len(across), sharey="row", squeeze=False)
    for measure, row in zip(measures, axes, strict=True):
        seen: list[float] = []
        for axis, x in zip(row, across, strict=True):
            seen += _panel(axis, group, x, measure, scale=unit if x == "seconds" else 1.0)
            for baseline, value in baselines.get(measure, {}).items():
                axis.axhline(value, label=display_name(baseline), linewidth=1.3, **looks[baseline])
                seen.append(value)
            open_frame(axis)
            axis.set_xlabel({"tokens": "candidate tokens", "seconds": unit_name}.get(x, x))
            if x == "tokens":
                axis.xaxis.set_major_formatter(show_tokens)
            elif x == "generation":
                axis.xaxis.get_major_locator().set_params(integer=True)
        row[0].set_ylabel("KL divergence (nats per token)" if measure == KL else f"perplexity, {measure.removeprefix('ppl ')}")
        if seen and min(seen) > 0 and max(seen) > 4 * min(seen):
            log_scale(row[0])
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(title, fontsize=12)
    return save(figure, folder, name)


def _panel(axis: Axes, group: Mapping[str, Curve], x: str, measure: str, *, scale: float) -> list[float]:
    """Draw all variants' means and ranges in one panel and return the values drawn."""
    seen: list[float] = []
    for index, (variant, curve) in enumerate(group.items()):
        if not (points := band(curve, x, measure)):
            continue
        colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
        xs = [point[0] / scale for point in points]
        means, least, greatest = ([point[i] for point in points] for i in (1, 2, 3))
        axis.plot(xs, means, label=display_name(variant), color=colour, marker=marker, markersize=3.5, linewidth=1.8, zorder=3)
        axis.fill_between(xs, least, greatest, color=colour, alpha=0.15, linewidth=0, zorder=2)
        seen += [*least, *greatest]
    return seen


def make_figures(experiment: str, *, root: Path, out: Path) -> tuple[Sweep, list[Path]]:
    """Read a sweep, write its measurements and draw its figures; return the sweep and the files.

    Args:
        root: folder that holds the sweeps' folders.
        out: folder to write to.

    Raises: EvoPressError if no search of it has measured anything, or the jobs do not belong together.
    """
    spec, sweep = SPECS[experiment], sweep_of(experiment, root)
    if not curves(sweep, spec):
        raise EvoPressError(
            f"no finished search in {root / experiment} has held-out measurements: run python -m evopress +experiment={experiment} "
            "first, with evaluation.every above 0"
        )
    return sweep, draw_sweep(sweep, spec, out, beside=_companion(experiment, root))


def draw_sweep(sweep: Sweep, spec: Spec, out: Path, *, beside: Mapping[str, Curve] = MappingProxyType({})) -> list[Path]:
    """Write the measurements of a sweep's searches and draw a figure for each group; nothing where none measured anything.

    Args: beside: curves of other sweeps that are drawn too.

    Returns: the files.
    """
    found = curves(sweep, spec)
    if not found:
        return []
    values, text = on_curves_text(sweep.jobs, spec), text_of(sweep.jobs)
    paths = [out / "convergence.csv"]
    write_csv(paths[0], list(_rows(found, beside, spec)))
    for group, variants in found.items():
        where = dict(zip(spec.group, group, strict=True))
        rows = {
            variant: of
            for variant, of in values.get(group, {}).items()
            if variant not in variants and variant not in spec.apart and not is_found(variant)
        }
        baselines = {
            measure: {variant: statistics.fmean(of[measure].values()) for variant, of in rows.items() if measure in of}
            for measure in dict.fromkeys(measure for of in rows.values() for measure in of)
        }
        name = "_".join(["convergence", *(re.sub(r"[^\w.+-]+", "-", f"{key}-{value}") for key, value in where.items())])
        seeds = max(len(curve) for curve in variants.values())
        about = f"mean and range, {seeds} seed{'s' if seeds > 1 else ''}; {text}{untimed(spec)}"
        title = f"{spec.title}{', ' if where else ''}{describe(where)}\n({about})"
        paths += draw({**variants, **beside}, baselines, out, name, title=title, timed=not spec.shares)
    return paths


def untimed(spec: Spec) -> str:
    """Say why no time is drawn: searches that another experiment has too may have taken their fitnesses from the archive."""
    if not spec.shares:
        return ""
    return f";\nno time: {SPECS[spec.shares].title.partition(':')[0]} has some of these searches, whose fitnesses are measured once"


def _companion(experiment: str, root: Path) -> dict[str, Curve]:
    """Return the curve that another sweep lends, by its name; nothing where there is none, or that sweep has not been run."""
    if experiment not in COMPANIONS:
        return {}
    name, other, variant = COMPANIONS[experiment]
    lent = [variants[variant] for variants in curves(sweep_of(other, root), SPECS[other]).values() if variant in variants]
    return {name: lent[0]} if lent else {}


def _rows(found: Mapping[Group, Mapping[str, Curve]], beside: Mapping[str, Curve], spec: Spec) -> Iterator[dict[str, Any]]:
    for group, variants in found.items():
        for variant, curve in {**variants, **beside}.items():
            for seed, points in curve.items():
                for point in points:
                    yield {**dict(zip(spec.group, group, strict=True)), "method": variant, SEED: seed, **point.x, **point.values}


def main() -> None:
    """Draw the figures of the sweep that is named on the command line."""

    def make(experiment: str, root: Path, out: Path) -> tuple[Sweep, str]:
        sweep, paths = make_figures(experiment, root=root, out=out)
        said = [str(path) for path in paths]
        if experiment in COMPANIONS and not _companion(experiment, root):
            said.insert(0, f"not drawn: {COMPANIONS[experiment][0]}, which is of {COMPANIONS[experiment][1]}")
        return sweep, "\n".join(said)

    of_sweep("Draw how the searches of a sweep converged, also of a half-finished one.", make)


if __name__ == "__main__":
    main()
