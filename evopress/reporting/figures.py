"""Draw a search and what it found: convergence, levels per unit, average levels. PNG and SVG, colour-blind safe."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evopress.reporting.tables import display_name, number
from evopress.units import Genome, Space

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Cell = tuple[str, int]
"""A row of the heat map: a kind, and which of several units of that kind in one block."""

# Okabe and Ito: eight colours that people with any colour vision tell apart (without yellow, too pale for lines).
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_STYLES = ("-", "--", "-.", ":", "--", "-.", ":")
_MARKERS = "osD^vPX"
_FIXED = {"evopress": 0, "dp": 1, "best_of": 2}
_MOST_LABELS = 8
"""Above so many level labels the heat map's colours are a continuous scale."""


def measure_name(space: Space) -> str:
    """Say what `measure` measures with this method."""
    return {"quant": "bits per weight", "sparsity": "sparsity", "drop": "share of weights kept"}.get(
        space.method, "cost per weight"
    )


def measure(space: Space, cost: float, size: int) -> float:
    """Return what a cost means to people: per weight, and with sparsity the share that it does not keep."""
    return 1.0 - cost / size if space.method == "sparsity" else cost / size


def averages(space: Space, genome: Genome, *, by: str) -> dict[Any, float]:
    """Return the `measure` of each kind (`by="kind"`) or block (`by="block"`), in order of first appearance."""
    totals: dict[Any, list[int]] = {}
    for unit, level in zip(space.units, genome, strict=True):
        total = totals.setdefault(getattr(unit, by), [0, 0])
        total[0] += unit.levels[level].cost
        total[1] += unit.size
    return {key: measure(space, cost, size) for key, (cost, size) in totals.items()}


