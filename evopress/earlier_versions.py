"""What earlier versions did where this one has a setting, so that their runs are gone on with and stay finished."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

_METHOD = {
    "grid": "integers",
    "recipe": "paper",
    "symmetric": False,
    "group_sizes": {},
    "tolerance": 0.02,
    "zeros": "any",
    "include": ["blocks"],
    "experts": "each",
    "centre": None,
    "correction": 0.0,
}
"""Settings of a method that weights are compressed by, with the value that they had before they were settings."""
_RUN: dict[str, Any] = {
    "genome": None,
    "size": None,
    "limits": [],
    "budgets": [],
    "pick": None,
    "max_kl": None,
    "min_agreement": None,
    "engine": "none",
}
_MODEL = {"bos": "auto"}
_DATA: dict[str, Any] = {"chat_template": "auto", "options": {}}
_FITNESS: dict[str, Any] = {"options": {}}
_BASELINES: dict[str, Any] = {"options": {}}
_EVALUATION: dict[str, Any] = {"field": "text"}
_REFINE: dict[str, Any] = {"correction": 0.0, "scale_epochs": 0, "scale_rate": 0.002}

_GUIDED: dict[str, Any] = {
    "approach": 2,
    "approach_tokens": 0,
    "selection": "mean",
    "race_parts": 8,
    "race_margin": 2.0,
    "race_accept": 1.0,
    "second_order_rounds": 0,
    "second_order_tokens": None,
    "second_order_changes": [80, 40, 20, 10],
    "delta_rounds": 0,
    "delta_tokens": 256,
    "delta_parts": 2,
    "predicted_offspring": 0.0,
}
"""Settings of search/strategy=guided that its first version did not have, with what leaves the search as it was."""

_GROUPS: dict[str, dict[str, Any]] = {
    "": _RUN,
    "model": _MODEL,
    "data": _DATA,
    "fitness": _FITNESS,
    "method": _METHOD,
    "baselines": _BASELINES,
    "evaluation": _EVALUATION,
    "refine": _REFINE,
    "search.strategy": {"name": "evolution", **_GUIDED},
}
_ON_ALL_TEXT = ("experiment=table4", "experiment=table5", "experiment=table6")
"""Sweeps that measured their searches on all held-out text on the way."""

_MUTATION = re.compile(r"\+*search/mutation=(min_uniform|constant)_(\d+)")
_FIRST_STAGE = re.compile(r"\+*search/first_stage=(\d+)_tokens")


def as_written_now(overrides: Sequence[str]) -> list[str]:
    """Return overrides with values in the place of options that only named points of the sweeps of Tables 4 and 5."""
    written = []
    for override in overrides:
        if found := _MUTATION.fullmatch(override):
            written += [f"search.distribution={found[1]}", f"search.max_switches={found[2]}"]
        elif found := _FIRST_STAGE.fullmatch(override):
            written += [f"search.paper.tokens=[{found[1]},8192]", "search.least.tokens=[0.125,0.125]"]
        else:
            written.append(override)
    return written


def without_later(values: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out of a run's settings what earlier versions did not have, where it says what they did; groups may be absent."""
    kept = _without(values, _RUN)
    strategy = (kept.get("search") or {}).get("strategy") or {"name": "evolution"}
    if strategy == {"name": "evolution"} and "search" in kept:
        kept["search"] = {key: value for key, value in kept["search"].items() if key != "strategy"}
    elif strategy.get("name") == "guided":
        kept["search"] = {**kept["search"], "strategy": _without(strategy, _GUIDED)}
    if (kept.get("method") or {}).get("scale_dtype") == "auto":
        kept["method"] = {**kept["method"], "scale_dtype": "float16"}
    for group in ("model", "data", "fitness", "method", "baselines", "evaluation"):
        if group in kept:
            kept[group] = _without(kept[group], _GROUPS[group])
    return kept


def _without(values: Mapping[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out settings that have the value that earlier versions had for them."""
    return {key: value for key, value in values.items() if key not in later or value != later[key]}


def earlier_value(key: str) -> Any:
    """Return what earlier versions did where this one has a setting, by its dotted key; None where they had it as well."""
    group, _, name = key.rpartition(".")
    return _GROUPS.get(group, {}).get(name)


def refine_without_later(values: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out of the settings of the stage refine what earlier versions did not have, where it says what they did."""
    return _without(values, _REFINE)


def defaults_of(config: Mapping[str, Any], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return the defaults that have changed since the version that composed a run's config, as that run had them.

    Args:
        config: the composed config that lies in its folder.
        overrides: what is typed, then or now.

    Returns: settings by their dotted keys; none for a run of this version.
    """
    model, data, method, search = (config.get(group) or {} for group in ("model", "data", "method", "search"))
    strategy = search.get("strategy") or {"name": "evolution"}
    had: dict[str, Any] = {}
    if "correction" not in (config.get("refine") or _REFINE):
        had["refine.correction"] = 0.0
    if (
        method.get("name") in ("quant", "sparsity", "joint")
        and isinstance(strategy, Mapping)
        and strategy.get("name") == "evolution"
    ):
        had["search/strategy"] = "evolution"
    if any(override.lstrip("+") == "search=super_fast" for override in overrides) and search.get("exchange") == "size":
        had["search.exchange"] = "size"
    evaluation = config.get("evaluation") or {}
    if any(override.lstrip("+") in _ON_ALL_TEXT for override in overrides) and evaluation.get("every_tokens", 0) is None:
        had["evaluation.every_tokens"] = None
    if "bos" in model:
        return had
    had |= {
        f"{group}.{key}": values[key]
        for group, values, key in (("model", model, "dtype"), ("data", data, "calibration_tokens"))
        if key in values
    }
    if method.get("name") in ("quant", "sparsity") and "recipe" not in method:
        had["method.recipe"] = "paper"
    if "scale" in config and "refine" not in config:
        had["scale.refine"] = False
    return had
