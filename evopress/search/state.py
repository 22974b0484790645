"""What all strategies ask of a saved state before they go on from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from evopress.errors import EvoPressError


def check_same_search(saved: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raise EvoPressError if a saved search differs from this one in what both say of themselves."""
    changed = [f"{key} {saved[key]!r:.100} there, {here[key]!r} here" for key in here if key in saved and saved[key] != here[key]]
    if changed:
        raise EvoPressError(
            f"the saved search had other settings ({'; '.join(changed)}): resume it with its own, or start a new run"
        )


def check_counts(state: Mapping[str, Any], keys: Sequence[str]) -> None:
    """Raise ValueError if one of these is there and no whole number."""
    for key in keys:
        if type(state.get(key, 0)) is not int or state.get(key, 0) < 0:
            raise ValueError(f"its {key} is {state[key]!r:.100}, expected a whole number")
