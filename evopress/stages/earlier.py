"""What an earlier run left in the folder must fit this one, or be there: what is refused of it is refused before any change."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from evopress.errors import EvoPressError
from evopress.json_files import clip, shown
from evopress.reporting.generations import read_generations
from evopress.reporting.records import read_document, read_genome
from evopress.search.evolution import SearchSettings
from evopress.search.strategy import Problem, Searching
from evopress.stages.baselines import UNWRITTEN, baselines_as_asked, changes, read_baselines, what_decides_fitness
from evopress.stages.exports import refuse_nothing_to_export
from evopress.stages.given import given_names, may_find, refuse_missing
from evopress.stages.results import read_result
from evopress.stages.search import STATE, check_records, go_on, strategy_in
from evopress.units import Space
from evopress.workspace import Workspace


def refuse_other_settings(workspace: Workspace, searching: Searching) -> None:
    """Raise EvoPressError if the folder has a search with other settings or another text, whatever stages run; loads no model.

    What is found there would otherwise stand under settings that it does not come from.

    Args: searching: the search's numbers.
    """
    path, again = workspace.run_dir / STATE, "search" in workspace.settings.stages
    if not path.exists():
        return
    try:
        state = read_document(path, what="saved search")
    except EvoPressError:
        if again:
            raise
        return  # what was found needs it no more
    there, numbers = state.get("asked", {}), state.get("evolution", {})  # our first versions did not say what was asked
    if not isinstance(there, dict):
        raise EvoPressError(f"{path} is damaged: its settings are {shown(there)}; restore it, or remove it to search again")
    changed = changes({**UNWRITTEN, **there}, what_decides_fitness(workspace, text=again))
    changed += changes({"search.strategy": strategy_in(state)}, {"search.strategy": searching.strategy})
    own = ""
    if isinstance(numbers, dict) and isinstance(numbers.get("settings"), dict):  # what is damaged, `go_on` tells
        changed += changes(numbers["settings"], searching.identity())
        own = _to_type(numbers["settings"], searching.identity())
    if changed:
        raise EvoPressError(
            f"the search in {path.parent} had other settings ({'; '.join(changed)}): resume it with its own{own}, or "
            "start a new run"
        )


def _to_type(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Return what gives a search the numbers that it had, in brackets; nothing where no setting does."""
    keys = [each.name for each in fields(SearchSettings) if each.name in here and each.name in there]
    typed = [f"search.{key}={'null' if there[key] is None else clip(str(there[key]))}" for key in keys if there[key] != here[key]]
    return f" ({' '.join(typed)})" if typed else ""


def refuse_other_work(workspace: Workspace, searching: Searching) -> None:
    """Raise EvoPressError if a stage could not use what is in the folder: of another level database or target, damaged, or missing.

    The model is loaded for it, its weights are not touched.
    """
    run_dir, stages = workspace.run_dir, set(workspace.settings.stages)
    if "export" in stages and "search" not in stages:
        refuse_nothing_to_export(workspace)
    read_result(run_dir)
    left = any((run_dir / name).exists() for name in (STATE, "genome.json", "baselines.json", "metrics.jsonl"))
    if not left and not given_names(workspace.settings):
        return
    space, _ = workspace.databases.plan()
    if (run_dir / STATE).exists():
        _check_search(workspace, searching, space)
    if stages & {"refine", "evaluate", "export", "report"} and "search" not in stages:
        read_generations(run_dir / "metrics.jsonl", space)
        if (run_dir / "genome.json").exists():
            read_genome(run_dir / "genome.json", space, database=workspace.databases.fingerprint)
    _check_baselines(workspace, space)


def _check_search(workspace: Workspace, searching: Searching, space: Space) -> None:
    """Raise EvoPressError if the saved search is not the one that would go on, tried on a search that nobody runs."""
    path, budget = workspace.run_dir / STATE, workspace.budget_of(space)
    if "search" in workspace.settings.stages:
        rng = [copy.deepcopy(workspace.rng["minibatch"]) for _ in range(3)]
        no_errors = tuple((0.0,) * len(unit.levels) for unit in space.units)
        trial = searching.make(Problem(space, budget, no_errors, rng_initial=rng[0], rng_mutation=rng[1]))
        go_on(path, trial, rng[2], database=workspace.databases.fingerprint, strategy=searching.strategy)
        check_records(workspace.run_dir / "metrics.jsonl", trial, space)
        return
    try:
        there = read_document(path, what="saved search")["evolution"]["settings"]["budget"]
    except (EvoPressError, KeyError, TypeError):
        return  # what was found needs it no more
    if there != budget.total:
        raise EvoPressError(
            f"the search in {path.parent} had another target (budget {shown(there)}, now {budget.total}): give its target, "
            "or start a new run"
        )


def _check_baselines(workspace: Workspace, space: Space) -> None:
    """Raise EvoPressError if the baselines in the folder are damaged or of another database, unless they are found again anyway.

    So it is if a genome that the settings name is not among them, nor among those that will be found.
    """
    path, settings = workspace.run_dir / "baselines.json", workspace.settings
    stages, fingerprint = set(settings.stages), workspace.databases.fingerprint
    found_again = False
    if "baselines" in stages:
        stored = baselines_as_asked(workspace)
        found_again = stored is None or stored.get("database") != fingerprint
    given = given_names(settings)
    if found_again:
        others = [(key, name) for key, name in given if not may_find(settings.baselines.names, name)]
        refuse_missing(workspace, others, settings.baselines.names, space)
        return
    if not (given or stages & {"evaluate", "report"}):
        return
    genomes = {}
    if path.exists():
        stored = read_baselines(path, database=fingerprint)
        genomes = stored["genomes"]
        workspace.open_databases(stored["further"])
    refuse_missing(workspace, given, genomes, space)
