"""Compression methods, by the name that `+method=` takes."""

from __future__ import annotations

from typing import Any

from evopress.errors import EvoPressError
from evopress.methods.drop import Drop
from evopress.methods.joint import Joint
from evopress.methods.method import Method, ModuleSource, Rest, WeightSource
from evopress.methods.points import any_point, has_points, points_of
from evopress.methods.quant import Quantization
from evopress.methods.sparsity import Sparsity
from evopress.settings import DropSettings, JointSettings, QuantSettings, RunSettings, SparsitySettings

_METHODS: dict[type, Any] = {
    JointSettings: Joint,  # before what it is a kind of
    QuantSettings: Quantization,
    SparsitySettings: Sparsity,
    DropSettings: Drop,
}


def make_method(settings: RunSettings) -> Method:
    """Return the run's method, checked against its target.

    With several budgets it is the method of the first, and all are checked; where they are to be tried, of any.

    Raises: EvoPressError if the target is missing or cannot be met, or the search's bounds do not fit it.
    """
    if has_points(settings):
        checked = [_make(point.settings, typed=f"budget {point.name}") for point in points_of(settings)]
        return checked[0] if checked else _make(any_point(settings))
    return _make(settings)


def _make(settings: RunSettings, *, typed: str | None = None) -> Method:
    """Return the method of a run with one budget; see `make_method`.

    Args: typed: what the budget is in sentences; None: the setting that gives it.
    """
    for schema, method in _METHODS.items():
        if isinstance(settings.method, schema):
            made: Method = method.of(settings)
            searching = "search" in settings.stages
            made.check(searching=searching, typed=typed)
            bounds = {key: getattr(settings.search, key) for key in ("max_level", "max_total_deviation")}
            bounded = [f"search.{key}={bound}" for key, bound in bounds.items() if bound is not None]
            if searching and bounded and not made.target_is_level:
                raise EvoPressError(
                    f"{' and '.join(bounded)} counts from the target's level, but the target is between two levels: choose one "
                    "of the levels as target, or null for no bound"
                )
            return made
    raise EvoPressError(f"method {settings.method!r} is unknown")


__all__ = ["Method", "ModuleSource", "Rest", "WeightSource", "make_method"]
