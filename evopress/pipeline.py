"""Run the stages that the settings name: database, baselines, search, refine, evaluate, export, report.

A stage reads what earlier ones left in the run folder, so any can be run alone on an earlier run, and a killed run goes on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from evopress.finished import begin_again, best_fitness, finish, read_finished, stages_done
from evopress.methods.points import has_limit, has_points
from evopress.progress import count_of_tokens, duration
from evopress.reporting.generations import each_generation
from evopress.reporting.metrics import search_history
from evopress.reporting.sweep import tracked_as
from evopress.reporting.tracker import NullTracker, Tracker, WandbTracker
from evopress.settings import STAGES, DropSettings, RunSettings, TrackerSettings
from evopress.stages.checks import check_names, check_questions, check_strategy, check_tasks, check_tokens, search_cost, searching
from evopress.stages.earlier import refuse_other_settings
from evopress.stages.exports import exporters_of, refuse_resized_files, refuse_unfit_formats, refuse_unknown_models
from evopress.stages.following import open_for_all
from evopress.stages.front import Front
from evopress.stages.given import check_given
from evopress.stages.kind import Context, Kind
from evopress.stages.one_budget import OneBudget
from evopress.stages.points import picked
from evopress.stages.preflight import preflight
from evopress.stages.search import STATE, measure_found
from evopress.stages.smallest import Smallest
from evopress.workspace import Workspace

logger = logging.getLogger(__name__)


def run(
    settings: RunSettings,
    run_dir: Path,
    *,
    begin: Callable[[], None] = lambda: None,
    config: dict[str, Any],
    command: str,
    second_pass: str = "",
    environment: dict[str, Any],
    paper: RunSettings | None = None,
    kept: Mapping[str, Any] = MappingProxyType({}),
    compared: bool = False,
) -> float:
    """Run the stages that the settings name and return the fitness of what was found, on search text (NaN without a search).

    It is that of the last generation that measured it, on that generation's minibatch.

    With `dry_run` it stops before the first of them, having said what they will take. What a stage does is up to the kind of run
    (see `kind_of`); with `pick` the run is that of one of several budgets.

    Args:
        begin: called when nothing can be refused any more, before the first change of what an earlier run left in the folder.
        config: the composed config, for the report and the tracker.
        command: what was typed, for the report and what is exported.
        second_pass: what follows it there where weights were refined, unless it refines them itself.
        environment: versions and machine, for the report.
        paper: the same run at the paper's size, to say what that would cost.
        kept: how the run in the folder has run so far, as `stages_done` takes it.
        compared: measure the found genome once more, on text that is the same for all searches, and return that fitness.
    """
    picks = settings.pick is not None
    if picks:
        point, run_dir = picked(settings, run_dir)
        settings, targets = point.settings, ("bits", "sparsity", "size")
        config = {**config, **{key: getattr(settings, key) for key in targets}, "budgets": []}
    kind = kind_of(settings)
    _check(settings, run_dir)
    kind.check(settings, run_dir)
    started = time.monotonic()
    workspace = Workspace(settings, run_dir)
    if workspace.dtype != settings.model.dtype:
        logger.info("model.dtype=%s: %s on this %s", settings.model.dtype, workspace.dtype, workspace.device.type.upper())
    work = kind(workspace)
    refuse_unknown_models(workspace, exported=work.exports)
    refuse_resized_files(workspace)
    if "search" in settings.stages and any(ask.attribution for ask in work.searching.asks()):
        workspace.check_gates()
    workspace.read_text()
    check_questions(workspace)
    refuse_other_settings(workspace, work.searching)
    work.refuse()
    refuse_unfit_formats(workspace, exported=work.exports)
    if "search" in settings.stages:
        _tell_cost(workspace, work, paper)
    plan = preflight(workspace, work.searching, work.planned(), once=work.once)
    workspace.check_uneven()
    if settings.dry_run:
        logger.info("dry run: nothing was built or searched; leave dry_run out to run it")
        return float("nan")
    done, earlier = stages_done(settings, run_dir, kept), read_finished(run_dir)
    # A genome that is looked at beside a finished run's own leaves that run finished.
    aside = settings.genome is not None and bool(stages_done(replace(settings, genome=None), run_dir, kept))
    begin()
    open_for_all(workspace)
    if not aside:
        begin_again(run_dir, settings.stages, done, earlier)
    context = Context(make_tracker(settings.tracker), config, command, environment, second_pass)
    _start_tracker(context, workspace, work)
    try:
        for stage in STAGES:
            if stage in settings.stages:
                with plan.timed(stage):
                    getattr(work, stage)(context)
        fitness = measure_found(workspace) if compared else None
    finally:
        context.tracker.finish()
    cut_off = not picks and (run_dir / STATE).exists() and "search" not in {*settings.stages, *earlier.get("stages", ())}
    if not aside and not cut_off:  # of a search that was killed, what was looked at is no end
        finish(workspace, done, earlier, fitness=fitness)
    logger.info("done in %s: %s", duration(time.monotonic() - started), run_dir)
    return best_fitness(run_dir)


def kind_of(settings: RunSettings) -> type[Kind]:
    """Return the kind of run that the settings ask for: with one budget, several, or the smallest that keeps a limit."""
    if has_limit(settings):
        return Smallest
    return Front if has_points(settings) else OneBudget


def _check(settings: RunSettings, run_dir: Path) -> None:
    """Raise EvoPressError if the settings mean nothing, whatever model and text they are for."""
    check_names(settings)
    check_given(settings, run_dir)
    searching(settings.search, derived=1 if isinstance(settings.method, DropSettings) else None)
    check_strategy(settings)
    check_tokens(settings)
    check_tasks(settings)
    exporters_of(settings)


def _tell_cost(workspace: Workspace, work: Kind, paper: RunSettings | None) -> None:
    """Say what the search will evaluate, and what it would at the paper's size."""
    settings, (space, _) = workspace.settings, workspace.databases.plan()
    cost = partial(search_cost, modules=workspace.method.modules is not None, units=len(space))
    own, at_paper_scale = cost(work.searching, starts=len(settings.search.starts)), ""
    if paper:
        numbers = searching(paper.search, derived=workspace.generations(paper))
        at_paper_scale = f" (scale=paper: {count_of_tokens(cost(numbers, starts=len(paper.search.starts)))})"
    logger.info(
        "scale %s: the search evaluates at most %s candidate tokens%s%s",
        settings.scale.name,
        count_of_tokens(own),
        work.each,
        at_paper_scale,
    )


def _start_tracker(context: Context, workspace: Workspace, work: Kind) -> None:
    settings, run_dir = workspace.settings, workspace.run_dir
    key, target = work.target()
    name, group, tags = tracked_as(run_dir, method=settings.method.name, key=key, target=target, seed=settings.seed)
    context.tracker.start(
        config=context.config,
        run_dir=run_dir,
        name=settings.tracker.run_name or name,
        group=settings.tracker.group or group,
        tags=[*tags, *settings.tracker.tags],
        history=lambda: search_history(
            each_generation(run_dir / "metrics.jsonl", workspace.database.space), workspace.database.space
        ),
    )


def make_tracker(settings: TrackerSettings) -> Tracker:
    """Return the tracker that the settings name."""
    if settings.name == "none":
        return NullTracker()
    return WandbTracker(mode=settings.mode, project=settings.project, entity=settings.entity)  # type: ignore[arg-type]