def convergence(
    records: Sequence[Mapping[str, Any]],
    folder: Path,
    baselines: Mapping[str, float] | None = None,
    *,
    fitness: str = "kl",
) -> list[Path]:
    """Draw the winner's fitness and the held-out measures against generations and against tokens evaluated.

    A row of panels for KL, and one for perplexity if any was recorded or the search minimised it.

    Args:
        records: the records of `metrics.jsonl`.
        baselines: held-out KL, nats per token, of each baseline by name; drawn as horizontal lines.
        fitness: what the search minimised; "perplexity" draws it among the perplexities, all else with the KL.

    Returns: the paths of `convergence.png` and `convergence.svg`.
    """
    generations = [record["generation"] for record in records]
    tokens = [number(record.get("tokens")) for record in records]
    data_sets = dict.fromkeys(key for record in records for key in _held_out(record, "perplexity") or {})
    curves: list[tuple[str, str, list[float | None]]] = [
        ("kl", "held-out KL", [number(_held_out(record, "kl")) for record in records]),
        *(
            ("perplexity", f"held-out, {key}", [number((_held_out(r, "perplexity") or {}).get(key)) for r in records])
            for key in data_sets
        ),
    ]
    fitness_row = "perplexity" if fitness == "perplexity" else "kl"
    minibatch = [number(record.get("fitness")) for record in records]
    lines = {name: value for name, value in (baselines or {}).items() if number(value) is not None}
    styles = _styles(lines)
    y_names = {"kl": "KL divergence (nats per token)", "perplexity": "perplexity"}
    filled = {name for name, _, values in [*curves, (fitness_row, "", minibatch)] if any(v is not None for v in values)}
    rows = [name for name in y_names if name in filled or (name == "kl" and (lines or not filled))]

    figure = _figure(11, 1.2 + 3.4 * len(rows))
    axes = figure.subplots(len(rows), 2, sharey="row", squeeze=False)
    for name, row_axes in zip(rows, axes, strict=True):
        seen: list[float] = []
        for panel, (axis, xs, x_name) in enumerate(
            zip(row_axes, (generations, tokens), ("generation", "tokens evaluated"), strict=True)
        ):
            drawn = _Curves(axis, xs)
            if name == fitness_row:
                drawn.add(minibatch, "winner's fitness (search minibatch)", color="#888888", linewidth=1, zorder=2)
            for index, (_, label, values) in enumerate(curve for curve in curves if curve[0] == name):
                drawn.add(
                    values,
                    label,
                    color=_COLOURS[index % len(_COLOURS)],
                    marker=_MARKERS[index % len(_MARKERS)],
                    markersize=4.5,
                    linewidth=2,
                    zorder=3,
                )
            if name == "kl":
                for key, value in lines.items():
                    index = styles[key]
                    label = f"{display_name(key)}, held-out"
                    axis.axhline(value, color=_COLOURS[index], linestyle=_STYLES[index], linewidth=1.4, label=label)
                    drawn.seen.append(value)
            _open_frame(axis)
            axis.set_xlabel(x_name)
            if name == rows[0]:
                axis.set_title(f"against {x_name.replace('generation', 'generations')}", fontsize=10)
            if panel == 0:
                axis.set_ylabel(y_names[name])
            else:
                axis.xaxis.set_major_formatter(_tokens)
            seen += drawn.seen
        if seen and min(seen) > 0 and max(seen) > 4 * min(seen):
            _log_scale(row_axes[0])
        handles, labels = row_axes[0].get_legend_handles_labels()
        if handles:
            row_axes[1].legend(handles, labels, loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
    figure.suptitle("Convergence of the search", fontsize=13)
    return _save(figure, folder, "convergence")


def level_heatmap(space: Space, genome: Genome, folder: Path) -> list[Path]:
    """Draw the level of each unit: a row per kind, a column per block, a colour per level label.

    Where there are many labels (sparsities) the colours are a scale of the units' `measure`. Several units of one kind in a block
    (experts) get a row each; what a block lacks stays white.

    Returns: the paths of `level_heatmap.png` and `level_heatmap.svg`.
    """
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.colors import BoundaryNorm, ListedColormap, Normalize

    genome = space.check(genome)
    cells = _cells(space)
    rows = list(dict.fromkeys(cells))
    blocks = sorted({unit.block for unit in space.units})
    labels = _ordered_labels(space)
    by_label = len(labels) <= _MOST_LABELS
    image = np.full((len(rows), len(blocks)), np.nan)
    keys: dict[tuple[int, int], str] = {}
    for cell, unit, level in zip(cells, space.units, genome, strict=True):
        place = rows.index(cell), blocks.index(unit.block)
        value = measure(space, unit.levels[level].cost, unit.size)
        image[place] = labels.index(unit.levels[level].label) if by_label else value
        keys[place] = unit.levels[level].key if by_label else f"{100 * value:.0f}" if space.method == "sparsity" else f"{value:.2g}"

    width = min(0.34 * len(blocks), 16)
    figure = _figure(max(6, width + 2.8), min(max(2.4, 0.34 * len(rows) + 1.5), 40))
    axis = figure.subplots()
    # Pale is little kept, dark is much; the palest end of the map is left out so that a level never looks like no unit.
    pale_to_dark = colormaps["viridis_r"](np.linspace(0.06, 1, len(labels) if by_label else 256))
    dark_first = by_label or space.method == "sparsity"  # labels, and sparsities, begin with much kept
    colours = ListedColormap(pale_to_dark[::-1] if dark_first else pale_to_dark)
    least, most = np.nanmin(image), np.nanmax(image)
    room = max(0.05 - (most - least) / 2, 0.0)  # a uniform genome is no range of colours
    norm = BoundaryNorm(np.arange(len(labels) + 1) - 0.5, len(labels)) if by_label else Normalize(least - room, most + room)
    mesh = axis.pcolormesh(
        np.arange(len(blocks) + 1) - 0.5,
        np.arange(len(rows) + 1) - 0.5,
        np.ma.masked_invalid(image),
        cmap=colours,
        norm=norm,
        edgecolors="white",
        linewidth=0.8,
    )
    if len(blocks) <= 48 and len(rows) <= 48 and max(len(key) for key in keys.values()) <= 2:
        for (row, column), key in keys.items():
            red, green, blue = colours(norm(image[row, column]))[:3]
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
            axis.text(column, row, key, ha="center", va="center", fontsize=8, color="white" if dark else "black")
    several = {kind for kind, index in rows if index > 0}
    axis.set_yticks(range(len(rows)), [f"{kind} [{index}]" if kind in several else kind for kind, index in rows])
    axis.invert_yaxis()
    step = max(1, -(-len(blocks) // 32))
    axis.set_xticks(range(0, len(blocks), step), [str(block) for block in blocks[::step]])
    axis.tick_params(length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)
    axis.set_xlabel("transformer block")
    average = measure(space, space.cost(genome), space.size)
    percent = not by_label and space.method == "sparsity"
    if percent:
        axis.set_title(f"Sparsity of each unit in percent ({100 * average:.4g}% on average)")
    else:
        axis.set_title(f"Level of each unit ({measure_name(space)}: {average:.4g} on average)")
    bar = figure.colorbar(mesh, ax=axis, ticks=list(range(len(labels))) if by_label else None, fraction=0.05, pad=0.015, aspect=12)
    if by_label:
        bar.ax.set_yticklabels(labels)
        bar.ax.invert_yaxis()
    elif percent:
        bar.ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g}%")
    bar.ax.tick_params(length=0)
    bar.outline.set_visible(False)
    return _save(figure, folder, "level_heatmap")


def level_profile(space: Space, genomes: Mapping[str, Genome], folder: Path) -> list[Path]:
    """Draw the average `measure` of each kind as bars and of each block as lines, for several genomes.

    With sparsity these are the paper's Figures 9 and 8.

    Returns: the paths of `level_profile.png` and `level_profile.svg`.
    """
    figure = _figure(12, 4.4)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.25))
    _open_frame(left)
    _open_frame(right)
    kinds = list(dict.fromkeys(unit.kind for unit in space.units))
    bar = 0.8 / max(len(genomes), 1)
    styles = _styles(genomes)
    for index, (name, genome) in enumerate(genomes.items()):
        space.check(genome)
        style = styles[name]
        colour = _COLOURS[style]
        by_kind = averages(space, genome, by="kind")
        places = [place + (index - (len(genomes) - 1) / 2) * bar for place in range(len(kinds))]
        label = display_name(name)
        left.bar(places, [by_kind[kind] for kind in kinds], bar * 0.92, color=colour, label=label)
        by_block = dict(sorted(averages(space, genome, by="block").items()))
        right.plot(
            list(by_block),
            list(by_block.values()),
            color=colour,
            linestyle=_STYLES[style],
            marker=_MARKERS[style],
            markersize=3.5,
            linewidth=1.6,
        )
    turned = len(kinds) > 8 or sum(map(len, kinds)) > 56
    left.set_xticks(range(len(kinds)), kinds, rotation=45 if turned else 25, ha="right", rotation_mode="anchor")
    left.set_ylabel(measure_name(space))
    left.set_title("by kind of unit", fontsize=10)
    right.set_xlabel("transformer block")
    right.xaxis.get_major_locator().set_params(integer=True)
    right.set_ylabel(measure_name(space))
    right.set_title("by transformer block", fontsize=10)
    figure.suptitle("Where the budget went", fontsize=13)
    handles, labels = left.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 6), frameon=False)
    return _save(figure, folder, "level_profile")


