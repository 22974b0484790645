"""The uniform baseline: one level for all units."""

from __future__ import annotations

from collections.abc import Callable

from evopress.search.initial import one_level
from evopress.units import Genome, Level, Space


def uniform_genomes(space: Space, name: Callable[[Level], str] = lambda level: f"uniform_{level.key}") -> dict[str, Genome]:
    """Return the uniform genome of every level that all units have, least compressed first, by its name."""
    genomes = {name(level): one_level(space, level.key) for level in space.units[0].levels}
    return {name: genome for name, genome in genomes.items() if genome is not None}
