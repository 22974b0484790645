"""Draw and say what each unit holds of the fitness, before and after a search that asked for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evopress.reporting.drawing import KL, axis_of, new_figure, save
from evopress.reporting.figures import cells, draw_cells
from evopress.reporting.tables import number, significant
from evopress.units import Genome, Space, is_module

_DECADES = 3
"""Below the greatest value by so many powers of ten all is as pale as nothing."""
_MOST_NAMED = 5


@dataclass(frozen=True)
class Held:
    """What the units of one genome hold."""

    generation: int
    """The round that asked; the genome is the one that it began from."""
    genome: Genome
    values: tuple[float, ...]
    """Per unit, in nats a token; of a module that is kept: what dropping it would add."""


def held_in(records: Sequence[Mapping[str, Any]], space: Space) -> list[Held]:
    """Return what the first and the last record say that has it: two, one or none."""
    found = []
    for before, record in zip([{}, *records], records, strict=False):
        details = record.get("details") or {}
        held, dropping = details.get("held"), details.get("dropping") or [0.0] * len(space)
        genome = before.get("genome")
        if not (isinstance(held, list) and isinstance(dropping, list) and len(held) == len(dropping) == len(space) and genome):
            continue
        values = [number(value) for value in map(_plus, held, dropping)]
        if all(value is not None for value in values):
            found.append(Held(int(record["generation"]), tuple(genome), tuple(value or 0.0 for value in values)))
    return found if len(found) < 2 else [found[0], found[-1]]


def _plus(one: Any, other: Any) -> Any:
    return one + other if isinstance(one, int | float) and isinstance(other, int | float) else None


def held_figure(records: Sequence[Mapping[str, Any]], space: Space, folder: Path, *, fitness: str = "kl") -> list[Path]:
    """Draw a heat map of what each unit holds at the first genome that was asked about, and one at the last, on one scale.

    Returns: the paths of `held.png` and `held.svg`; none where no record has it.
    """
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm

    maps = held_in(records, space)
    if not maps:
        return []
    places = cells(space)
    rows = list(dict.fromkeys(places))
    blocks = sorted({unit.block for unit in space.units if not unit.is_outside})
    num_columns = len(blocks) + any(unit.is_outside for unit in space.units)
    most = max(max(held.values) for held in maps)
    most = most if most > 0 else 1.0
    norm = LogNorm(most / 10**_DECADES, most, clip=True)
    width, height = max(6.5, min(0.34 * num_columns, 16) + 2.8), min(max(2.2, 0.3 * len(rows) + 1.1), 24)
    figure = new_figure(width, height * len(maps) + 0.3)
    axes = figure.subplots(len(maps), 1, squeeze=False)[:, 0]
    for axis, held in zip(axes, maps, strict=True):
        image = np.full((len(rows), num_columns), np.nan)
        for index, (cell, unit) in enumerate(zip(places, space.units, strict=True)):
            place = rows.index(cell), len(blocks) if unit.is_outside else blocks.index(unit.block)
            if not space.is_gone(held.genome, index):
                image[place] = max(held.values[index], most / 10**_DECADES)
            if unit.levels[held.genome[index]].drops:
                colour = "white" if float(norm(image[place])) > 0.5 else "black"
                axis.text(place[1], place[0], "×", ha="center", va="center", fontsize=8, color=colour)
        mesh = draw_cells(axis, image, rows, blocks, colours=colormaps["magma_r"], norm=norm)
        total = significant(sum(value for index, value in enumerate(held.values) if not _is_kept_module(space, held.genome, index)))
        axis.set_title(f"{_when(held, maps)}: {total} in all", fontsize=10)
    axes[-1].set_xlabel("transformer block")
    of = {KL: "KL divergence", "perplexity": "log perplexity"}.get(axis_of(fitness), fitness)
    bar = figure.colorbar(mesh, ax=list(axes), fraction=0.05, pad=0.015, aspect=12 * len(maps))
    bar.set_label("nats per token")
    bar.ax.tick_params(which="both", length=0)
    bar.outline.set_visible(False)
    figure.suptitle(f"What each unit holds of the {of}", fontsize=12)
    return save(figure, folder, "held")


def held_words(records: Sequence[Mapping[str, Any]], space: Space) -> list[str]:
    """Say which units held most, before and after."""
    maps = held_in(records, space)
    said = []
    for held in maps:
        there = [i for i in range(len(space)) if not _is_kept_module(space, held.genome, i) and held.values[i] > 0]
        most = sorted(there, key=lambda i: -held.values[i])[:_MOST_NAMED]
        named = ", ".join(
            f"{space.units[i].name} at {space.units[i].levels[held.genome[i]].label} ({significant(held.values[i])})" for i in most
        )
        if named:
            said.append(f"{_when(held, maps)}, most was held by {named}.")
    return said


def _when(held: Held, maps: Sequence[Held]) -> str:
    if len(maps) == 1:
        return f"In round {held.generation}"
    return f"{'Before' if held is maps[0] else 'After'}, in round {held.generation}"


def _is_kept_module(space: Space, genome: Genome, unit: int) -> bool:
    return is_module(space.units[unit]) and not space.units[unit].levels[genome[unit]].drops
