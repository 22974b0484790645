"""The levels of depth pruning, which store no weights: a module is kept, or it is dropped.

A level database of dropped modules is a manifest alone. A unit is an attention module, an MLP, a whole block, a pair of
consecutive blocks, or an expert; its last level drops it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evopress.compress.compressor import Payload
from evopress.currencies import CURRENCIES, num_experts, num_modules
from evopress.files import make_folder
from evopress.levels.locking import alone_in, clear
from evopress.levels.store import DamagedDatabaseError, LevelDatabase, damage_in, fingerprint, told_of, write_manifest
from evopress.units import Space, Unit

ATTENTION, MLP, BLOCK, PAIR = "attention", "mlp", "block", "pair"
"""Kinds of units."""
KEEP, DROP = "keep", "drop"
"""Keys and labels of levels."""


def modules_of(unit: Unit) -> tuple[tuple[int, str], ...]:
    """Return what a unit stands for: (block, ATTENTION or MLP) of each of its modules; a weight and an expert stand for none."""
    if not num_modules(unit):
        return ()
    if unit.kind in (ATTENTION, MLP):
        return ((unit.block, unit.kind),)
    blocks = (unit.block, unit.block + 1) if unit.kind == PAIR else (unit.block,)
    return tuple((block, kind) for block in blocks for kind in (ATTENTION, MLP))


def dropped_modules(space: Space, genome: Sequence[int]) -> set[tuple[int, str]]:
    """Return the modules that a genome drops."""
    return {
        module for unit, level in zip(space.units, genome, strict=True) if unit.levels[level].drops for module in modules_of(unit)
    }


def bits_read(space: Space, genome: Sequence[int]) -> int:
    """Return the bits that a token reads of a genome's units; it is sent to as many experts, however few are left of them."""
    layers = Counter(unit.group for unit in space.units if num_experts(unit))
    there = layers - Counter(
        unit.group for unit, level in zip(space.units, genome, strict=True) if num_experts(unit) and unit.levels[level].drops
    )
    prices = space.prices_in(CURRENCIES["read"])
    more = [layers.get(layer := _layer_of(unit), 1) / there.get(layer, 1) for unit in space.units]
    return round(sum(more[i] * prices[i][level] for i, level in enumerate(genome) if not space.is_gone(genome, i)))


def _layer_of(unit: Unit) -> str:
    return unit.group if num_experts(unit) else unit.name.rpartition(".")[0].rpartition(".")[0]


def ensure_modules(
    root: Path, *, model_name: str, method: str, recipe: Mapping[str, Any], space: Space
) -> tuple[LevelDatabase, bool]:
    """Open the manifest of a space of modules, writing it first if there is none; also tell whether it was there.

    Raises: EvoPressError if the folder cannot be written to.
    """
    digits = fingerprint(recipe)
    folder = root / model_name / f"{method}-{digits}"
    try:
        database = LevelDatabase.open(folder)
        clear(folder)
        return database, True
    except DamagedDatabaseError as error:  # written again below
        damage = damage_in(folder, error)
    units = [
        {
            "name": unit.name,
            "block": unit.block,
            "kind": unit.kind,
            "size": unit.size,
            "levels": [
                {"label": level.label, "key": level.key, "cost": level.cost, "stored_bits": level.stored_bits}
                for level in unit.levels
            ],
        }
        for unit in space.units
    ]
    with told_of(damage):
        make_folder(folder)
    with alone_in(folder):
        write_manifest(folder, method=method, fingerprint=digits, recipe=recipe, entries=[{"units": units}])
    return LevelDatabase.open(folder), False


@dataclass(frozen=True)
class ModuleLevels:
    """The levels of modules as a live model takes them, without a database: there is nothing to read."""

    space: Space
    folder: Path = Path()

    def read(self, unit: int, level: int, device: Any = "cpu") -> Payload:
        """A module has no weights of its own."""
        raise AssertionError(f"{self.space.units[unit].name} is a module")
