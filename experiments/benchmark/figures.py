"""The figures of the benchmark: where the time goes, and how it grows. Without matplotlib they are left out with a sentence."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NONE = "matplotlib is not installed: the figures are left out."


def where_time_goes(rows: Sequence[Mapping[str, Any]], folder: Path) -> str:
    """Draw a stacked bar per profiled row; return a sentence if it cannot be drawn."""
    if not _has_matplotlib():
        return NONE
    from evopress.reporting.drawing import COLOURS, new_figure, open_frame

    names = list(dict.fromkeys(str(row["row"]) for row in rows))
    operators = list(dict.fromkeys(str(row["operator"]) for row in rows))
    figure = new_figure(9, 1.8 + 0.7 * len(names))
    axis = figure.subplots()
    left = [0.0] * len(names)
    for i, operator in enumerate(operators):
        shares = [sum(row["share"] for row in rows if row["row"] == name and row["operator"] == operator) for name in names]
        axis.barh(
            names,
            [100 * share for share in shares],
            left=left,
            label=operator,
            color=COLOURS[i % len(COLOURS)],
            alpha=1.0 if i < 7 else 0.5,
            height=0.6,
        )
        left = [start + 100 * share for start, share in zip(left, shares, strict=True)]
    axis.set_xlabel("share of the time (%)")
    axis.set_xlim(0, 100)
    axis.invert_yaxis()
    open_frame(axis)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize="small")
    _save(figure, folder, "where_time_goes")
    return ""


def growth(rows: Sequence[Mapping[str, Any]], folder: Path) -> str:
    """Draw time and memory against every axis, both logarithmic, beside the slope that is promised; return a sentence if it
    cannot be drawn."""
    if not _has_matplotlib():
        return NONE
    from evopress.reporting.drawing import COLOURS, MARKERS, log_scale, new_figure, open_frame

    axes_names = list(dict.fromkeys(str(row["axis"]) for row in rows))
    works = list(dict.fromkeys(str(row["work"]) for row in rows))
    figure = new_figure(3.3 * len(axes_names), 6.6)
    grid = figure.subplots(2, len(axes_names), squeeze=False)
    for line, (measure, unit) in enumerate((("seconds", 1.0), ("bytes", 1e6))):
        for column, name in enumerate(axes_names):
            axis = grid[line][column]
            for i, work in enumerate(works):
                points = [row for row in rows if row["axis"] == name and row["work"] == work and row[measure] > 0]
                if not points:
                    continue
                at_the_end, promised = (points[0][f"{measure}_{word}"] for word in ("at_the_end", "promised"))
                label = f"{work}, exponent {at_the_end:.2f} at the end"
                xs, ys = [row["value"] for row in points], [row[measure] / unit for row in points]
                axis.plot(xs, ys, color=COLOURS[i], marker=MARKERS[i], markersize=4.5, label=label)
                steepest = [ys[0] * (x / xs[0]) ** promised for x in xs]
                axis.plot(xs, steepest, color=COLOURS[i], linewidth=0.9, linestyle=":", label=f"promised: {promised:g}")
            axis.set_xscale("log", base=2)
            log_scale(axis)
            axis.set_xlabel(name)
            if column == 0:
                axis.set_ylabel("seconds" if measure == "seconds" else "working memory (MB)")
            if axis.lines:
                axis.legend(frameon=False, fontsize="x-small", loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=1)
            open_frame(axis)
    _save(figure, folder, "growth")
    return ""


def _has_matplotlib() -> bool:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def _save(figure: Figure, folder: Path, name: str) -> None:
    """Write PNG and SVG, each complete or not at all."""
    from evopress.reporting.drawing import save

    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        for path in save(figure, Path(scratch), name):
            os.replace(path, folder / path.name)
