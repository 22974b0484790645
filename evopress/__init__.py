"""EvoPress: dynamic compression of large language models. `python -m evopress --help`, or as a library: docs/library.md.

What the library offers is imported when it is first asked for.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evopress.library import build_levels, evaluate, find_baselines, find_smallest, load_model, refine, search_budgets
    from evopress.units import Space

__all__ = [
    "Space",
    "build_levels",
    "evaluate",
    "export",
    "find_baselines",
    "find_smallest",
    "load_model",
    "refine",
    "search",
    "search_budgets",
]
_BOTH = ("export", "search")
"""Names of the library that rooms have, too: the rooms are called."""


class _Room(ModuleType):
    """A room that is called like the library's function of its name."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function in `evopress.library`."""
        return getattr(import_module("evopress.library"), self.__name__.rpartition(".")[2])(*args, **kwargs)


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        if name in _BOTH and type(value) is ModuleType:  # Python puts a room here when it is first imported
            value.__class__ = _Room
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name in _BOTH:
            return import_module(f"evopress.{name}")
        if name in __all__:
            return getattr(import_module("evopress.units" if name == "Space" else "evopress.library"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


sys.modules[__name__].__class__ = _Package
