"""Draw a search and what it found: convergence, levels per unit, average levels. PNG and SVG, colour-blind safe."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evopress.reporting.drawing import (
    COLOURS,
    KL,
    MARKERS,
    STYLES,
    Curves,
    axis_of,
    legend_below,
    log_scale,
    new_figure,
    open_frame,
    save,
    show_tokens,
    styles,
    time_unit,
    title_above,
)
from evopress.reporting.tables import display_name, number, significant
from evopress.units import Genome, Space, Unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Cell = tuple[str, int]
"""A row of the heat map: a kind, and which of several units of that kind in one block."""

_MOST_LABELS = 10
"""Above so many level labels the heat map's colours are a continuous scale."""
_MOST_ROW_NAMES = 120
"""Of more rows only every second, third, … is named, and where a kind begins: a page has room for so many lines."""


def measure_name(space: Space) -> str:
    """Say what `measure` measures in this space."""
    return space.words.measure


def measure(space: Space, cost: float, size: int) -> float:
    """Return what a cost means to people: per weight, or the share that is not kept of the weights or modules."""
    return space.words.measured(cost, size)


def measured_size(space: Space, unit: Unit) -> int:
    """Return what a unit counts in `measure`: its weights, or its modules."""
    return space.words.of(unit)


def shown_level(space: Space, genome: Genome, unit: int) -> str:
    """Return the label of a unit's level, or say that it lies in a module that is dropped."""
    return "in a dropped module" if space.is_gone(genome, unit) else space.units[unit].levels[genome[unit]].label


def averages(space: Space, genome: Genome, *, by: str) -> dict[Any, float]:
    """Return the `measure` of each kind (`by="kind"`) or block (`by="block"`), in order of first appearance."""
    totals: dict[Any, list[int]] = {}
    for index, (unit, level) in enumerate(zip(space.units, genome, strict=True)):
        total = totals.setdefault(getattr(unit, by), [0, 0])
        total[0] += 0 if space.is_gone(genome, index) else space.prices[index][level]
        total[1] += measured_size(space, unit)
    return {key: measure(space, cost, size) for key, (cost, size) in totals.items() if size}


def convergence(
    records: Sequence[Mapping[str, Any]],
    folder: Path,
    baselines: Mapping[str, float] | None = None,
    *,
    perplexities: Mapping[str, float] | None = None,
    fitness: str = "kl",
    text: str = "",
) -> list[Path]:
    """Draw the winner's fitness and the held-out measures against generations, tokens evaluated and time.

    A row of panels for KL, and one for perplexity if any was recorded or the search minimised it.

    Args:
        records: the records of `metrics.jsonl`, all measurements on one text.
        baselines: KL, nats per token, of each baseline by name, on that same text; drawn as horizontal lines.
        perplexities: their perplexities on it, where it is of one data set.
        fitness: what the search minimised; kinds of KL are drawn with the KL, "perplexity" among the perplexities, others apart.
        text: which text that is, in words.

    Returns: the paths of `convergence.png` and `convergence.svg`.
    """
    generations = [record["generation"] for record in records]
    tokens, seconds = ([number(record.get(key)) for record in records] for key in ("tokens", "seconds"))
    data_sets = dict.fromkeys(key for record in records for key in _held_out(record, "perplexity") or {})
    curves: list[tuple[str, str, list[float | None]]] = [
        ("kl", "held-out KL", [number(_held_out(record, "kl")) for record in records]),
        *(
            ("perplexity", f"held-out perplexity, {key}", [number((_held_out(r, "perplexity") or {}).get(key)) for r in records])
            for key in data_sets
        ),
    ]
    fitness_row = "kl" if axis_of(fitness) == KL else fitness
    minibatch = [number(record.get("fitness")) for record in records]
    given = {fitness_row: {}, "kl": baselines or {}, "perplexity": perplexities or {}}
    lines = {row: {name: value for name, value in of.items() if number(value) is not None} for row, of in given.items()}
    looks = styles(dict.fromkeys(name for of in lines.values() for name in of))
    y_names = {"kl": KL, "perplexity": "perplexity", fitness_row: axis_of(fitness)}
    filled = {name for name, _, values in [*curves, (fitness_row, "", minibatch)] if any(v is not None for v in values)}
    rows = [name for name in y_names if name in filled or (name == "kl" and (lines["kl"] or not filled))]

    unit, unit_name = time_unit(max((value for value in seconds if value is not None), default=0.0))
    times = [None if value is None else value / unit for value in seconds]
    panels = (("generation", generations, None), ("tokens evaluated", tokens, show_tokens), (unit_name, times, None))
    figure = new_figure(12, 0.7 + 3.2 * len(rows))
    axes = figure.subplots(len(rows), 3, sharey="row", squeeze=False)
    legend: dict[str, Any] = {}
    for name, row_axes in zip(rows, axes, strict=True):
        seen: list[float] = []
        for axis, (x_name, xs, shown) in zip(row_axes, panels, strict=True):
            drawn = Curves(axis, xs)
            if name == fitness_row:
                drawn.add(minibatch, "winner's fitness (search minibatch)", color="#888888", linewidth=1, zorder=2)
            for index, (_, label, values) in enumerate(curve for curve in curves if curve[0] == name):
                drawn.add(
                    values,
                    label,
                    color=COLOURS[index % len(COLOURS)],
                    marker=MARKERS[index % len(MARKERS)],
                    markersize=4.5,
                    linewidth=2,
                    zorder=3,
                )
            near = [value for value in lines[name].values() if not drawn.seen or _near(value, drawn.seen)]
            for key, value in lines[name].items():
                look = {"color": COLOURS[looks[key]], "linestyle": STYLES[looks[key]], "linewidth": 1.4}
                if value in near:
                    axis.axhline(value, label=f"{display_name(key)}, held-out", **look)
                else:
                    what = "perplexity " if name == "perplexity" else ""
                    axis.plot([], [], label=f"{display_name(key)}: {what}{significant(value)}, off the scale", **look)
            drawn.seen += near
            open_frame(axis)
            axis.set_xlabel(x_name)
            if shown is not None:
                axis.xaxis.set_major_formatter(shown)
            if x_name == "generation":
                axis.xaxis.get_major_locator().set_params(integer=True)
            seen += drawn.seen
        row_axes[0].set_ylabel(y_names[name])
        if seen and min(seen) > 0 and max(seen) > 4 * min(seen):
            log_scale(row_axes[0])
        handles, labels = row_axes[0].get_legend_handles_labels()
        legend.update(zip(labels, handles, strict=True))
    if legend:
        legend_below(figure, legend.values(), legend.keys(), most=4)
    title_above(figure, "Convergence of the search" + (f" ({text})" if text else ""), fontsize=13)
    return save(figure, folder, "convergence")


