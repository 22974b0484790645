"""Names to parts that are swapped whole: our own, and those that installed packages offer as entry points.

A part is loaded when it is asked for and not before, so that naming the choices imports nothing.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from inspect import Parameter, signature
from typing import Any, Generic, TypeVar

from evopress.errors import EvoPressError, reason_of

logger = logging.getLogger(__name__)

Part = TypeVar("Part")


class Registry(Generic[Part]):
    """The parts of one kind by name, ours first.

    A package offers its own in its pyproject.toml, a factory or whatever else the registry holds:

        [project.entry-points."evopress.text_sources"]
        stories = "my_package.text:Stories"
    """

    def __init__(self, kind: str, own: Mapping[str, str | Part], *, group: str) -> None:
        """Name the parts.

        Args:
            kind: what one part is, in an error's words: "text source".
            own: name to a part, or to where it is: "evopress.baselines.owl:Owl".
            group: of the entry points by which other packages offer theirs: "evopress.text_sources".
        """
        self.kind, self.group = kind, group
        self._own = dict(own)

    def names(self) -> tuple[str, ...]:
        """Return the names that there are, those of other packages last and in alphabetical order."""
        return (*self._own, *sorted({point.name for point in _offered(self.group)} - set(self._own)))

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __contains__(self, name: object) -> bool:
        return name in self._own or any(point.name == name for point in _offered(self.group))

    def is_own(self, name: str) -> bool:
        """Tell whether a part is ours, and no other package's."""
        return name in self._own

    def get(self, name: str, *, key: str) -> Part:
        """Return a part by name. Ours cannot be replaced: where another package uses one of our names, a warning says so.

        Args: key: the setting that names it, for errors: "data.source".

        Raises: EvoPressError if there is none of that name, two packages offer it, or the one that does cannot be imported.
        """
        points = [point for point in _offered(self.group) if point.name == name]
        if name in self._own:
            if points:
                logger.warning("%s=%s: taken from EvoPress, not from %s", key, name, _origins(points))
            return self._load_own(self._own[name])
        if not points:
            raise EvoPressError(f"{key}={name} is unknown: choose one of {', '.join(self.names())}")
        if len(points) > 1:
            raise EvoPressError(f"{key}={name} is registered by {_origins(points)}: uninstall all but one of them")
        try:
            loaded: Part = points[0].load()
        except Exception as error:
            raise EvoPressError(
                f"{self.called(name)} could not be loaded ({reason_of(error)}): repair that package, or choose another {key}"
            ) from error
        return loaded

    def called(self, name: str) -> str:
        """Name a part with the package that it comes from: "the text source stories of package mine 1.0 (my_package:Stories)"."""
        points = [] if name in self._own else [point for point in _offered(self.group) if point.name == name]
        return f"the {self.kind} {name}" + (f" of {_origins(points)}" if points else "")

    def make(self, name: str, options: Mapping[str, Any], *, key: str, told_by: str) -> Any:
        """Call the part of this name with its options, where the parts are factories that take keywords.

        Args:
            key: the setting that names it, for errors: "data.source".
            told_by: the setting that the options come from, for errors: "data.options".

        Raises: EvoPressError as `get`, and if it does not take these options, or is another package's and raises.
        """
        make: Any = self.get(name, key=key)
        try:
            signature(make).bind(**options)
        except TypeError as error:
            raise EvoPressError(
                f"the {self.kind} {name} does not accept {told_by}={dict(options)} ({error}): {_options_of(make)}"
            ) from None
        try:
            return make(**options)
        except EvoPressError:
            raise
        except TypeError as error:  # of a class that lacks a method
            raise EvoPressError(f"the {self.kind} {name} cannot be made ({error}): repair it, or choose another {key}") from error
        except Exception as error:
            if name in self._own:
                raise
            raise EvoPressError(
                f"{self.called(name)} cannot be made ({reason_of(error)}): give it other {told_by}, repair that package, or "
                f"choose another {key}"
            ) from error

    @staticmethod
    def _load_own(part: str | Part) -> Part:
        if not isinstance(part, str):
            return part
        module, _, attribute = part.partition(":")
        loaded: Any = getattr(importlib.import_module(module), attribute)
        return loaded


def _offered(group: str) -> list[EntryPoint]:
    """Return the entry points of a group; what is installed is read anew only where a folder of the path has changed."""
    return _read_offered(group, tuple((path, _changed(path)) for path in sys.path))


@lru_cache(maxsize=64)
def _read_offered(group: str, _path: tuple[tuple[str, int | None], ...]) -> list[EntryPoint]:
    return list(entry_points(group=group))


def _changed(path: str) -> int | None:
    """Return when a folder or archive last changed, in nanoseconds."""
    try:
        return os.stat(path or ".").st_mtime_ns
    except OSError:
        return None


def _origins(points: list[EntryPoint]) -> str:
    """Name the packages that entry points come from, and where each points: "package stories 1.0 (my_package.text:Stories)"."""
    packages = [f"package {point.dist.name} {point.dist.version}" if point.dist else "a package" for point in points]
    return " and ".join(f"{package} ({point.value})" for package, point in zip(packages, points, strict=True))


def _options_of(make: Any) -> str:
    """Say what a factory takes: "its options are path, steps=1"."""
    known = [str(each.replace(annotation=Parameter.empty)) for each in signature(make).parameters.values()]
    return f"its options are {', '.join(known)}" if known else "it has no options"
