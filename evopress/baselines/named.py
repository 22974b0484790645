"""The baselines by the names of `baselines.names`: ours, and those of installed packages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from evopress.baselines.alpha_pruning import AlphaPruning
from evopress.baselines.atp import LinearRamp
from evopress.baselines.baseline import Baseline
from evopress.baselines.best_of_random import BestOfRandom
from evopress.baselines.block_importance import RANKINGS, RankedBlocks
from evopress.baselines.dynamic_programming import DynamicProgramming
from evopress.baselines.exhaustive import Exhaustive
from evopress.baselines.first_order import FirstOrder
from evopress.baselines.fisher import Fisher
from evopress.baselines.interactions import Interactions
from evopress.baselines.least_routed import LeastRouted
from evopress.baselines.linear_model import LinearModel
from evopress.baselines.one_at_a_time import OneAtATime
from evopress.baselines.owl import Owl
from evopress.baselines.uniform import Uniform
from evopress.errors import EvoPressError
from evopress.registry import Registry
from evopress.settings import BaselinesSettings

BY_BLOCK = (Owl, LinearRamp, AlphaPruning)
ALLOCATORS = (FirstOrder, Fisher, LinearModel, OneAtATime)
_OWN: dict[str, Callable[..., Baseline]] = {
    "uniform": Uniform,
    "best_of_random": BestOfRandom,
    "dp": DynamicProgramming,
    **{name: partial(RankedBlocks, name) for name in RANKINGS},
    "interactions": Interactions,
    "exhaustive": Exhaustive,
    "least_routed": LeastRouted,
    **{each.name: each for each in BY_BLOCK},
    **{allocator.name: allocator for allocator in ALLOCATORS},
}
BASELINES: Registry[Callable[..., Baseline]] = Registry("baseline", _OWN, group="evopress.baselines")
"""What makes a baseline, called with its options as keywords."""
_KINDS = (Uniform, BestOfRandom, DynamicProgramming, RankedBlocks, LeastRouted, Interactions, Exhaustive, *BY_BLOCK, *ALLOCATORS)
"""The order of the rows; those of other packages come last."""


def names_serving(kind: str) -> list[str]:
    """Return the names of our baselines that choose among levels of a kind, and of all those of other packages."""
    classes: dict[str, Any] = {name: getattr(make, "func", make) for name, make in _OWN.items()}
    ours = [name for name, made in classes.items() if kind in made.serves]
    return [*ours, *(name for name in BASELINES if name not in _OWN)]


def make_baselines(settings: BaselinesSettings, names: Sequence[str] | None = None) -> dict[str, Baseline]:
    """Make the baselines that the settings name, in the order of their rows.

    Args: names: make these instead.

    Raises: EvoPressError if there is none of a name, or it does not take its options.
    """
    made = {name: _make(name, settings) for name in (settings.names if names is None else names)}
    kinds = {name: type(baseline) for name, baseline in made.items()}
    places = {name: _KINDS.index(kind) if kind in _KINDS else len(_KINDS) for name, kind in kinds.items()}
    return {name: made[name] for name in sorted(made, key=places.__getitem__)}


def _make(name: str, settings: BaselinesSettings) -> Baseline:
    baseline = BASELINES.make(name, _options(name, settings), key="baselines.names", told_by="baselines.options")
    if not isinstance(baseline, Baseline):
        raise EvoPressError(
            f"baselines.names has {name!r}, which is a {type(baseline).__name__}, expected an "
            "evopress.baselines.baseline.Baseline: leave it out"
        )
    return baseline


def _options(name: str, settings: BaselinesSettings) -> dict[str, Any]:
    """Return what the settings tell a baseline."""
    told: dict[str, Any] = {}
    if name == "best_of_random":
        told = {"num_candidates": settings.num_random, "tokens": settings.random_tokens}
    elif name in [each.name for each in BY_BLOCK]:
        told = {"tokens": settings.owl_tokens}
    elif name == "exhaustive":
        told = {"tokens": settings.exhaustive_tokens, "limit": settings.exhaustive_limit}
    elif name in (*RANKINGS, "least_routed"):
        told = {"tokens": settings.importance_tokens}
    return told | settings.options.get(name, {})
