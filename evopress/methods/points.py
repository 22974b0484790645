"""Several budgets in one run: each is a point, the settings of a run of its own.

budgets=[2.25,2.5,3]   bits (method quant), sparsities (sparsity, drop)
budgets=[40MB,60MB]    sizes (quant, joint)
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from evopress.errors import EvoPressError
from evopress.methods.targets import BYTES_OF, parsed_size
from evopress.settings import JointSettings, QuantSettings, RunSettings, SparsitySettings

_SUCH = "give numbers such as [2.25,2.5,3], or sizes such as [40MB,60MB]"


@dataclass(frozen=True)
class Point:
    """One of several budgets."""

    name: str
    """Of its folder, as it is typed: "2.5", "60MB"."""
    settings: RunSettings
    """Those of a run with this budget alone."""


def has_points(settings: RunSettings) -> bool:
    """Tell whether a run has several budgets."""
    return bool(settings.budgets)


def points_of(settings: RunSettings) -> list[Point]:
    """Return the points of a run with several budgets, from the least compressed to the most.

    Raises: EvoPressError if a budget is none, or they cannot be compared, or there is one twice.
    """
    points = {point.name: point for point in (point_at(settings, budget) for budget in settings.budgets)}
    if len(points) < len(settings.budgets):
        raise EvoPressError(f"budgets={settings.budgets} has one twice: leave it out")
    units = {parsed_size(point.settings.size)[1] == "bpw" if point.settings.size else None for point in points.values()}
    if len(units) > 1:
        raise EvoPressError(
            f"budgets={settings.budgets} mixes bits, bits per weight of all (bpw) and bytes: give all in one of them"
        )
    return sorted(points.values(), key=_spent, reverse=True)


def point_at(settings: RunSettings, budget: Any) -> Point:
    """Return the point of one budget, also one that is typed as text."""
    number, size = _parsed(budget)
    method, name = settings.method, f"{number:g}" if size is None else size
    targets: dict[str, Any] = {"bits": None, "sparsity": None, "size": size}
    if size is None:
        if isinstance(method, JointSettings):
            raise EvoPressError(
                f"budgets has {budget!r:.60}, and method joint has sizes: write {number:g}bpw, or bytes such as 60MB"
            )
        targets["bits" if isinstance(method, QuantSettings) else "sparsity"] = number
    if isinstance(method, SparsitySettings):
        method = replace(method, centre=_centre(settings))
    return Point(name, replace(settings, method=method, budgets=[], pick=None, **targets))


def _centre(settings: RunSettings) -> float | None:
    """Return the sparsity in the middle of the levels that all budgets share."""
    given = sorted(number for number, size in map(_parsed, settings.budgets) if size is None)
    return settings.method.centre if settings.method.centre is not None or not given else given[len(given) // 2]


def _parsed(budget: Any) -> tuple[float, str | None]:
    """Return a budget's number, and the size that it is where it is one."""
    text = re.sub(r"\s+", "", str(budget))
    try:
        if isinstance(budget, bool) or not text:
            raise ValueError
        number = float(text)
    except ValueError:
        try:
            return parsed_size(text)[0], text
        except EvoPressError:
            raise EvoPressError(f"budgets has {budget!r:.60}, which is no budget: {_SUCH}") from None
    if not 0 < number < float("inf"):
        raise EvoPressError(f"budgets has {budget!r:.60}, which is out of range: {_SUCH}")
    return number, None


def _spent(point: Point) -> float:
    settings = point.settings
    if settings.size is not None:
        number, unit = parsed_size(settings.size)
        return number * BYTES_OF.get(unit, 1)
    return settings.bits if settings.bits is not None else -(settings.sparsity or 0.0)
