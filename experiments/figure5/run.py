"""Draw how the searches of the depth-pruning sweep converge, beside the baselines' lines.

Source: paper, appendix D.2 and Figure 5 (25 and 50% of the blocks of Mistral-7B-v0.3).

    python -m evopress +experiment=table9_12
    python -m experiments.figure5.run [--root multirun] [--sparsity 0.25 0.5]

reads the run folders in <root>/table9_12 and writes results.csv (a row per measurement), table.md and figure5.png.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evopress.errors import EvoPressError
from evopress.reporting.differences import Difference
from evopress.reporting.drawing import COLOURS, STYLES, log_scale, new_figure, open_frame, save, styles, time_unit
from evopress.reporting.tables import display_name, significant, told
from experiments.convergence import KL, X_AXES, Curve, band, curves, on_curves_text, text_of
from experiments.depth import publish, run, sweep_options
from experiments.specs import SPECS
from experiments.sweeps import describe, expected_jobs, read_sweep
from experiments.tables import about_sweep, markdown

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SWEEP = "table9_12"
TITLE = "Figure 5: how the searches of depth pruning converge"
SEARCHES = ("evopress", "evopress_blocks")
_OFF_SCALE = 4.0
"""A baseline so many times worse than the worst of the curves is named and not drawn."""

Values = Mapping[str, Mapping[str, Mapping[str, float]]]
"""Variant, measure and seed to the value at the end of the runs, on the text of the curves."""


@dataclass(frozen=True)
class Panel:
    """One sparsity."""

    sparsity: str
    searches: Mapping[str, Curve]
    values: Values

    def baselines(self, measure: str) -> dict[str, float]:
        """Return the values of what was not searched, means over seeds, best first."""
        of = {name: statistics.fmean(variant[measure].values()) for name, variant in self.values.items() if measure in variant}
        return {name: of[name] for name in sorted(of, key=of.__getitem__) if name not in (*SEARCHES, "dense")}

    def at_seeds(self, name: str) -> Mapping[str, float]:
        """Return what a variant's KL divergence ends at on each seed."""
        return self.values.get(name, {}).get(KL, {})


def overtakes(points: Sequence[tuple[float, float, float, float]], value: float) -> float | None:
    """Return the first x at which a curve's mean (see `band`) is below a value; None if it never is."""
    return next((x for x, mean, *_ in points if mean < value), None)


def table(panels: Sequence[Panel]) -> str:
    """Say when each search is better than the best baseline in the mean, and whether it is so at its end, paired by seed."""
    headers = ["sparsity", "search", "best baseline", "its KL", "better from generation", "better after", "final KL", "difference"]
    body = []
    for panel in panels:
        best, its_kl = next(iter(panel.baselines(KL).items()), ("", math.nan))
        for name, curve in panel.searches.items():
            seconds, generation = (overtakes(band(curve, x, KL), its_kl) for x in ("seconds", "generation"))
            final = panel.at_seeds(name)
            body.append(
                [
                    f"{100 * float(panel.sparsity):g}%",
                    display_name(name),
                    display_name(best) if best else "",
                    significant(its_kl) if best else "",
                    "never" if generation is None else f"{generation:g}",
                    "never" if seconds is None else f"{seconds:.0f} s",
                    significant(statistics.fmean(final.values())) if final else "",
                    told(Difference.of(final, panel.at_seeds(best)), min),
                    str(len(curve)),
                ]
            )
    return markdown([*headers, "seeds"], body)


def draw(panels: Sequence[Panel], folder: Path) -> None:
    """Draw a column per sparsity, a row per measure: means and ranges of the searches over time, baselines as lines."""
    points = [point for panel in panels for curve in panel.searches.values() for of_seed in curve.values() for point in of_seed]
    measures = list(dict.fromkeys(measure for point in points for measure in point.values))
    looks = styles(dict.fromkeys(name for panel in panels for measure in measures for name in panel.baselines(measure)))
    unit, unit_name = time_unit(max(point.x["seconds"] for point in points))
    figure = new_figure(5.4 * len(panels), 1.3 + 3.3 * len(measures))
    axes = figure.subplots(len(measures), len(panels), squeeze=False)
    legend: dict[str, Any] = {}
    for measure, row in zip(measures, axes, strict=True):
        for panel, axis in zip(panels, row, strict=True):
            _draw_panel(axis, panel, measure, looks, seconds=unit)
            axis.set_xlabel(unit_name)
            handles, labels = axis.get_legend_handles_labels()
            legend |= {label: handle for label, handle in zip(labels, handles, strict=True) if label not in legend}
        row[0].set_ylabel("KL divergence (nats per token)" if measure == KL else f"perplexity, {measure.removeprefix('ppl ')}")
    for panel, axis in zip(panels, axes[0], strict=True):
        axis.set_title(f"{100 * float(panel.sparsity):g}% of the modules dropped", fontsize=11)
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=4, frameon=False)
    save(figure, folder, "figure5")