def level_heatmap(space: Space, genome: Genome, folder: Path) -> list[Path]:
    """Draw the level of each unit: a row per kind, a column per block, a colour per level label; head and embedding come last.

    Where there are many labels (sparsities) the colours are a scale of the units' `measure`. Several units of one kind in a block
    (experts) get a row each; what a block lacks stays white.

    Returns: the paths of `level_heatmap.png` and `level_heatmap.svg`.
    """
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.colors import BoundaryNorm, ListedColormap, Normalize

    genome = space.check(genome)
    places = cells(space)
    rows = list(dict.fromkeys(places))
    blocks = sorted({unit.block for unit in space.units if not unit.is_outside})
    columns = blocks + [len(blocks)] * any(
        unit.is_outside for unit in space.units
    )  # what lies in no block shares one, without a name
    labels = _ordered_labels(space)
    by_label = len(labels) <= _MOST_LABELS
    image = np.full((len(rows), len(columns)), np.nan)
    keys: dict[tuple[int, int], str] = {}
    for index, (cell, unit, level) in enumerate(zip(places, space.units, genome, strict=True)):
        place = rows.index(cell), len(blocks) if unit.is_outside else blocks.index(unit.block)
        size = measured_size(space, unit)
        value = measure(space, space.prices[index][level], size) if size else float(level)
        image[place] = labels.index(unit.levels[level].label) if by_label else value
        key = unit.levels[level].key
        short = key if len(key) <= 2 else "×" if unit.levels[level].drops else ""
        keys[place] = short if by_label else f"{100 * value:.0f}" if space.words.taken_away else f"{value:.2g}"
        if space.is_gone(genome, index):  # its module is dropped
            image[place], keys[place] = np.nan, ""

    width = min(0.34 * len(columns), 16)
    figure = new_figure(max(6, width + 2.8), min(max(2.4, 0.34 * len(rows) + 1.5), 40))
    axis = figure.subplots()
    # Pale is little kept, dark is much; the palest end of the map is left out so that a level never looks like no unit.
    pale_to_dark = colormaps["viridis_r"](np.linspace(0.06, 1, len(labels) if by_label else 256))
    dark_first = by_label or space.words.taken_away  # labels, and sparsities, begin with much kept
    colours = ListedColormap(pale_to_dark[::-1] if dark_first else pale_to_dark)
    least, most = np.nanmin(image), np.nanmax(image)
    room = max(0.05 - (most - least) / 2, 0.0)  # a uniform genome is no range of colours
    norm = BoundaryNorm(np.arange(len(labels) + 1) - 0.5, len(labels)) if by_label else Normalize(least - room, most + room)
    mesh = draw_cells(axis, image, rows, blocks, colours=colours, norm=norm)
    if len(blocks) <= 48 and len(rows) <= 48 and max(len(key) for key in keys.values()) <= 2:
        for (row, column), key in keys.items():
            red, green, blue = colours(norm(image[row, column]))[:3]
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
            axis.text(column, row, key, ha="center", va="center", fontsize=8, color="white" if dark else "black")
    axis.set_xlabel("transformer block")
    average = measure(space, space.cost(genome), sum(measured_size(space, unit) for unit in space.units))
    percent = not by_label and space.words.taken_away
    if percent:
        title = f"Sparsity of each unit in percent ({100 * average:.4g}% on average)"
    else:
        title = f"Level of each unit ({measure_name(space)}: {average:.4g} on average)"
    title_above(figure, title, fontsize=12)
    bar = figure.colorbar(mesh, ax=axis, ticks=list(range(len(labels))) if by_label else None, fraction=0.05, pad=0.015, aspect=12)
    if by_label:
        bar.ax.set_yticklabels(labels)
        bar.ax.invert_yaxis()
    elif percent:
        bar.ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g}%")
    bar.ax.tick_params(length=0)
    bar.outline.set_visible(False)
    return save(figure, folder, "level_heatmap")


