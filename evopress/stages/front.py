"""Several budgets in one run: a search for each, begun from its neighbour's genome, then one table, one figure, one page."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import ClassVar

from evopress.errors import EvoPressError
from evopress.files import make_folder
from evopress.methods.points import points_of
from evopress.settings import RunSettings
from evopress.stages.baselines import build_database, find_baselines
from evopress.stages.checks import searching_of
from evopress.stages.kind import Context
from evopress.stages.point_run import PointRun
from evopress.stages.points import FOR_ONE, left_to_the_picked, open_point, refuse_other_points, search_points
from evopress.stages.points_results import evaluate_points, report_points
from evopress.workspace import Workspace


class Front:
    """A run with several budgets, from the least compressed to the most; what is for one genome is left to the one picked."""

    each: ClassVar[str] = " at each budget"
    exports: ClassVar[bool] = False
    once: ClassVar[Collection[str]] = ("database", "report")

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._points = [open_point(workspace, point) for point in points_of(workspace.settings)]
        self.searching = searching_of(workspace)

    @staticmethod
    def check(settings: RunSettings, run_dir: Path) -> None:
        """Raise EvoPressError if all that the run is to do is for one genome."""
        if set(settings.stages) <= set(FOR_ONE):
            raise EvoPressError(
                f"stages=[{','.join(settings.stages)}] needs one genome, but each of budgets={settings.budgets} has its own: pick "
                "one, such as resume=RUN pick=2.5"
            )

    def refuse(self) -> None:
        """Raise EvoPressError if what an earlier run left of a budget is not this one's."""
        refuse_other_points(self._points)

    def planned(self) -> Sequence[PointRun]:
        """Return the runs of all budgets."""
        return self._points

    def target(self) -> tuple[str, float | str]:
        """Return all budgets."""
        return "budgets", "+".join(point.name for point in self._points)

    def database(self, context: Context) -> None:
        """Build the level database."""
        build_database(self._workspace)

    def baselines(self, context: Context) -> None:
        """Find those of every budget."""
        for point in self._points:
            make_folder(point.workspace.run_dir)
            find_baselines(point.workspace)

    def search(self, context: Context) -> None:
        """Search at every budget, from the genome of the nearest that was searched before it."""
        search_points(self._points)

    def refine(self, context: Context) -> None:
        """Say which command does it."""
        left_to_the_picked(self._workspace, "refine")

    def evaluate(self, context: Context) -> None:
        """Measure what was found and compared at every budget."""
        evaluate_points(self._workspace, self._points, context.tracker)

    def export(self, context: Context) -> None:
        """Say which command does it."""
        left_to_the_picked(self._workspace, "export")

    def report(self, context: Context) -> None:
        """Write the front, table, figure and page."""
        report_points(self._workspace, context)
