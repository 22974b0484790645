"""Draw how the parent came to be: accepted switches, fitness per stage and acceptance, and what became of each block's budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from evopress.reporting.drawing import (
    COLOURS,
    STYLES,
    Curves,
    axis_of,
    is_picture,
    legend_above,
    legend_below,
    log_scale,
    new_figure,
    open_frame,
    save,
)
from evopress.reporting.figures import averages, measure_name
from evopress.reporting.metrics import best_fitness, phases
from evopress.reporting.tables import number
from evopress.units import Space, Unit

Record = Mapping[str, Any]

UP, DOWN = COLOURS[0], COLOURS[1]
_MOST_NAMES = 64
"""Above so many units the rows are named by their blocks."""
_MOST_CELLS = 20000
"""Above so many the cells of an SVG are a picture in it: else it has megabytes."""


def words(space: Space) -> tuple[str, str]:
    """Say what a unit becomes that a switch puts up (less compressed), and down."""
    return space.words.less, space.words.more


def lineage_figures(records: Sequence[Record], space: Space, folder: Path, *, fitness: str = "kl") -> list[Path]:
    """Draw what a search's records say about its parents: nothing where no generation was tried.

    Returns: the paths of `switches`, `selection` and `lineage`, each as PNG and SVG.
    """
    if not any(record.get("generation") for record in records):
        return []
    paths = selection(records, folder, fitness=fitness)
    if any(record.get("switches") for record in records):
        paths = [*switches(records, space, folder), *paths, *lineage(records, space, folder)]
    return paths


def switches(records: Sequence[Record], space: Space, folder: Path) -> list[Path]:
    """Draw each unit that an accepted generation changed: a triangle up where it got more of the budget, down where it gave.

    A row per unit, in the order of the blocks; a mark is larger where a unit moved by several levels.

    Returns: the paths of `switches.png` and `switches.svg`.
    """
    order = sorted(range(len(space)), key=lambda index: (space.units[index].block, index))
    row = {index: place for place, index in enumerate(order)}
    figure = new_figure(12, min(max(3.2, 0.034 * len(order) + 1.6, 0.16 * len(order) if len(order) <= _MOST_NAMES else 0), 18))
    axis = figure.subplots()
    for sign, marker, colour, label in ((-1, "^", UP, words(space)[0]), (1, "v", DOWN, words(space)[1])):
        marks = [
            (record["generation"], row[index], 26 + 18 * (abs(after - before) - 1))
            for record in records
            for index, before, after in record.get("switches") or ()
            if (after - before) * sign > 0
        ]
        if marks:
            xs, ys, sizes = zip(*marks, strict=True)
            look: dict[str, Any] = {
                "marker": marker,
                "color": colour,
                "linewidths": 0,
                "zorder": 3,
                "rasterized": is_picture(len(marks)),
            }
            axis.scatter(xs, ys, s=sizes, label=label, **look)
    _rows(axis, space, order)
    axis.invert_yaxis()
    axis.set_xlim(0, max(record["generation"] for record in records) + 1)
    axis.locator_params(axis="x", integer=True)
    axis.set_xlabel("generation")
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title("Accepted level switches", fontsize=13)
    legend_below(figure, *axis.get_legend_handles_labels(), most=2)
    return save(figure, folder, "switches")


def selection(records: Sequence[Record], folder: Path, *, fitness: str = "kl") -> list[Path]:
    """Draw the best fitness of each stage, the parent's beside it in the last one, and how often an offspring won.

    Every generation and stage has a minibatch of its own, so only the last stage's two lines may be compared point by point.

    Args: fitness: what the search minimised.

    Returns: the paths of `selection.png` and `selection.svg`.
    """
    tried = [record for record in records if record.get("generation")]
    generations = [record["generation"] for record in tried]
    figure = new_figure(12, 5.6)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2.2, 1))
    drawn = Curves(top, generations)
    number_drawn = 0
    for name, those in phases(records):
        count = max(len(record["stages"]) for record in those)
        own = {record["generation"] for record in those}
        for index in range(count):
            has = [record["generation"] in own and len(record["stages"]) > index for record in tried]
            stages = [record["stages"][index] if there else {} for record, there in zip(tried, has, strict=True)]
            tokens = {stage["tokens"] for stage in stages if stage}
            label = "rounds: best" if name == "round" else f"stage {index + 1}: best"
            label += f", {tokens.pop():,} tokens" if len(tokens) == 1 else ""
            style = {"color": COLOURS[number_drawn % len(COLOURS)], "linestyle": STYLES[(count - 1 - index) % len(STYLES)]}
            drawn.add([best_fitness(stage) for stage in stages], label, linewidth=1.8 if index == count - 1 else 1.1, **style)
            number_drawn += 1
    parents = [number(record.get("parent_fitness")) for record in tried]
    drawn.add(parents, "parent in the last stage", color="#555555", linestyle=":", linewidth=1.4)
    open_frame(top)
    top.set_ylabel(axis_of(fitness))
    if drawn.seen and min(drawn.seen) > 0 and max(drawn.seen) > 4 * min(drawn.seen):
        log_scale(top)
    legend_above(top, figure)
    window = max(5, len(tried) // 10)
    accepted = [bool(record.get("accepted")) for record in tried]
    won = [0, *accumulate(map(int, accepted))]
    means = [(won[i] - won[max(i - window, 0)]) / min(i, window) for i in range(1, len(won))]
    by_generation = dict(zip(generations, accepted, strict=True))
    first, last = generations[0], generations[-1]
    steps = [float(by_generation.get(generation, False)) for generation in range(first, last + 1)]
    edges = [generation - 0.5 for generation in range(first, last + 2)]
    many = is_picture(len(steps))
    bottom.stairs(steps, edges, fill=True, color="#cfd6dd", label="an offspring won", rasterized=many)
    bottom.plot(generations, means, color=UP, linewidth=1.8, label=f"mean of the last {window}", rasterized=many)
    open_frame(bottom)
    bottom.set_ylim(0, 1.05)
    bottom.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    bottom.set_ylabel("accepted")
    bottom.set_xlabel("generation")
    bottom.locator_params(axis="x", integer=True, min_n_ticks=1)  # one generation has no halves
    legend_above(bottom, figure)
    figure.suptitle("Selection: fitness per stage, and how often an offspring won", fontsize=13)
    return save(figure, folder, "selection")


def lineage(records: Sequence[Record], space: Space, folder: Path) -> list[Path]:
    """Draw, for the parent of every generation, each block's change since the initial genome, and how far it is from both ends.

    Returns: the paths of `lineage.png` and `lineage.svg`.
    """
    import numpy as np
    from matplotlib import colormaps

    parents = [
        (record["generation"], tuple(record["genome"])) for record in records if len(record.get("genome") or ()) == len(space)
    ]
    places = {unit.block: unit.place for unit in sorted(space.units, key=lambda unit: unit.block)}
    blocks = list(places)
    generations = [generation for generation, _ in parents]
    others = [i for i, (_, genome) in enumerate(parents) if i == 0 or genome != parents[i - 1][1]]  # one column as long as it stays
    of_each = [averages(space, parents[i][1], by="block") for i in others]
    profiles = np.array([[of_blocks[block] for block in blocks] for of_blocks in of_each]).T
    change = profiles - profiles[:, :1]  # [blocks, parents]
    most = max(float(np.abs(change).max()), 1e-9)
    edges = [*(generations[i] for i in others), generations[-1] + 1]
    figure = new_figure(12, min(max(4.6, 0.13 * len(blocks) + 3.2), 14))
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(max(2.0, 0.12 * len(blocks)), 1))
    less_compressed = colormaps["RdBu_r" if space.words.taken_away else "RdBu"]  # blue has gained
    mesh = top.pcolormesh(edges, np.arange(len(blocks) + 1) - 0.5, change, cmap=less_compressed, vmin=-most, vmax=most)
    mesh.set(edgecolor="face", linewidth=0.4, rasterized=change.size > _MOST_CELLS)  # no hairlines between cells of an SVG
    top.invert_yaxis()
    step = max(1, -(-len(blocks) // 16))
    top.set_yticks(range(0, len(blocks), step), [places[block] for block in blocks[::step]])
    top.set_ylabel("transformer block")
    top.tick_params(length=0)
    top.spines[:].set_visible(False)
    top.set_title(f"Change of each block's {measure_name(space)} since the initial genome", fontsize=10)
    bar = figure.colorbar(mesh, ax=top, pad=0.01, aspect=16)
    bar.outline.set_visible(False)
    for name, other, colour, style in (("initial", parents[0][1], COLOURS[1], "--"), ("final", parents[-1][1], COLOURS[0], "-")):
        distance = [sum(a != b for a, b in zip(genome, other, strict=True)) for _, genome in parents]
        look: dict[str, Any] = {"color": colour, "linestyle": style, "linewidth": 1.8, "rasterized": is_picture(len(distance))}
        bottom.plot(generations, distance, label=f"from the {name} genome", **look)
    open_frame(bottom)
    bottom.set_ylabel("units that differ")
    bottom.set_xlabel("generation")
    bottom.locator_params(axis="x", integer=True)
    legend_above(bottom, figure)
    figure.suptitle("Lineage of the parent", fontsize=13)
    return save(figure, folder, "lineage")


def _rows(axis: Any, space: Space, order: Sequence[int]) -> None:
    """Name the rows of the units: each where they are few, else each block, with bands that tell blocks apart."""
    blocks = [space.units[index].place for index in order]
    starts = [place for place in range(len(order)) if place == 0 or blocks[place] != blocks[place - 1]]
    ends = [*starts[1:], len(order)]
    for number_of_block, (start, end) in enumerate(zip(starts, ends, strict=True)):
        if number_of_block % 2:
            axis.axhspan(start - 0.5, end - 0.5, color="#f1f3f5", linewidth=0, zorder=0)
    if len(order) <= _MOST_NAMES:
        axis.set_yticks(range(len(order)), [_name(space.units[i]) for i in order], fontsize=7)
    else:
        step = max(1, -(-len(starts) // 32))
        middles = [(start + end - 1) / 2 for start, end in zip(starts, ends, strict=True)]
        axis.set_yticks(middles[::step], [blocks[start] for start in starts[::step]])
        axis.set_ylabel("transformer block (a row per unit)")
    axis.set_ylim(-0.5, len(order) - 0.5)
    axis.tick_params(axis="y", length=0)


def _name(unit: Unit) -> str:
    return unit.kind if unit.is_outside else f"{unit.block} {unit.kind}"