def level_profile(space: Space, genomes: Mapping[str, Genome], folder: Path) -> list[Path]:
    """Draw the average `measure` of each kind as bars and of each block as lines, for several genomes.

    With sparsity these are the paper's Figures 9 and 8.

    Returns: the paths of `level_profile.png` and `level_profile.svg`.
    """
    figure = new_figure(12, 4.1)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.25))
    open_frame(left)
    open_frame(right)
    kinds = list(dict.fromkeys(unit.kind for unit in space.units if measured_size(space, unit)))
    bar = 0.8 / max(len(genomes), 1)
    looks = styles(genomes)
    for index, (name, genome) in enumerate(genomes.items()):
        space.check(genome)
        style = looks[name]
        colour = COLOURS[style]
        by_kind = averages(space, genome, by="kind")
        places = [place + (index - (len(genomes) - 1) / 2) * bar for place in range(len(kinds))]
        label = display_name(name)
        left.bar(places, [by_kind[kind] for kind in kinds], bar * 0.92, color=colour, label=label)
        inside = {unit.block for unit in space.units if not unit.is_outside}
        by_block = {block: value for block, value in sorted(averages(space, genome, by="block").items()) if block in inside}
        right.plot(
            list(by_block),
            list(by_block.values()),
            color=colour,
            linestyle=STYLES[style],
            marker=MARKERS[style],
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
        legend_below(figure, handles, labels, most=6)
    return save(figure, folder, "level_profile")


def _near(value: float, others: Sequence[float]) -> bool:
    """Tell if a line can be drawn among curves without flattening them."""
    return 0.5 * min(others) <= value <= 2.0 * max(others)


def _held_out(record: Mapping[str, Any], key: str) -> Any:
    return (record.get("held_out") or {}).get(key)


def draw_cells(axis: Axes, image: Any, rows: Sequence[Cell], blocks: Sequence[int], *, colours: Any, norm: Any) -> Any:
    """Draw a heat map of units, a row per kind and a column per block, and return its mesh.

    Args:
        image: numbers [rows, columns], NaN where there is no unit; the last column may be what lies outside the blocks.
        blocks: the numbers of the others.
    """
    import numpy as np

    mesh = axis.pcolormesh(
        np.arange(image.shape[1] + 1) - 0.5,
        np.arange(len(rows) + 1) - 0.5,
        np.ma.masked_invalid(image),
        cmap=colours,
        norm=norm,
        edgecolors="white",
        linewidth=0.8,
    )
    several = {kind for kind, number in rows if number > 0}
    names = [f"{kind} [{number}]" if kind in several else kind for kind, number in rows]
    each = max(1, -(-len(rows) // _MOST_ROW_NAMES))
    starts = range(0, len(rows), each)
    begun = [[start, *(row for row in range(start + 1, min(start + each, len(rows))) if rows[row][1] == 0)] for start in starts]
    axis.set_yticks(starts, [", ".join(names[row] for row in those) for those in begun])
    axis.invert_yaxis()
    step = max(1, -(-len(blocks) // 32))
    axis.set_xticks(range(0, len(blocks), step), [str(block) for block in blocks[::step]])
    axis.tick_params(length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)
    return mesh


def cells(space: Space) -> list[Cell]:
    """Return the heat map's row of each unit."""
    counts: dict[tuple[int, str], int] = {}
    found = []
    for unit in space.units:
        index = counts.get((unit.block, unit.kind), 0)
        counts[unit.block, unit.kind] = index + 1
        found.append((unit.kind, index))
    return found


def _ordered_labels(space: Space) -> list[str]:
    """Return all labels of the space, from the least compressed (by its mean cost per weight) to the most.

    A module that is kept is the least compressed of all: the costs of what lies in it are those units' own.
    """
    modules = {module for module in space.inside if module is not None}
    costs: dict[str, list[float]] = {}
    for index, unit in enumerate(space.units):
        for level in unit.levels:
            cost: float = level.cost if space.currency is None else level.stored_bits
            if index in modules and not level.drops:
                cost = math.inf
            costs.setdefault(level.label, []).append(cost / max(unit.size, 1))
    return sorted(costs, key=lambda label: -sum(costs[label]) / len(costs[label]))
