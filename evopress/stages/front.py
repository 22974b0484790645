"""Several budgets in one run: a search for each, begun from its neighbour's genome, then one table, one figure, one page.

A point is the run of one budget in a folder of its own inside the run's, over the same model, text and levels; so it can be picked
and gone on with as if it had been a run by itself.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from evopress.errors import EvoPressError
from evopress.files import make_folder
from evopress.methods.points import Point, has_limit, has_points, in_order, point_at, points_of
from evopress.progress import counted
from evopress.reporting import tables
from evopress.reporting.front import front_figure, front_rows, front_words, write_front, write_front_report
from evopress.reporting.generations import read_generations
from evopress.reporting.records import read_document, read_genome, write_json
from evopress.reporting.tracker import NullTracker, Tracker, track_figures
from evopress.search.strategy import Neighbour, Searching
from evopress.settings import RunSettings
from evopress.stages.baselines import find_baselines, spent_on_baselines, stored_baselines
from evopress.stages.checks import searching
from evopress.stages.conclude import add_spent, measured_rows, track_results
from evopress.stages.earlier import refuse_other_settings, refuse_other_work
from evopress.stages.given import take_best_so_far
from evopress.stages.measured import MEASURED
from evopress.stages.results import read_result
from evopress.stages.search import search
from evopress.units import Genome
from evopress.workspace import Workspace

logger = logging.getLogger(__name__)
POINTS = "points"
"""Folder of the points inside a run's."""
_FOR_ONE = ("refine", "export")
"""Stages that are for one genome."""


@dataclass(frozen=True)
class PointRun:
    """The run of one budget."""

    name: str
    workspace: Workspace
    searching: Searching

    @property
    def total(self) -> int:
        """What the budget allows."""
        return self.workspace.budget.total

    def genome(self) -> Genome:
        """Read what was found."""
        database = self.workspace.database
        return read_genome(self.workspace.run_dir / "genome.json", database.space, database=database.fingerprint)


def check_stages(settings: RunSettings) -> None:
    """Raise EvoPressError if all that a run with several budgets is to do is for one genome."""
    if set(settings.stages) <= set(_FOR_ONE) and not has_limit(settings):
        raise EvoPressError(
            f"stages=[{','.join(settings.stages)}] is for one genome, and budgets={settings.budgets} have one each: name one of "
            "them with pick=, such as resume=RUN pick=2.5"
        )


def picked(settings: RunSettings, run_dir: Path) -> tuple[Point, Path]:
    """Return the point that `pick` names, and its folder.

    Raises: EvoPressError if nothing was searched there.
    """
    if not has_points(settings):
        raise EvoPressError(f"pick={settings.pick} names a budget of a run with several: give it with resume=RUN, of such a run")
    try:
        point = point_at(settings, settings.pick)
    except EvoPressError:
        raise EvoPressError(f"pick={settings.pick} is no budget: give one of this run's, such as pick=2.5 or pick=60MB") from None
    folder = run_dir / POINTS / point.name
    if not any((folder / name).exists() for name in ("genome.json", "state.json")):
        there = sorted(path.name for path in (run_dir / POINTS).glob("*") if (path / "genome.json").exists())
        raise EvoPressError(
            f"pick={settings.pick} was not searched in {run_dir} ({', '.join(there) or 'nothing was'}): run the stage search "
            "first, or add it to budgets"
        )
    return point, folder


def open_points(workspace: Workspace) -> list[PointRun]:
    """Return the runs of all budgets, from the least compressed to the most; nothing is opened that the run itself has not.

    Where budgets are to be tried, those of the ones that an earlier run has tried.
    """
    settings = workspace.settings
    if not has_limit(settings):
        return [open_point(workspace, point) for point in points_of(settings)]
    names = (path.name for path in (workspace.run_dir / POINTS).glob("*") if (path / "genome.json").exists())
    return [open_point(workspace, point) for point in in_order(point_at(settings, name) for name in names)]


def open_point(workspace: Workspace, point: Point, *, all_stages: bool = False) -> PointRun:
    """Return the run of one budget.

    Args: all_stages: with those that are for one genome.
    """
    stages = [stage for stage in point.settings.stages if all_stages or stage not in _FOR_ONE] or ["report"]
    settings = replace(point.settings, stages=stages)
    run = Workspace(settings, workspace.run_dir / POINTS / point.name, beside=workspace)
    return PointRun(point.name, run, searching(settings.search, derived=run.generations(settings)))


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


def find_all_baselines(points: Sequence[PointRun]) -> None:
    """Stage `baselines`: those of every budget."""
    for point in points:
        make_folder(point.workspace.run_dir)
        find_baselines(point.workspace)


def search_all(points: Sequence[PointRun]) -> None:
    """Stage `search`: search at every budget, from the genome of the nearest that was searched before it."""
    found: list[PointRun] = []
    for number, point in enumerate(points, start=1):
        near = nearest(point, found)
        begun = "" if near is None else f", from what was found at {near.name}"
        logger.info("budget %s, %d of %d%s", point.name, number, len(points), begun)
        search_one(point, near)
        found.append(point)


