"""Search levels for the genome that is closest to the dense model, and find those that it is compared with."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from evopress.data.opening import GivenText
from evopress.errors import EvoPressError
from evopress.files import make_folder
from evopress.library.given import checked, folder_of, make_settings
from evopress.library.levels import Levels, check_levels, text_settings
from evopress.library.models import Text, alone
from evopress.methods.points import points_of
from evopress.reporting.generations import read_generations
from evopress.reporting.records import read_genome
from evopress.reporting.tracker import NullTracker
from evopress.search.strategies import settings_class
from evopress.settings import BaselinesSettings, FitnessSettings, RunSettings, SearchConfig, SparsitySettings
from evopress.stages.baselines import find_baselines as run_the_baselines
from evopress.stages.baselines import stored_baselines, with_further_levels
from evopress.stages.bisection import Bisection, Kept, budgets_to_try
from evopress.stages.checks import check_baselines, check_names, check_strategy, check_tokens, searching_of
from evopress.stages.earlier import refuse_other_settings
from evopress.stages.points import check_points, open_point, refuse_other_points, search_points
from evopress.stages.search import search as run_the_search
from evopress.stages.searchable import check_asks
from evopress.units import Genome
from evopress.workspace import Workspace

_EXCHANGES = {"drop": "name", "joint": "fit", "quant": "size", "sparsity": "any"}
"""As the methods' configs choose: attention for attention, whatever fits the size, steps of as many weights in any unit."""


@dataclass(frozen=True)
class Found:
    """What a search found."""

    genome: Genome
    fitness: float
    """On the last minibatch of the last generation that measured it; NaN if none did. Lower is better."""
    folder: Path
    """Its run folder: genome.json, metrics.jsonl, and what a search needs to go on."""
    records: list[dict[str, Any]] = field(repr=False)
    """One per generation, as in metrics.jsonl."""
    kept: Any = field(default=None, repr=False)
    database: str = field(default="", repr=False)
    """Fingerprint of the levels that the genome counts."""
    budget: str | None = None
    """Which of several, as it is typed: "2.5", "60MB"; None: the levels' own."""


@alone
def search(
    levels: Levels,
    text: Text,
    *,
    fitness: str = "kl",
    seed: int = 0,
    folder: str | Path | None = None,
    **settings: Any,
) -> Found:
    """Search the levels for the genome that keeps the target and is closest to the dense model.

    Args:
        text: what minibatches are drawn from.
        fitness: kl, topk_kl, perplexity, or a measure of an installed package.
        seed: of every generator.
        folder: run folder, in which a search that was interrupted goes on; None: a temporary one.
        settings: the search's own: generations=50, num_offspring=16, survivors=[4, 1], tokens=[2048, 16384], starts=["dp"] and
            what else `SearchConfig` has. strategy: a name, "evolution" (the default) or "guided"; or that with numbers of its own,
            {"name": "guided", "rounds": 3}.

    Raises: EvoPressError if a setting is unknown or out of range, there is too little text, the target leaves nothing to search, or
        the folder has another search.
    """
    workspace, kept = _searching(levels, text, settings, what="search", fitness=fitness, seed=seed, folder=folder)
    numbers = searching_of(workspace)
    refuse_other_settings(workspace, numbers)
    check_asks(workspace, numbers, workspace.database.space, workspace.budget)
    run_the_search(workspace, numbers, NullTracker())
    return _found(workspace, kept)


@alone
def search_budgets(
    levels: Levels,
    text: Text,
    budgets: Sequence[float | str],
    *,
    fitness: str = "kl",
    seed: int = 0,
    folder: str | Path | None = None,
    **settings: Any,
) -> list[Found]:
    """Search the same levels at several budgets, each from the genome of the nearest before it: a run's `budgets=`.

    Args:
        budgets: bits or sparsities, such as [2.25, 2.5, 3], or sizes, ["40MB", "60MB"], in place of the levels' target.
        text, fitness, seed, folder, settings: as of `search`.

    Returns: what was found at each `budget`, from the least compressed to the most.

    Raises: EvoPressError as `search` does, or if a budget is none, cannot be met or cannot be searched; before the first search.
    """
    if not (listed := _listed(budgets)):
        raise EvoPressError("budgets is empty: give some, such as [2.5, 3], or call search for the levels' own target")
    several = {"budgets": listed}
    workspace, kept = _searching(levels, text, settings, several, what="search_budgets", fitness=fitness, seed=seed, folder=folder)
    points = [open_point(workspace, point) for point in points_of(workspace.settings)]
    refuse_other_points(points)
    check_points(points, workspace.database.space)
    search_points(points)
    return [_found(point.workspace, kept, budget=point.name) for point in points]


