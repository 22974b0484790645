"""What the experts of a mixture got: a heat map of experts and blocks."""

from __future__ import annotations

from pathlib import Path

from evopress.currencies import num_experts
from evopress.reporting.drawing import new_figure, save
from evopress.reporting.figures import draw_cells, measure, measure_name, measured_size
from evopress.units import Genome, Space, is_of_expert


def of_experts(space: Space, genome: Genome) -> dict[tuple[int, int], float]:
    """Return the `measure` of every expert by its number and its block, all its weights together; empty without experts."""
    whole, unfolded = space.whole, space.unfold(genome)
    totals: dict[tuple[int, int], list[int]] = {}
    for index, (unit, level) in enumerate(zip(whole.units, unfolded, strict=True)):
        if (is_of_expert(unit) or num_experts(unit)) and not whole.is_gone(unfolded, index):
            expert = unit.name.split(".")[-1 if num_experts(unit) else -2]
            total = totals.setdefault((int(expert), unit.block), [0, 0])
            total[0] += whole.prices[index][level]
            total[1] += measured_size(whole, unit)
    return {place: measure(whole, cost, size) for place, (cost, size) in totals.items() if size}


def expert_figure(space: Space, genome: Genome, folder: Path) -> list[Path]:
    """Draw what every expert got: a row for each, a column for each block that has experts.

    Returns: the paths of `experts.png` and `experts.svg`; none without experts.
    """
    import numpy as np
    from matplotlib import colormaps

    found = of_experts(space, genome)
    if not found:
        return []
    experts, blocks = (sorted({place[axis] for place in found}) for axis in (0, 1))
    image = np.full((len(experts), len(blocks)), np.nan)
    for (expert, block), value in found.items():
        image[experts.index(expert), blocks.index(block)] = value
    figure = new_figure(max(5.0, min(0.34 * len(blocks), 16) + 2.6), min(max(2.4, 0.2 * len(experts) + 1.4), 24))
    axis = figure.subplots()
    colours = colormaps["viridis" if space.words.taken_away else "viridis_r"]
    rows = [(str(expert), 0) for expert in experts]
    mesh = draw_cells(axis, image, rows, blocks, colours=colours, norm=None)
    step = -(-len(experts) // 64)
    axis.set_yticks(range(0, len(experts), step), [str(expert) for expert in experts[::step]])
    axis.set_xlabel("transformer block")
    axis.set_ylabel("expert")
    axis.set_title(f"Each expert ({measure_name(space)})")
    bar = figure.colorbar(mesh, ax=axis, fraction=0.05, pad=0.015, aspect=12)
    bar.ax.tick_params(length=0)
    bar.outline.set_visible(False)
    return save(figure, folder, "experts")
