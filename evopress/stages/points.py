"""Runs of one budget each inside a run: a point has a folder of its own, over the same model, text and levels.

So it can be picked and gone on with as if it had been a run by itself.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from evopress.errors import EvoPressError
from evopress.files import make_folder
from evopress.methods.points import Point, at_budget, has_points, point_at
from evopress.reporting.records import read_document
from evopress.reporting.tracker import NullTracker
from evopress.search.strategy import Neighbour
from evopress.settings import RunSettings
from evopress.stages.checks import searching_of
from evopress.stages.earlier import refuse_other_settings, refuse_other_work
from evopress.stages.given import check_levels, check_starts
from evopress.stages.point_run import PointRun
from evopress.stages.search import search
from evopress.stages.searchable import check_asks
from evopress.units import Space
from evopress.workspace import Workspace

logger = logging.getLogger(__name__)
POINTS = "points"
"""Folder of the points inside a run's."""
FOR_ONE = ("refine", "export")
"""Stages that are for one genome."""


def names_searched(run_dir: Path) -> list[str]:
    """Return the names of the points of a run that a genome was found for, sorted."""
    return sorted(path.name for path in (run_dir / POINTS).glob("*") if (path / "genome.json").exists())


def picked(settings: RunSettings, run_dir: Path) -> tuple[Point, Path]:
    """Return the point that `pick` names, and its folder.

    Raises: EvoPressError if nothing was searched there.
    """
    if not has_points(settings):
        raise EvoPressError(
            f"pick={settings.pick} chooses among the budgets of an earlier run: add resume=RUN, of a run with several budgets"
        )
    try:
        point = point_at(settings, settings.pick)
    except EvoPressError:
        raise EvoPressError(f"pick={settings.pick} is no budget: give one of this run's, such as pick=2.5 or pick=60MB") from None
    folder = run_dir / POINTS / point.name
    if not any((folder / name).exists() for name in ("genome.json", "state.json")):
        there = ", ".join(names_searched(run_dir)) or "nothing was"
        raise EvoPressError(
            f"pick={settings.pick} was not searched in {run_dir} ({there}): run the stage search first, or add it to budgets"
        )
    return point, folder


def open_point(workspace: Workspace, point: Point, *, all_stages: bool = False) -> PointRun:
    """Return the run of one budget.

    Args: all_stages: with those that are for one genome.
    """
    stages = [stage for stage in point.settings.stages if all_stages or stage not in FOR_ONE] or ["report"]
    settings = replace(point.settings, stages=stages)
    run = Workspace(settings, workspace.run_dir / POINTS / point.name, beside=workspace)
    return PointRun(point.name, run, searching_of(run))


def refuse_points_left(run_dir: Path) -> None:
    """Raise EvoPressError if a folder has a run of several budgets, whose results a run of one target would take the place of."""
    if (run_dir / POINTS).is_dir():
        raise EvoPressError(
            f"the run in {run_dir} has several budgets: resume it with its own budgets, max_kl or min_agreement, take one of them "
            "with pick=…, or start a new run (hydra.run.dir=DIR)"
        )


def refuse_other_points(points: Sequence[PointRun]) -> None:
    """Raise EvoPressError if what an earlier run left of a point is not this one's; otherwise as the two for one budget."""
    for point in points:
        refuse_other_settings(point.workspace, point.searching)
    for point in points:
        refuse_other_work(point.workspace, point.searching)


def check_points(points: Sequence[PointRun], space: Space) -> None:
    """Raise EvoPressError if a point's budget cannot be met, or its search would be refused; before the first is searched.

    Args: space: of the run's levels, as planned or as built.
    """
    for point in points:
        check_levels(point.workspace.settings, space, point.workspace.run_dir)
        with at_budget(point.name):
            budget = point.workspace.budget_of(space)
            budget.check(space)
            check_starts(point.workspace, space, budget)
            check_asks(point.workspace, point.searching, space, budget)


def nearest(point: PointRun, found: Iterable[PointRun]) -> PointRun | None:
    """Return which of the points that were searched has the most like budget; None if none was."""
    return min(found, key=lambda other: abs(other.total - point.total), default=None)


def search_one(point: PointRun, near: PointRun | None) -> None:
    """Search at one budget, or do nothing where that is done."""
    make_folder(point.workspace.run_dir)
    search(point.workspace, point.searching, NullTracker(), neighbour=None if near is None else _as_neighbour(near))


def search_points(points: Sequence[PointRun]) -> None:
    """Search at every budget, in order, from the genome of the nearest that was searched before it."""
    found: list[PointRun] = []
    for number, point in enumerate(points, start=1):
        near = nearest(point, found)
        begun = "" if near is None else f", from what was found at {near.name}"
        logger.info("budget %s, %d of %d%s", point.name, number, len(points), begun)
        search_one(point, near)
        found.append(point)


def left_to_the_picked(workspace: Workspace, stage: str) -> None:
    """Say how a stage that is for one genome is done."""
    logger.info("%s: skipped, choose a budget with resume=%s pick=BUDGET", stage, workspace.run_dir)


def _as_neighbour(point: PointRun) -> Neighbour:
    path = point.workspace.run_dir / "state.json"
    state = read_document(path, what="saved search").get("evolution", {}) if path.exists() else {}
    return Neighbour(point.genome(), state)