def _draw_panel(axis: Axes, panel: Panel, measure: str, looks: Mapping[str, int], *, seconds: float) -> None:
    """Draw one measure at one sparsity.

    Args:
        looks: colour and line of each baseline by index.
        seconds: of the unit of time.
    """
    seen: list[float] = []
    for name, curve in panel.searches.items():
        points = band(curve, "seconds", measure)
        style: dict[str, Any] = {"color": COLOURS[0], "marker": "o"} if name == SEARCHES[0] else {"color": "#000000", "marker": "s"}
        xs = [x / seconds for x, *_ in points]
        means, least, greatest = ([point[i] for point in points] for i in (1, 2, 3))
        axis.plot(xs, means, label=display_name(name), markersize=3.5, linewidth=2, zorder=3, **style)
        axis.fill_between(xs, least, greatest, color=style["color"], alpha=0.15, linewidth=0)
        seen += [*least, *greatest]
    off = []
    for name, value in panel.baselines(measure).items():
        if seen and value > _OFF_SCALE * max(seen):
            off.append(f"{display_name(name)} {significant(value, 3)}")
            continue
        index = looks[name]
        dashes = STYLES[1 + index % (len(STYLES) - 1)]
        axis.axhline(value, label=display_name(name), color=COLOURS[index], linestyle=dashes, linewidth=1.4)
        seen.append(value)
    if off:
        text = "off the scale:\n" + "\n".join(off)
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
        axis.text(0.98, 0.97, text, transform=axis.transAxes, ha="right", va="top", fontsize=7, bbox=box, zorder=5)
    if seen and min(seen) > 0 and max(seen) > 4 * min(seen):
        log_scale(axis)
    open_frame(axis)


def rows(panels: Sequence[Panel]) -> list[dict[str, Any]]:
    """Return a row per measurement of every seed."""
    return [
        {"sparsity": panel.sparsity, "search": name, "seed": seed, **{x: point.x[x] for x in X_AXES}, **point.values}
        for panel in panels
        for name, curve in panel.searches.items()
        for seed, points in curve.items()
        for point in points
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Read the sweep and write table and figure."""
    parser = argparse.ArgumentParser(description="Draw how the searches of depth pruning converge.")
    sweep_options(parser, out=Path(__file__).parent)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.25, 0.5], help="default 0.25 0.5")
    arguments = parser.parse_args(argv)
    folder, spec = arguments.root / SWEEP, SPECS[SWEEP]
    sweep = read_sweep(folder, expected_jobs(SWEEP))
    jobs = [job for job in sweep.jobs if float(job.axes["sparsity"]) in arguments.sparsity]
    values = on_curves_text(jobs, spec)
    panels = []
    for (sparsity,), searches in curves(sweep, spec).items():
        if float(sparsity) not in arguments.sparsity:
            continue
        panels.append(Panel(sparsity, searches, values.get((sparsity,), {})))
    if not panels:
        wanted = ", ".join(f"{sparsity:g}" for sparsity in arguments.sparsity)
        raise EvoPressError(
            f"no finished search at sparsity {wanted} in {folder} has held-out measurements: run python -m evopress "
            f"+experiment={SWEEP} first, with evaluation.every above 0"
        )
    panels.sort(key=lambda panel: float(panel.sparsity))
    parts = [f"{about_sweep(jobs)}\n"]
    if missing := [axes for axes in sweep.missing if float(axes["sparsity"]) in arguments.sparsity]:
        parts.append(f"**Half-finished.** Missing: {'; '.join(map(describe, missing))}.\n")
    parts.append(
        f"Curves, baselines and final KL are of one text: {text_of(jobs)}. Better from where the mean over seeds is below the "
        "baseline; the difference is that of the ends, paired by seed, and within two standard errors (±) a tie.\n"
    )
    publish(arguments.out, TITLE, "\n".join([*parts, table(panels)]), rows(panels))
    draw(panels, arguments.out)


if __name__ == "__main__":
    run(main)