@alone
def find_smallest(
    levels: Levels,
    text: Text,
    *,
    max_kl: float | None = None,
    min_agreement: float | None = None,
    budgets: Sequence[float | str] = (),
    fitness: str = "kl",
    seed: int = 0,
    folder: str | Path | None = None,
    **settings: Any,
) -> Found:
    """Find the smallest `budget` whose found genome keeps a limit, by bisection on search text: a run's `max_kl=`.

    Args:
        max_kl: KL divergence from the dense model that is kept, in nats per token.
        min_agreement: share of tokens at which the most likely next one stays the dense model's; one of the two.
        budgets: to choose among; none: multiples of a sixteenth of a bit, or of 1/80 of sparsity.
        text, fitness, seed, folder, settings: as of `search`.

    Raises: EvoPressError as `search` does, or if neither or both limits are given, or no budget keeps it.
    """
    if max_kl is None and min_agreement is None:
        raise EvoPressError("find_smallest has no limit: give max_kl=0.1 or min_agreement=0.9")
    several = {"max_kl": max_kl, "min_agreement": min_agreement, "budgets": _listed(budgets)}
    workspace, kept = _searching(levels, text, settings, several, what="find_smallest", fitness=fitness, seed=seed, folder=folder)
    tried = budgets_to_try(workspace)
    points = [open_point(workspace, point) for point in tried]
    refuse_other_points(points)
    if workspace.settings.budgets:  # any of which may be searched
        check_points(points, workspace.database.space)
    answer = Bisection(workspace, Kept.of(workspace.settings), tried, {}).find()
    return _found(answer.workspace, kept, budget=answer.name)


@alone
def find_baselines(
    levels: Levels,
    text: Text,
    names: Sequence[str],
    *,
    fitness: str = "kl",
    seed: int = 0,
    folder: str | Path | None = None,
    **settings: Any,
) -> dict[str, Genome]:
    """Find the genomes that a search is compared with, at the levels' target: the stage `baselines` of a run.

    Args:
        text: search text.
        names: uniform, dp, fisher and what else docs/methods.md has; those with levels of their own aside: owl, atp,
            alphapruning, and uniform where a sparsity is not method.centre.
        fitness: kl, topk_kl, perplexity, or a measure of an installed package.
        seed: of every generator.
        folder: where they are kept, and found again; None: a temporary one.
        settings: the baselines' own: num_random=32, importance_tokens=131072, options={"fisher": {"tokens": 4096}} and what else
            `BaselinesSettings` has.

    Returns: genomes by the names that rows of a run have. The uniform one next above the target is among them.

    Raises: EvoPressError if there is no such baseline for the method, a setting is unknown or out of range, or there is too little
        text.
    """
    check_levels(levels)
    tokens = levels.model.sequences(text)
    asked = make_settings(BaselinesSettings, {**settings, "names": names}, what="find_baselines")
    stages = ["database", "baselines"]
    run = _asking(levels, tokens, what="find_baselines", fitness=fitness, seed=seed, baselines=asked, stages=stages)
    check_names(run)
    check_baselines(run)
    run_dir, _kept = folder_of(folder)
    make_folder(run_dir)
    workspace = _with_text(levels, run, run_dir, tokens)
    if further := ",".join(with_further_levels(workspace)):
        raise EvoPressError(
            f"baselines compress weights anew, to levels that these lack: leave {further} out, or take the command, "
            f"python -m evopress +method={run.method.name} baselines.names=[{further}]"
        )
    run_the_baselines(workspace)
    return stored_baselines(workspace)[0]


