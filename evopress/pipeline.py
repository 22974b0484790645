"""Run the stages that the settings name: database, baselines, search, refine, evaluate, export, report.

A stage reads what earlier ones left in the run folder, so any can be run alone on an earlier run, and a killed run goes on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from evopress.finished import begin_again, best_fitness, finish, read_finished, stages_done
from evopress.methods.points import has_limit, has_points
from evopress.progress import duration
from evopress.reporting.generations import read_generations
from evopress.reporting.metrics import search_history
from evopress.reporting.sweep import tracked_as
from evopress.reporting.tracker import NullTracker, Tracker, WandbTracker
from evopress.settings import STAGES, DropSettings, RunSettings, TrackerSettings
from evopress.stages.baselines import build_database, find_baselines
from evopress.stages.checks import check_names, check_questions, check_strategy, check_tasks, check_tokens, search_cost, searching
from evopress.stages.conclude import evaluate, report
from evopress.stages.earlier import STATE, refuse_other_settings, refuse_other_work
from evopress.stages.exports import export, exporters_of, refuse_unfit_formats
from evopress.stages.following import open_for_all
from evopress.stages.front import (
    check_stages,
    evaluate_all,
    find_all_baselines,
    left_to_the_picked,
    open_points,
    picked,
    refuse_other_points,
    refuse_points_left,
    report_all,
    search_all,
)
from evopress.stages.given import check_given
from evopress.stages.preflight import preflight
from evopress.stages.refine import refine, refuse_without_genome
from evopress.stages.search import search
from evopress.stages.smallest import (
    budgets_to_try,
    export_smallest,
    find_baselines_of_smallest,
    find_smallest,
    likely_tries,
    refuse_without_answer,
)
from evopress.workspace import Workspace

logger = logging.getLogger(__name__)


def run(
    settings: RunSettings,
    run_dir: Path,
    *,
    begin: Callable[[], None] = lambda: None,
    config: dict[str, Any],
    command: str,
    environment: dict[str, Any],
    paper: RunSettings | None = None,
    kept: Mapping[str, Any] = MappingProxyType({}),
) -> float:
    """Run the stages that the settings name and return the fitness of what was found, on search text (NaN without a search).

    With `dry_run` it stops before the first of them, having said what they will take. With several budgets the stages are those of
    `stages/front.py`; with `pick` the run is that of one of them.

    Args:
        begin: called when nothing can be refused any more, before the first change of what an earlier run left in the folder.
        config: the composed config, for the report and the tracker.
        command: what was typed, for the report.
        environment: versions and machine, for the report.
        paper: the same run at the paper's size, to say what that would cost.
        kept: how the run in the folder has run so far, as `stages_done` takes it.
    """
    picks = settings.pick is not None
    if picks:
        point, run_dir = picked(settings, run_dir)
        settings, targets = point.settings, ("bits", "sparsity", "size")
        config = {**config, **{key: getattr(settings, key) for key in targets}, "budgets": []}
    check_names(settings)
    check_given(settings)
    searching(settings.search, derived=1 if isinstance(settings.method, DropSettings) else None)
    check_strategy(settings)
    check_tokens(settings)
    check_tasks(settings)
    exporters_of(settings)
    if has_points(settings):
        check_stages(settings)
    else:
        refuse_points_left(run_dir)
    started = time.monotonic()
    workspace = Workspace(settings, run_dir)
    if workspace.dtype != settings.model.dtype:
        logger.info("model.dtype=%s: %s on this %s", settings.model.dtype, workspace.dtype, workspace.device.type.upper())
    points = open_points(workspace) if has_points(settings) else []
    numbers = searching(settings.search, derived=workspace.generations(settings))
    if "search" in settings.stages:
        if any(ask.attribution for ask in numbers.asks()):
            workspace.check_gates()
        logger.info(
            "scale %s: the search evaluates %.3g million candidate tokens%s%s",
            settings.scale.name,
            search_cost(numbers, modules=workspace.method.modules is not None, starts=len(settings.search.starts)) / 1e6,
            " at each budget" if has_points(settings) else "",
            f" (scale=paper: {_paper_cost(workspace, paper) / 1e6:.3g} million)" if paper else "",
        )
    workspace.read_text()
    check_questions(workspace)
    refuse_other_settings(workspace, numbers)
    if has_points(settings):
        refuse_other_points(points)
        if has_limit(settings):
            refuse_without_answer(workspace)
    else:
        refuse_without_genome(workspace)
        refuse_other_work(workspace, numbers)
    refuse_unfit_formats(workspace, exported=not settings.budgets or has_limit(settings))
    tried = budgets_to_try(workspace) if has_limit(settings) else []
    planned = likely_tries(workspace, tried) if tried and ("search" in settings.stages or not points) else points
    plan = preflight(workspace, numbers, [(each.workspace, each.searching) for each in planned])
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
    tracker = make_tracker(settings.tracker)
    asked: dict[str, Any] = {"max_kl": settings.max_kl, "min_agreement": settings.min_agreement}
    asked |= {"budgets": "+".join(each.name for each in points) or None, "size": settings.size}
    asked |= {"bits": settings.bits, "sparsity": settings.sparsity}
    key, target = next((key, value) for key, value in asked.items() if value is not None)
    name, group, tags = tracked_as(run_dir, method=settings.method.name, key=key, target=target, seed=settings.seed)
    tracker.start(
        config=config,
        run_dir=run_dir,
        name=settings.tracker.run_name or name,
        group=settings.tracker.group or group,
        tags=[*tags, *settings.tracker.tags],
        history=lambda: search_history(
            read_generations(run_dir / "metrics.jsonl", workspace.database.space), workspace.database.space
        ),
    )
    work: dict[str, Callable[[], None]] = {
        "database": lambda: build_database(workspace),
        "baselines": lambda: find_baselines(workspace),
        "search": lambda: search(workspace, numbers, tracker),
        "refine": lambda: refine(workspace),
        "evaluate": lambda: evaluate(workspace, tracker),
        "export": lambda: export(workspace, command=command),
        "report": lambda: report(workspace, tracker, config=config, command=command, environment=environment),
    }
    if has_points(settings):
        work |= {
            "baselines": lambda: find_baselines_of_smallest(workspace) if has_limit(settings) else find_all_baselines(points),
            "search": lambda: find_smallest(workspace, tried, points) if has_limit(settings) else search_all(points),
            "evaluate": lambda: evaluate_all(workspace, points, tracker),
            "refine": lambda: left_to_the_picked(workspace, "refine"),
            "export": lambda: (
                export_smallest(workspace, command=command) if has_limit(settings) else left_to_the_picked(workspace, "export")
            ),
            "report": lambda: report_all(workspace, tracker, config=config, command=command, environment=environment),
        }
    try:
        for stage in STAGES:
            if stage in settings.stages:
                with plan.timed(stage):
                    work[stage]()
    finally:
        tracker.finish()
    cut_off = not picks and (run_dir / STATE).exists() and "search" not in {*settings.stages, *earlier.get("stages", ())}
    if not aside and not cut_off:  # of a search that was killed, what was looked at is no end
        finish(workspace, done, earlier)
    logger.info("done in %s: %s", duration(time.monotonic() - started), run_dir)
    return best_fitness(run_dir)


def _paper_cost(workspace: Workspace, paper: RunSettings) -> int:
    numbers = searching(paper.search, derived=workspace.generations(paper))
    return search_cost(numbers, modules=workspace.method.modules is not None)


def make_tracker(settings: TrackerSettings) -> Tracker:
    """Return the tracker that the settings name."""
    if settings.name == "none":
        return NullTracker()
    return WandbTracker(mode=settings.mode, project=settings.project, entity=settings.entity)  # type: ignore[arg-type]
