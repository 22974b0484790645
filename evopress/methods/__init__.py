"""Compression methods, by the name that `+method=` takes."""

from __future__ import annotations

from typing import Any

from evopress.errors import EvoPressError
from evopress.methods.method import Method
from evopress.methods.quant import Quantization
from evopress.methods.sparsity import Sparsity
from evopress.settings import QuantSettings, RunSettings, SparsitySettings

_METHODS: dict[type, Any] = {QuantSettings: Quantization, SparsitySettings: Sparsity}


def make_method(settings: RunSettings) -> Method:
    """Return the run's method, checked against its target.

    Raises: EvoPressError if the target is missing or cannot be met.
    """
    for schema, method in _METHODS.items():
        if isinstance(settings.method, schema):
            made: Method = method.of(settings)
            made.check(searching="search" in settings.stages)
            return made
    raise EvoPressError(f"method {settings.method!r} is unknown")


__all__ = ["Method", "make_method"]
