"""Several budgets in one run: each is a point, the settings of a run of its own.

budgets=[2.25,2.5,3]   bits (method quant), sparsities (sparsity, drop)
budgets=[40MB,60MB]    sizes (quant, joint)
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from evopress.errors import EvoPressError
from evopress.methods.method import Rest
from evopress.methods.quant import bits_of
from evopress.methods.targets import BYTES_OF, parsed_size
from evopress.settings import JointSettings, QuantSettings, RunSettings, SparsitySettings
from evopress.units import Space

_BIT_STEP, _SPARSITY_STEP = 1 / 16, 1 / 80
_ONE: dict[str, Any] = {"budgets": [], "pick": None, "max_kl": None, "min_agreement": None}
_SUCH = "give numbers such as [2.25,2.5,3], or sizes such as [40MB,60MB]"


@dataclass(frozen=True)
class Point:
    """One of several budgets."""

    name: str
    """Of its folder, as it is typed: "2.5", "60MB"."""
    settings: RunSettings
    """Those of a run with this budget alone."""


@contextmanager
def at_budget(name: str) -> Iterator[None]:
    """Name a budget in what is refused of it.

    Args: name: of its point; empty: the run has no other, and sentences name the setting.
    """
    try:
        yield
    except EvoPressError as error:
        if not name:
            raise
        raise EvoPressError(f"budget {name}: {error}") from error


def has_points(settings: RunSettings) -> bool:
    """Tell whether a run has several budgets, given or to be tried."""
    return bool(settings.budgets) or has_limit(settings)


def has_limit(settings: RunSettings) -> bool:
    """Tell whether a run is to find the smallest model that keeps something."""
    return settings.max_kl is not None or settings.min_agreement is not None


def any_point(settings: RunSettings) -> RunSettings:
    """Return the settings of a run with one budget, the first that is given, or any: for what does not depend on it."""
    if settings.budgets:
        return points_of(settings)[0].settings
    if isinstance(settings.method, JointSettings):
        return point_at(settings, "1TB").settings
    if isinstance(settings.method, QuantSettings):
        widths = [bits_of(level) for level in settings.method.levels]
        return point_at(settings, (min(widths) + max(widths)) / 2).settings
    return point_at(settings, 0.5 if settings.sparsity is None else settings.sparsity).settings


def grid(settings: RunSettings, space: Space, rest: Rest) -> list[Point]:
    """Return the budgets that are tried: those that are given, or all multiples of a step between the space's ends.

    The steps are 1/16 bit, of weights that are units or, where sizes are counted, of all; and 1/80 of sparsity.
    """
    if settings.budgets:
        return points_of(settings)
    least, most = space.least_cost, space.greatest_cost
    if isinstance(settings.method, SparsitySettings):
        ends, step, suffix = (1 - most / space.size, 1 - least / space.size), _SPARSITY_STEP, ""
    elif isinstance(settings.method, JointSettings):
        weights = space.size + rest.weights
        ends, step, suffix = ((rest.bits + least) / weights, (rest.bits + most) / weights), _BIT_STEP, "bpw"
    else:
        ends, step, suffix = (least / space.size, most / space.size), _BIT_STEP, ""
    found = [round(number * step, 6) for number in range(math.floor(ends[0] / step) + 1, math.ceil(ends[1] / step))]
    return in_order(point_at(settings, f"{value:g}{suffix}") for value in found)


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
            f"budgets={settings.budgets} mixes units: give all in bits, in bits per weight of all (bpw), or in bytes"
        )
    return in_order(points.values())


def in_order(points: Iterable[Point]) -> list[Point]:
    """Return points from the least compressed to the most."""
    return sorted(points, key=_spent, reverse=True)


def point_at(settings: RunSettings, budget: Any) -> Point:
    """Return the point of one budget, also one that is typed as text."""
    number, size = _parsed(budget)
    method, name = settings.method, f"{number:g}" if size is None else size
    targets: dict[str, Any] = {"bits": None, "sparsity": None, "size": size}
    if size is None:
        if isinstance(method, JointSettings):
            raise EvoPressError(
                f"budgets has {budget!r:.60}, but method joint takes sizes: write {number:g}bpw, or bytes such as 60MB"
            )
        targets["bits" if isinstance(method, QuantSettings) else "sparsity"] = number
    if isinstance(method, SparsitySettings):
        method = replace(method, centre=_centre(settings))
    return Point(name, replace(settings, **_ONE, method=method, **targets))


def _centre(settings: RunSettings) -> float | None:
    """Return the sparsity in the middle of the levels that all budgets share."""
    if not settings.budgets and settings.method.centre is None:
        return settings.sparsity
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
            return float(parsed_size(text)[0]), text
        except EvoPressError:
            raise EvoPressError(f"budgets has {budget!r:.60}, which is no budget: {_SUCH}") from None
    if not 0 < number < float("inf"):
        raise EvoPressError(f"budgets has {budget!r:.60}, which is out of range: {_SUCH}")
    return number, None


def _spent(point: Point) -> float:
    settings = point.settings
    if settings.size is not None:
        number, unit = parsed_size(settings.size)
        return float(number * BYTES_OF.get(unit, 1))
    return settings.bits if settings.bits is not None else -(settings.sparsity or 0.0)