def _searching(
    levels: Levels,
    text: Text,
    settings: dict[str, Any],
    several: Mapping[str, Any] | None = None,
    *,
    what: str,
    fitness: str,
    seed: int,
    folder: str | Path | None,
) -> tuple[Workspace, Any]:
    """Return a run that is to search levels, and what removes its folder where that is a temporary one.

    Args: several: budgets or a limit, in place of the levels' target.
    """
    check_levels(levels)
    settings.setdefault("exchange", "fit" if levels.settings.limits else exchange_of(levels.settings.method))
    settings["strategy"] = _strategy(settings.get("strategy"))
    tokens = levels.model.sequences(text)
    further = {} if several is None else _in_place_of_target(levels, several, what=what)
    further["search"] = make_settings(SearchConfig, settings, what=what)
    run = _asking(levels, tokens, what=what, fitness=fitness, seed=seed, stages=["database", "search"], **further)
    check_strategy(run)
    check_tokens(run)
    run_dir, kept = folder_of(folder)
    make_folder(run_dir)
    return _with_text(levels, run, run_dir, tokens), kept


def _in_place_of_target(levels: Levels, several: Mapping[str, Any], *, what: str) -> dict[str, Any]:
    """Return settings of a run of several budgets over the same levels: of pruned ones, around the same sparsity."""
    method = levels.settings.method
    if isinstance(method, SparsitySettings) and method.centre is None:
        method = replace(method, centre=levels.settings.sparsity)
    return {"bits": None, "sparsity": None, "size": None, "method": method, **checked(RunSettings, several, what=what)}


def _listed(budgets: Any) -> Any:
    """Return budgets as a list, where they are anything like one."""
    return list(budgets) if isinstance(budgets, Iterable) and not isinstance(budgets, str | Mapping) else budgets


def _found(workspace: Workspace, kept: Any, *, budget: str | None = None) -> Found:
    """Read what a search has written."""
    run_dir, database = workspace.run_dir, workspace.database
    records = read_generations(run_dir / "metrics.jsonl", database.space)
    measured = [float(each["fitness"]) for each in records if each["fitness"] is not None]
    genome = read_genome(run_dir / "genome.json", database.space, database=database.fingerprint)
    return Found(genome, measured[-1] if measured else math.nan, run_dir, records, kept, database.fingerprint, budget)


def _asking(levels: Levels, tokens: Tensor, *, what: str, fitness: str, seed: int, **further: Any) -> RunSettings:
    """Return the settings of a run that asks for more of levels, on given search text.

    Args: what: asks, for a sentence about the seed.
    """
    return replace(
        levels.settings,
        model=replace(levels.model.settings, sequence_length=tokens.shape[1]),
        data=text_settings(levels.workspace.calibration_tokens, tokens),
        fitness=make_settings(FitnessSettings, {"name": fitness}, what="fitness"),
        seed=checked(RunSettings, {"seed": seed}, what=what)["seed"],
        **further,
    )


def _with_text(levels: Levels, run: RunSettings, run_dir: Path, tokens: Tensor) -> Workspace:
    """Return a run on the levels' model and calibration text, with search text."""
    text = GivenText(levels.workspace.calibration_tokens, tokens)
    return Workspace(run, run_dir, model=levels.model.source, text=text, blocks=levels.workspace.blocks)


def exchange_of(method: Any) -> str:
    """Return which units exchange levels in evolution, as the config of a method's settings has it."""
    return "fit" if getattr(method, "grid", None) == "gguf" else _EXCHANGES[method.name]


def _strategy(given: Any) -> Any:
    """Return the settings of a strategy that is given by its name, or by a dict of that and its numbers; others as they are.

    Raises: EvoPressError if there is no such strategy, or it has no such number.
    """
    told = {"name": given} if isinstance(given, str) else given
    if not isinstance(told, dict) or not isinstance(told.get("name"), str):
        return given
    numbers = {key: value for key, value in told.items() if key != "name"}
    return make_settings(settings_class(told["name"], key="strategy"), numbers, what=f"strategy {told['name']}")