def _styles(names: Iterable[str]) -> dict[str, int]:
    """Give each genome a colour, line and marker by index; a name has the same ones in every figure."""
    others = [index for index in range(len(_COLOURS)) if index not in _FIXED.values()]
    styles: dict[str, int] = {}
    count = 0
    for name in names:
        fixed = next((index for start, index in _FIXED.items() if name.startswith(start)), None)
        styles[name] = others[count % len(others)] if fixed is None else fixed
        count += fixed is None
    return styles


class _Curves:
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
            self.axis.plot([x for x, _ in points], [y for _, y in points], label=label, **style)
            self.seen += [y for _, y in points]


def _held_out(record: Mapping[str, Any], key: str) -> Any:
    return (record.get("held_out") or {}).get(key)


def _cells(space: Space) -> list[Cell]:
    """Return the heat map's row of each unit."""
    counts: dict[tuple[int, str], int] = {}
    cells = []
    for unit in space.units:
        index = counts.get((unit.block, unit.kind), 0)
        counts[unit.block, unit.kind] = index + 1
        cells.append((unit.kind, index))
    return cells


def _ordered_labels(space: Space) -> list[str]:
    """Return all labels of the space, from the least compressed (by its mean cost per weight) to the most."""
    costs: dict[str, list[float]] = {}
    for unit in space.units:
        for level in unit.levels:
            costs.setdefault(level.label, []).append(level.cost / unit.size)
    return sorted(costs, key=lambda label: -sum(costs[label]) / len(costs[label]))


def _tokens(value: float, _: int | None = None) -> str:
    """Show a count of tokens in thousands, millions or billions."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


def _log_scale(axis: Axes) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())


def _open_frame(axis: Axes) -> None:
    axis.grid(axis="y", color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _figure(width: float, height: float) -> Figure:
    """Return a figure of its own canvas (inches); pyplot and its global state stay out of it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, folder: Path, name: str) -> list[Path]:
    from matplotlib import rc_context

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.png", folder / f"{name}.svg"]
    with rc_context({"svg.hashsalt": name}):  # the same data give the same file
        figure.savefig(paths[0], dpi=150, metadata={"Software": None})
        figure.savefig(paths[1], metadata={"Date": None})
    return paths
