"""Run the stages that the settings name: database, baselines, search, evaluate, export, report.

A stage reads what earlier ones left in the run folder, so any can be run alone on an earlier run, and a killed run goes on.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from evopress.progress import duration
from evopress.reporting.tracker import NullTracker, Tracker, WandbTracker
from evopress.settings import RunSettings, TrackerSettings
from evopress.stages.baselines import build_database, find_baselines
from evopress.stages.checks import check_names, check_tokens, search_settings
from evopress.stages.conclude import evaluate, export, report
from evopress.stages.results import read_result
from evopress.stages.search import search
from evopress.workspace import Workspace

logger = logging.getLogger(__name__)


def run(settings: RunSettings, run_dir: Path, *, config: dict[str, Any], command: str, environment: dict[str, Any]) -> float:
    """Run the stages that the settings name and return the found genome's held-out KL (NaN if it was not measured).

    Args:
        config: the composed config, for the report and the tracker.
        command: what was typed, for the report.
        environment: versions and machine, for the report.
    """
    check_names(settings)
    searching = search_settings(settings.search)
    check_tokens(settings)
    started = time.monotonic()
    workspace = Workspace(settings, run_dir)
    workspace.read_text()
    tracker = make_tracker(settings.tracker)
    tracker.start(
        config=config,
        run_dir=run_dir,
        name=settings.tracker.run_name,
        group=settings.tracker.group,
        tags=[settings.method.name, *settings.tracker.tags],
    )
    try:
        if "database" in settings.stages:
            build_database(workspace)
        if "baselines" in settings.stages:
            find_baselines(workspace)
        if "search" in settings.stages:
            search(workspace, searching, tracker)
        if "evaluate" in settings.stages:
            evaluate(workspace, tracker)
        if "export" in settings.stages:
            export(workspace, command=command)
        if "report" in settings.stages:
            report(workspace, tracker, config=config, command=command, environment=environment)
    finally:
        tracker.finish()
    logger.info("done in %s: %s", duration(time.monotonic() - started), run_dir)
    result = read_result(run_dir)
    return next((row["kl"] for row in result.get("rows", []) if row["name"] == "evopress"), float("nan"))


def make_tracker(settings: TrackerSettings) -> Tracker:
    """Return the tracker that the settings name."""
    if settings.name == "none":
        return NullTracker()
    return WandbTracker(mode=settings.mode, project=settings.project, entity=settings.entity)  # type: ignore[arg-type]
