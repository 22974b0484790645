"""The strategies by name: ours, and those that installed packages offer."""

from __future__ import annotations

from dataclasses import is_dataclass
from typing import Any

from evopress.errors import EvoPressError
from evopress.registry import Registry
from evopress.search.strategy import StrategySettings

STRATEGIES: Registry[type[StrategySettings]] = Registry(
    "search strategy",
    {"evolution": "evopress.search.evolution:EvolutionStrategy", "guided": "evopress.search.guided_settings:GuidedStrategy"},
    group="evopress.strategies",
)
"""A name to the dataclass of its settings, which Hydra gets as `search/strategy=NAME`."""


def settings_class(name: str, *, key: str) -> type[StrategySettings]:
    """Return the dataclass of a strategy's settings.

    Args: key: the setting that names it, for errors.

    Raises: EvoPressError if there is no such strategy, it cannot be loaded, or is no dataclass.
    """
    found = STRATEGIES.get(name, key=key)
    if not isinstance(found, type) or not is_dataclass(found):
        raise EvoPressError(
            f"{STRATEGIES.called(name)} is no dataclass, expected one of its settings, each with a default: repair that package, "
            f"or choose another {key}"
        )
    return found


def strategy_of(chosen: Any) -> StrategySettings:
    """Return the settings of a strategy; None stands for the paper's.

    Raises: EvoPressError if there is no such strategy, or the settings are of another one than they name.
    """
    if chosen is None:
        return settings_class("evolution", key="search.strategy.name")()
    name = chosen.get("name") if isinstance(chosen, dict) else getattr(chosen, "name", None)
    if not isinstance(name, str):
        raise EvoPressError(f"search.strategy={chosen} names no strategy: choose one with search/strategy={'|'.join(STRATEGIES)}")
    settings = settings_class(name, key="search.strategy.name")
    if not isinstance(chosen, settings):
        raise EvoPressError(
            f"search.strategy.name={name} does not match the other search.strategy settings: choose it with search/strategy={name}"
        )
    return chosen