def nearest(point: PointRun, found: Iterable[PointRun]) -> PointRun | None:
    """Return which of the points that were searched has the most like budget; None if none was."""
    return min(found, key=lambda other: abs(other.total - point.total), default=None)


def search_one(point: PointRun, near: PointRun | None) -> None:
    """Search at one budget, or do nothing where that is done."""
    make_folder(point.workspace.run_dir)
    search(point.workspace, point.searching, NullTracker(), neighbour=None if near is None else _as_neighbour(near))


def _as_neighbour(point: PointRun) -> Neighbour:
    path = point.workspace.run_dir / "state.json"
    state = read_document(path, what="saved search").get("evolution", {}) if path.exists() else {}
    return Neighbour(point.genome(), state)


def evaluate_all(workspace: Workspace, points: Sequence[PointRun], tracker: Tracker) -> None:
    """Stage `evaluate`: measure the dense model, and what was found and compared at every budget, on held-out text."""
    space = workspace.database.space
    genomes: dict[str, Genome | None] = {"dense": None}
    budgets: dict[str, str] = {}
    spent: dict[str, dict[str, Any]] = {}
    apart: list[dict[str, Any]] = []
    found = []
    for point in points:
        take_best_so_far(point.workspace)
        others: dict[str, Genome] = {}
        baselines, union = stored_baselines(point.workspace)
        took = {**spent_on_baselines(point.workspace.run_dir), "evopress": _spent(point)}
        if (point.workspace.run_dir / "genome.json").exists():
            found.append(point)
            baselines = {"evopress": point.genome(), **baselines}
        for name, genome in baselines.items():
            own = name if name.startswith("uniform") and genomes.get(name, genome) == genome else f"{name}@{point.name}"
            spent[own] = took.get(name, {})
            if own != name:
                budgets[own] = point.name
            if all(level < len(unit.levels) for unit, level in zip(space.units, genome, strict=True)):
                genomes[own] = genome
            else:  # levels that this budget's baselines alone have
                others[own] = genome
        if others:
            apart += measured_rows(point.workspace, {"dense": None, **others}, union)[1:]
    rows = measured_rows(workspace, genomes, space) + apart
    add_spent(rows, spent)
    for row in rows:
        if row["name"] in budgets:
            row["budget"] = budgets[row["name"]]
    places = {point.name: place for place, point in enumerate(points)}
    rows.sort(key=lambda row: places[row["budget"]] if "budget" in row else -1)
    front = [{"budget": point.name, "row": f"evopress@{point.name}", **_spent(point)} for point in found]
    result: dict[str, Any] = {"schema": 1, "rows": rows, "front": front}
    if front:
        result["search"] = {
            key: sum(each.get(key) or 0 for each in front) for key in ("tokens", "seconds", "evaluations", "generations")
        }
    result |= {key: value for key, value in read_result(workspace.run_dir).items() if key not in result}
    result["memory"] = workspace.memory()
    write_json(workspace.run_dir / "result.json", result)
    for each in (workspace, *(point.workspace for point in points)):
        (each.run_dir / MEASURED).unlink(missing_ok=True)
    if "report" not in workspace.settings.stages:
        track_results(tracker, rows)


def _spent(point: PointRun) -> dict[str, Any]:
    """Return what the search at a budget took."""
    records = read_generations(point.workspace.run_dir / "metrics.jsonl", point.workspace.database.space)
    if not records:
        return {}
    spent = {key: records[-1][key] for key in ("tokens", "seconds", "evaluations")}
    return {**spent, "generations": records[-1]["generation"]}


def left_to_the_picked(workspace: Workspace, stage: str) -> None:
    """Say how a stage that is for one genome is done."""
    logger.info("%s: left to the budget that is picked, resume=%s pick=BUDGET", stage, workspace.run_dir)


def report_all(
    workspace: Workspace, tracker: Tracker, *, config: Mapping[str, Any], command: str, environment: Mapping[str, Any]
) -> None:
    """Stage `report`: `front.csv`, table, figure and page; prints the table."""
    run_dir = workspace.run_dir
    result = read_result(run_dir)
    rows, front = result.get("rows", []), front_rows(result)
    said = front_words(rows, front, result.get("kept"))
    pictures: list[Path] = []
    if workspace.method.weights is None:
        result.pop("database", None)  # no weights are stored
    if rows:
        tables.write_tables(rows, run_dir, said=said)
    if front:
        write_front(front, run_dir / "front.csv")
        pictures = front_figure(
            rows, front, run_dir / "figures", measure=workspace.database.space.words.measure, kept=result.get("kept")
        )
    write_front_report(
        run_dir / "report.html",
        title=f"{workspace.pretrained.name}, {workspace.settings.method.name} at {counted(len(front), 'budget')}",
        config=config,
        result=result,
        rows=rows,
        front=front,
        figures=pictures,
        command=command,
        environment=environment,
    )
    track_results(tracker, rows)
    track_figures(tracker, pictures)
    if rows:
        print(f"\n{tables.format_table(rows)}\n\n{said}", flush=True)
    print(f"report: {run_dir / 'report.html'}", flush=True)
