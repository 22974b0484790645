"""The levels of a genome that was found before, which a level database is built around."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from evopress.errors import EvoPressError
from evopress.files import given_path
from evopress.json_files import load_document
from evopress.units import Space

_KEY = "method.around"


def genome_file(given: str) -> Path:
    """Return the genome.json that is named by itself or by the folder it lies in.

    Raises: EvoPressError if there is none.
    """
    path = given_path(given, _KEY)
    path = path / "genome.json" if path.is_dir() else path
    if path.suffix != ".json" or not path.is_file():
        raise EvoPressError(f"{_KEY}={given} is no genome.json, nor a folder that has one: give those of a finished run")
    return path


def keys_of_genome(given: str, space: Space) -> dict[str, str]:
    """Return the key of each unit's level in a genome that has one for every unit of a space, by the unit's name.

    Raises: EvoPressError if there is no such file, or it is of other units or levels.
    """
    path = genome_file(given)
    units = load_document(path, what="genome file", newest=1).get("units")
    entries = [entry for entry in units if isinstance(entry, dict)] if isinstance(units, list) else []
    labels: dict[Any, Any] = {entry.get("name"): entry.get("label") for entry in entries}
    wanted = {unit.name: unit for unit in space.units}
    if set(labels) != set(wanted):
        raise EvoPressError(
            f"{_KEY}={given} is a genome of {len(labels)} units, {len(set(labels) & set(wanted))} of which are among the "
            f"{len(wanted)} here: give one of the same model and method"
        )
    keys = {}
    for name, unit in wanted.items():
        of_label = {level.label: level.key for level in unit.levels}
        if labels[name] not in of_label:
            raise EvoPressError(f"{_KEY}={given} has {name} at {labels[name]}, expected one of {', '.join(of_label)}")
        keys[name] = of_label[labels[name]]
    return keys
