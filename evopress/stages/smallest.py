"""The smallest model that keeps something: a bisection over budgets, each searched as a point of a front."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from evopress.errors import EvoPressError
from evopress.evaluation.heldout import Scores
from evopress.json_files import shown
from evopress.methods.points import Point, in_order, point_at
from evopress.reporting.records import read_document, write_json
from evopress.settings import RunSettings
from evopress.stages.baselines import build_database, find_baselines
from evopress.stages.bisection import Bisection, Kept, budgets_to_try
from evopress.stages.checks import searching_of
from evopress.stages.exports import export
from evopress.stages.given import file_of
from evopress.stages.kind import Context
from evopress.stages.point_run import PointRun
from evopress.stages.points import check_points, left_to_the_picked, names_searched, open_point, refuse_other_points
from evopress.stages.points_results import evaluate_points, report_points
from evopress.stages.results import read_result
from evopress.units import Genome
from evopress.workspace import Workspace

logger = logging.getLogger(__name__)
_BEYOND = "no smaller one is tried, and all units at their most compressed level may keep it, too: give budgets to choose among"


class Smallest:
    """A run that looks for the smallest budget whose found genome keeps a limit; baselines and exports are of that one."""

    each: ClassVar[str] = " at each budget"
    exports: ClassVar[bool] = True
    once: ClassVar[Collection[str]] = ("database", "report", "baselines")

    def __init__(self, workspace: Workspace) -> None:
        self._workspace, self._kept = workspace, Kept.of(workspace.settings)
        searched = in_order(point_at(workspace.settings, name) for name in names_searched(workspace.run_dir))
        self._points = [open_point(workspace, point) for point in searched]  # of an earlier run, until this one searches
        self.searching = searching_of(workspace)

    @staticmethod
    def check(settings: RunSettings, run_dir: Path) -> None:
        """Refuse nothing: any stage means something."""

    def refuse(self) -> None:
        """Raise EvoPressError if what an earlier run left is not this one's, or a stage is for an answer that is not there."""
        refuse_other_points(self._points)
        stages = set(self._workspace.settings.stages)
        if "search" in stages:
            self._refuse_starts()
            return
        if stages & {"baselines", "export"}:
            self._answer()
        elif stages & {"evaluate", "report"} and (told := _told(self._workspace)) is not None:
            self._check_answer(told)

    def planned(self) -> Sequence[PointRun]:
        """Return as many runs as the bisection does at most, at budgets all over the range; without a search those of an earlier.

        Raises: EvoPressError if there is no budget to try, or one that is given cannot be searched.
        """
        workspace, tried, points = self._workspace, self._tried, self._points
        searching = "search" in workspace.settings.stages
        if searching and workspace.settings.budgets:  # any of which may be searched
            check_points([open_point(workspace, point) for point in tried], workspace.databases.plan()[0])
        if searching or not points:
            count = math.ceil(math.log2(len(tried) + 1))
            points = [open_point(workspace, tried[(2 * i + 1) * len(tried) // (2 * count)]) for i in range(count)]
        return points

    def target(self) -> tuple[str, float | str]:
        """Return the limit."""
        return self._kept.key, self._kept.limit

    def database(self, context: Context) -> None:
        """Build the level database, whatever budget will be found."""
        build_database(self._workspace, check_budget=False)

    def baselines(self, context: Context) -> None:
        """Find those of the answer; a search finds them when it has found it."""
        if "search" not in self._workspace.settings.stages:
            find_baselines(self._answer().workspace)

    def search(self, context: Context) -> None:
        """Find the smallest budget that keeps the limit, and write down what was tried; see `Bisection`."""
        workspace, tried = self._workspace, self._tried
        bisection = Bisection(workspace, self._kept, tried, _known(workspace))
        answer = bisection.find()
        self._write_answer(answer, bisection.entries)
        beyond = f"; {_BEYOND}" if bisection.all_keep and not workspace.settings.budgets else ""
        logger.info("the smallest of %d budgets that keeps %s: %s%s", len(tried), self._kept, answer.name, beyond)
        if "baselines" in workspace.settings.stages:
            find_baselines(answer.workspace)
        searched = in_order([tried[0], *(point_at(workspace.settings, name) for name in bisection.runs)])
        places = {point.name: place for place, point in enumerate(searched)}
        self._points = sorted(bisection.runs.values(), key=lambda run: places[run.name])

    def refine(self, context: Context) -> None:
        """Say which command does it."""
        left_to_the_picked(self._workspace, "refine")

    def evaluate(self, context: Context) -> None:
        """Measure what was found and compared at every budget that was tried."""
        evaluate_points(self._workspace, self._points, context.tracker)

    def export(self, context: Context) -> None:
        """Write the answer's model."""
        export(self._answer().workspace, context)

    def report(self, context: Context) -> None:
        """Write the front, table, figure and page."""
        report_points(self._workspace, context)

    @cached_property
    def _tried(self) -> list[Point]:
        """The budgets among which the smallest is looked for, from the least compressed on."""
        return budgets_to_try(self._workspace)

    def _refuse_starts(self) -> None:
        """Raise EvoPressError if the search is to start from what a baseline finds, which it does after the search."""
        workspace, levels = self._workspace, self._workspace.method.weights is not None
        for name in workspace.settings.search.starts:
            made = levels and (name == "dp" or name.startswith("uniform"))
            if not made and file_of(name, "search.starts", workspace.run_dir) is None:
                instead = "give dp, a uniform one or a file" if levels else "give a file"
                raise EvoPressError(f"search.starts has {name!r}, but with {self._kept.key} baselines follow the search: {instead}")

    def _write_answer(self, answer: PointRun, entries: Sequence[Mapping[str, Any]]) -> None:
        run_dir, kept = self._workspace.run_dir, self._kept
        told = {kept.key: kept.limit, "answer": answer.name}
        write_json(run_dir / "front.json", {"schema": 1, **told, "tried": list(entries)})
        result = read_result(run_dir)
        without = [{key: value for key, value in entry.items() if key != "genome"} for entry in entries]
        result["kept"] = {**told, "tried": without}
        write_json(run_dir / "result.json", result)

    def _answer(self) -> PointRun:
        told = _told(self._workspace)
        if told is None:
            raise EvoPressError(
                f"there is no front.json in {self._workspace.run_dir} that names the smallest budget: run the stage search first"
            )
        self._check_answer(told)
        return open_point(self._workspace, point_at(self._workspace.settings, told["answer"]), all_stages=True)

    def _check_answer(self, told: Mapping[str, Any]) -> None:
        """Raise EvoPressError if the budget that was found keeps another limit than the one that is asked for."""
        kept = self._kept
        if told.get(kept.key) != kept.limit:
            there = next((f"{key}={shown(told[key])}" for key in ("max_kl", "min_agreement") if key in told), "another limit")
            raise EvoPressError(
                f"the smallest budget in {self._workspace.run_dir}, {told['answer']}, was found for {there}, not for {kept.key}="
                f"{kept.limit:g}: run the stage search with this limit first, or give {there}"
            )


def _told(workspace: Workspace) -> dict[str, Any] | None:
    path = workspace.run_dir / "front.json"
    told = read_document(path, what="list of budgets") if path.exists() else {}
    return told if isinstance(told.get("answer"), str) and isinstance(told.get("tried"), list) else None


def _known(workspace: Workspace) -> dict[tuple[str, Genome], Scores]:
    """Return what an earlier run measured, by budget and genome; what cannot be read is measured again."""
    try:
        told = _told(workspace)
        return {
            (entry["budget"], tuple(entry["genome"])): Scores(
                kl=float(entry["kl"]),
                perplexity=math.nan,
                top1_agreement=float(entry["top1_agreement"]),
                num_tokens=int(entry["num_tokens"]),
            )
            for entry in (told or {}).get("tried", [])
        }
    except (EvoPressError, KeyError, TypeError, ValueError):
        return {}
