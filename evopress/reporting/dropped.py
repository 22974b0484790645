"""Draw which modules several genomes drop: a row per genome, a cell per block, its left half attention and its right half MLP."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from evopress.reporting.drawing import legend_below, new_figure, save, title_above

_HALVES = {"attention": 0, "mlp": 1}


def dropped_modules_figure(
    dropped: Mapping[str, Collection[tuple[int, str]]], num_blocks: int, folder: Path, *, name: str = "dropped_modules"
) -> list[Path]:
    """Draw the dropped modules as the paper's Table 1 and Figure 6 do.

    Args: dropped: label of a row, as it is shown, to the (block, "attention" or "mlp") of each module that it drops.

    Returns: the paths of the PNG and the SVG.
    """
    import numpy as np
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    image = np.zeros((len(dropped), 2 * num_blocks))
    for row, modules in enumerate(dropped.values()):
        for block, kind in modules:
            image[row, 2 * block + _HALVES[kind]] = 1
    figure = new_figure(min(max(6.0, 0.3 * num_blocks + 3.0), 18.0), 1.3 + 0.34 * len(dropped))
    axis = figure.subplots()
    edges_x, edges_y = np.arange(2 * num_blocks + 1) / 2 - 0.5, np.arange(len(dropped) + 1) - 0.5
    axis.pcolormesh(edges_x, edges_y, image, cmap=ListedColormap(["#d9e2ec", "#D55E00"]), vmin=0, vmax=1, edgecolors="none")
    for edge in range(num_blocks + 1):
        axis.axvline(edge - 0.5, color="white", linewidth=2.2)
    for edge in range(len(dropped) + 1):
        axis.axhline(edge - 0.5, color="white", linewidth=4)
    axis.set_yticks(range(len(dropped)), list(dropped))
    axis.invert_yaxis()
    step = max(1, -(-num_blocks // 32))
    axis.set_xticks(range(0, num_blocks, step), [str(block) for block in range(0, num_blocks, step)])
    axis.tick_params(length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)
    axis.set_xlabel("transformer block")
    title_above(figure, "Dropped modules: left half of a cell attention, right half MLP", fontsize=10)
    handles = [Patch(color="#d9e2ec", label="kept"), Patch(color="#D55E00", label="dropped")]
    legend_below(figure, handles, [str(handle.get_label()) for handle in handles], most=2)
    return save(figure, folder, name)
