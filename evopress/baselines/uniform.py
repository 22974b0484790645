"""The uniform baseline: one level for all units."""

from __future__ import annotations

from evopress.units import Genome, Space


def uniform_genomes(space: Space) -> dict[str, Genome]:
    """Return the uniform genome of every level that all units have, least compressed first, named `uniform_<key>`."""
    genomes = {f"uniform_{level.key}": space.uniform(level.label) for level in space.units[0].levels}
    return {name: genome for name, genome in genomes.items() if genome is not None}
