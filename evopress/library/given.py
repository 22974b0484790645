"""What callers give: folders, settings and their types, refused with a sentence where they are not what is expected."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from inspect import signature
from numbers import Integral, Real
from os import PathLike
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from evopress.errors import EvoPressError
from evopress.files import given_path
from evopress.settings import FitnessSettings


def check_is(value: Any, kind: type, how: str) -> None:
    """Raise EvoPressError unless a value is what another function here returns."""
    if not isinstance(value, kind):
        raise EvoPressError(f"{type(value).__name__} given where {kind.__name__} is expected: give what {how} returns")


def path_of(folder: Any) -> Path:
    """Return a folder that is given; raise EvoPressError if it is none."""
    if not isinstance(folder, str | PathLike) or folder == "":
        raise EvoPressError(f"the folder is {folder!r:.100}: give its path")
    return given_path(Path(folder), "folder")


def folder_of(given: Any) -> tuple[Path, Any]:
    """Return the folder that is given, or a temporary one and what removes that when nothing needs it any more."""
    if given is not None:
        return path_of(given), None
    kept = tempfile.TemporaryDirectory(prefix="evopress-")
    return Path(kept.name), kept


def make_settings(schema: type, settings: dict[str, Any], *, what: str) -> Any:
    """Make a dataclass of settings; sequences may be tuples.

    Raises: EvoPressError for a setting that it has not, or a value of another type.
    """
    known = [name for name in signature(schema).parameters if name != "name" or schema is FitnessSettings]
    if unknown := [key for key in settings if key not in known]:
        raise EvoPressError(f"{what} has no setting {unknown[0]}: choose among {', '.join(known)}")
    return schema(**checked(schema, settings, what=what))


def checked(schema: type, settings: Mapping[str, Any], *, what: str) -> dict[str, Any]:
    """Return settings with Python's own numbers and lists.

    Raises: EvoPressError if a value is not of the type that a dataclass of settings gives its name.
    """
    types, settings = get_type_hints(schema), {key: _plain(value) for key, value in settings.items()}
    for key, value in settings.items():
        if not _is_of(value, types[key]):
            expected = types[key].__name__ if type(types[key]) is type else types[key]
            raise EvoPressError(f"{what} takes no {key}={value!r}: expected {expected}")
    return settings


def _plain(value: Any) -> Any:
    """Return a number of another library, such as numpy's, as Python's, and a tuple as a list; also those in lists and dicts."""
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    if isinstance(value, Real) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, dict):
        return {int(key) if isinstance(key, Integral) else key: _plain(each) for key, each in value.items()}
    return value


def _is_of(value: Any, hint: Any) -> bool:
    if isinstance(hint, UnionType) or get_origin(hint) is Union:
        return any(_is_of(value, each) for each in get_args(hint))
    if hint is Any:
        return True
    if hint in (int, float):
        return isinstance(value, Real if hint is float else Integral) and not isinstance(value, bool)
    kind, parts = get_origin(hint) or hint, get_args(hint)
    if not isinstance(value, kind) or not parts:
        return isinstance(value, kind)
    if kind is dict:
        return all(_is_of(key, parts[0]) and _is_of(each, parts[1]) for key, each in value.items())
    return kind is not list or all(_is_of(each, parts[0]) for each in value)
