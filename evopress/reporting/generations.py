"""Read the records of a search back, checked for what every generation's record has."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from evopress.errors import EvoPressError
from evopress.json_files import shown
from evopress.reporting.records import each_record
from evopress.units import Space


def read_generations(path: str | Path, space: Space) -> list[dict[str, Any]]:
    """Read `metrics.jsonl`; see `read_records`.

    Args: space: the units and levels that genomes and switches are of.

    Raises: EvoPressError if a record lacks something, has it of another type, or names units or levels that are not there.
    """
    return list(each_generation(path, space))


def each_generation(path: str | Path, space: Space) -> Iterator[dict[str, Any]]:
    """Yield what `read_generations` returns, record by record, each checked before it is: of many, a list takes much memory."""
    for number, record in enumerate(each_record(path), start=1):
        for key, fits in _FITS.items():
            if not fits(record.get(key), space):
                raise EvoPressError(
                    f"record {number} of {path} is damaged: its {key} is {shown(record.get(key))}; restore the file, or remove it "
                    "and state.json beside it to search again"
                )
        yield record


def _count(value: Any, space: Space) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _number(value: Any, space: Space) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return type(value) is int and abs(value) < 2**63


def _number_or_none(value: Any, space: Space) -> bool:
    return value is None or _number(value, space)


def _genome(value: Any, space: Space) -> bool:
    return (
        isinstance(value, list)
        and len(value) == len(space)
        and all(type(level) is int and 0 <= level < len(unit.levels) for unit, level in zip(space.units, value, strict=True))
    )


def _switches(value: Any, space: Space) -> bool:
    return isinstance(value, list) and all(
        isinstance(switch, list)
        and len(switch) == 3
        and all(type(number) is int for number in switch)
        and 0 <= switch[0] < len(space)
        and all(0 <= level < len(space.units[switch[0]].levels) for level in switch[1:])
        for switch in value
    )


def _stages(value: Any, space: Space) -> bool:
    return isinstance(value, list) and all(
        isinstance(stage, dict)
        and _count(stage.get("tokens"), space)
        and isinstance(stage.get("fitnesses"), list)
        and all(_number_or_none(fitness, space) for fitness in stage["fitnesses"])
        and stage.get("num_candidates") == len(stage["fitnesses"])
        and isinstance(stage.get("survivors"), list)
        and all(type(index) is int and 0 <= index < len(stage["fitnesses"]) for index in stage["survivors"])
        for stage in value
    )


def _held_out(value: Any, space: Space) -> bool:
    if value is None:
        return True
    return (
        isinstance(value, dict)
        and _number_or_none(value.get("kl"), space)
        and isinstance(value.get("perplexity", {}), Mapping)
        and all(_number_or_none(perplexity, space) for perplexity in value.get("perplexity", {}).values())
    )


_FITS: dict[str, Callable[[Any, Space], bool]] = {
    "generation": _count,
    "genome": _genome,
    "fitness": _number_or_none,
    "accepted": lambda value, space: isinstance(value, bool),
    "parent_fitness": _number_or_none,
    "stages": lambda value, space: value is None or _stages(value, space),
    "switches": lambda value, space: value is None or _switches(value, space),
    "tokens": _count,
    "evaluations": _count,
    "cost": _count,
    "seconds": _number,
    "held_out": _held_out,
}
"""What a record has, and the test that it must pass; stages and switches are of strategies that have them."""
