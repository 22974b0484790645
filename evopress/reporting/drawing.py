"""What the figures share: colours for any eyes, line styles by name, open frames, files that are the same for the same data."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.legend import Legend

# Okabe and Ito: eight colours that people with any colour vision tell apart (without yellow, too pale for lines).
_SEVEN = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
COLOURS = _SEVEN * 2
# The second seven differ from the first by their dashes and markers.
_DOTTED = ((0, (6, 1, 1, 1)), (0, (1, 3)), (0, (8, 2)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (2, 3)), (0, (9, 2, 1, 2)))
STYLES = ("-", "--", "-.", ":", "--", "-.", ":", *_DOTTED)
MARKERS = "osD^vPX<>ph*d8"
_FIXED = {"evopress": 0, "dp": 1, "best_of": 2}
_SEARCHES = {"guided": 0, "evolution": 1}
KL = "KL divergence (nats per token)"


def styles(names: Iterable[str], fixed: Mapping[str, int] = _FIXED, *, once: bool = False) -> dict[str, int]:
    """Give each genome a colour, line and marker by index; a name has the same ones in every figure.

    Args:
        fixed: the index of names that begin so.
        once: of these the first alone has it.
    """
    others = [index for index in range(len(COLOURS)) if index not in fixed.values()]
    looks: dict[str, int] = {}
    count = 0
    for name in names:
        own = (index for start, index in fixed.items() if name.startswith(start) and not (once and index in looks.values()))
        found = next(own, None)
        looks[name] = others[count % len(others)] if found is None else found
        count += found is None
    return looks


def search_styles(names: Iterable[str]) -> dict[str, int]:
    """Give each search its `styles`: guided and evolution have the same in every figure, "guided, then evolution" another."""
    return styles(names, _SEARCHES, once=True)


def axis_of(fitness: str) -> str:
    """Return what a fitness is on an axis: another package's measure goes by its name."""
    return KL if fitness in ("kl", "topk_kl") else fitness


_MOST_POINTS = 5000
"""Above so many, what has them is a picture in an SVG: else it has megabytes."""


def is_picture(num_points: int) -> bool:
    """Tell if what has so many points is better a picture in an SVG than a shape of its own."""
    return num_points > _MOST_POINTS


class Curves:
    """Draw curves over one x axis, skipping what was not recorded."""

    def __init__(self, axis: Axes, xs: Sequence[float | None]) -> None:
        self.axis = axis
        self.xs = xs
        self.seen: list[float] = []

    def add(self, values: Sequence[float | None], label: str, **style: Any) -> None:
        points = [(x, y) for x, y in zip(self.xs, values, strict=True) if x is not None and y is not None]
        if points:
            if len(points) == 1:
                style.setdefault("marker", "o")
            self.axis.plot([x for x, _ in points], [y for _, y in points], label=label, rasterized=is_picture(len(points)), **style)
            self.seen += [y for _, y in points]


def show_tokens(value: float, _: int | None = None) -> str:
    """Show a count of tokens in thousands, millions or billions."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


def time_unit(most: float) -> tuple[float, str]:
    """Return the unit, in seconds, and its name in which times up to so many seconds are read most easily."""
    return next(((size, name) for size, name in ((3600.0, "hours"), (60.0, "minutes")) if most >= 3 * size), (1.0, "seconds"))


_FEWEST_TICKS = 3
"""By which a logarithmic axis can be read."""


def log_scale(axis: Axes) -> None:
    """Make the y axis logarithmic, its ticks ordinary numbers: 1, 2 and 5 of each decade, or more where these are few."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    class Ticks(LogLocator):
        def tick_values(self, vmin: float, vmax: float) -> Any:
            found = super().tick_values(vmin, vmax)
            low, high = sorted((vmin, vmax))
            if sum(low <= value <= high for value in found) >= _FEWEST_TICKS:
                return found
            return MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(Ticks(subs=(1.0, 2.0, 5.0)))
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())


def open_frame(axis: Axes) -> None:
    """Take the box away and draw faint lines to read values by."""
    axis.grid(axis="y", color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


_LEGEND_SHARE = 0.92
"""Of a figure's width that a legend may take."""
_LABEL_CHARACTERS = 9.0
"""Of a legend's label, to an inch of the figure's width, so that a legend of one column fits."""


_TITLE_CHARACTERS = 130.0
"""Of a title, to an inch of the figure's width, at a font size of one."""


def title_above(figure: Figure, text: str, *, fontsize: float) -> None:
    """Put a title over the whole figure, which panels of few blocks are narrower than; a long one has several lines."""
    figure.suptitle(textwrap.fill(text, int(_TITLE_CHARACTERS * figure.get_figwidth() / fontsize)), fontsize=fontsize)


def legend_below(figure: Figure, handles: Iterable[Any], labels: Iterable[str], *, most: int) -> None:
    """Put a legend below all panels, of as many columns up to `most` as fit, and make the figure higher by it."""
    legend = _legend(figure, figure, handles, labels, most, loc="outside lower center")
    figure.set_figheight(figure.get_figheight() + legend.get_window_extent().height / figure.dpi)


def legend_above(axis: Axes, figure: Figure) -> None:
    """Put the legend of a wide panel above it, where no curve is, of as many columns up to six as fit."""
    handles, labels = axis.get_legend_handles_labels()
    if handles:
        _legend(axis, figure, handles, labels, 6, loc="lower right", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.0)


def _legend(owner: Axes | Figure, figure: Figure, handles: Iterable[Any], labels: Iterable[str], most: int, **place: Any) -> Legend:
    """Make a legend that is narrower than its figure, of `most` columns or fewer; labels that no column can hold are wrapped."""
    width = figure.get_figwidth()
    handles, labels = list(handles), [textwrap.fill(label, int(_LABEL_CHARACTERS * width)) for label in labels]
    columns = max(1, min(most, len(labels)))
    while True:
        legend = owner.legend(handles, labels, ncols=columns, frameon=False, **place)
        if columns == 1 or legend.get_window_extent().width <= _LEGEND_SHARE * width * figure.dpi:
            return legend
        legend.remove()
        columns -= 1


def new_figure(width: float, height: float) -> Figure:
    """Return a figure of its own canvas (inches); pyplot and its global state stay out of it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write a figure as PNG, of 256 colours, and SVG, and return their paths; the same data give the same bytes."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.png", folder / f"{name}.svg"]
    _render(figure, *paths, salt=name)
    return paths


def _render(figure: Figure, png: Path, svg: Path, *, salt: str) -> None:
    """Draw a figure to two files; the SVG's names of its parts are made of `salt`."""
    import numpy as np
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    if (layout := figure.get_layout_engine()) is not None:  # once: `savefig` would do it four times for each file
        layout.execute(figure)
        figure.set_layout_engine("none")
    figure.set_dpi(150)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    # 256 colours are a third of the bytes, and no difference to be seen.
    few = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    few.save(png, optimize=True)
    with rc_context({"svg.hashsalt": salt}):
        figure.savefig(svg, metadata={"Date": None})
