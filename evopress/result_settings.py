"""Which of a run's settings decide its result, so that runs that differ in others are one and the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evopress.earlier_versions import without_later

HOW_IT_RUNS = ("tracker", "paths", "threads", "level_db")
"""How a run is followed, on how many threads it computes, and how its level database is kept."""
ASKED = ("stages", "resume", "dry_run", "refine", "export", "export_options", "archive")
"""What is done, and what is done with what was found."""
_SAID_ELSEWHERE = {
    "scale": ("refine", "refine_tokens", "random_tokens", "baseline_tokens", "attribution_tokens", "screen_tokens"),
    "search": ("paper", "least"),
}
"""Settings that only decide what others are by default."""
_OF_A_SCALE = ("depth_generations",)
"""Of a scale, what is no other setting's default: by it method drop has its generations."""


def result_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that decide a result; what earlier versions had no setting for is left out where it says what they did.

    Args: values: settings as nested dictionaries, interpolations resolved; groups may be absent.
    """
    kept = result_settings_before({key: value for key, value in values.items() if key not in HOW_IT_RUNS})
    if "scale" in kept:
        kept["scale"] = {key: value for key, value in kept["scale"].items() if key in _OF_A_SCALE}
    return kept


def result_settings_before(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that earlier versions took for those that decide a result."""
    kept = without_later({key: value for key, value in values.items() if key not in ASKED})
    for group, keys in _SAID_ELSEWHERE.items():
        if group in kept:
            kept[group] = {key: value for key, value in kept[group].items() if key not in keys}
    return kept
