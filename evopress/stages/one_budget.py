"""A run of one budget: one search, one genome."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import ClassVar

from evopress.settings import RunSettings
from evopress.stages.baselines import build_database, find_baselines
from evopress.stages.checks import searching_of
from evopress.stages.earlier import refuse_other_work
from evopress.stages.evaluate import evaluate
from evopress.stages.exports import export
from evopress.stages.kind import Context
from evopress.stages.point_run import PointRun
from evopress.stages.points import refuse_points_left
from evopress.stages.refine import refine, refuse_without_genome
from evopress.stages.report import report
from evopress.stages.search import search
from evopress.workspace import Workspace


class OneBudget:
    """A run of one budget."""

    each: ClassVar[str] = ""
    exports: ClassVar[bool] = True
    once: ClassVar[Collection[str]] = ("database", "report")

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self.searching = searching_of(workspace)

    @staticmethod
    def check(settings: RunSettings, run_dir: Path) -> None:
        """Raise EvoPressError if the folder has a run of several budgets."""
        refuse_points_left(run_dir)

    def refuse(self) -> None:
        """Raise EvoPressError if what an earlier run left is not this one's, or there is no genome to refine."""
        refuse_without_genome(self._workspace)
        refuse_other_work(self._workspace, self.searching)

    def planned(self) -> Sequence[PointRun]:
        """Return the run itself."""
        return [PointRun("", self._workspace, self.searching)]

    def target(self) -> tuple[str, float | str]:
        """Return the budget, and the setting that it is given by."""
        settings = self._workspace.settings
        asked = {"size": settings.size, "bits": settings.bits, "sparsity": settings.sparsity}
        return next((key, value) for key, value in asked.items() if value is not None)

    def database(self, context: Context) -> None:
        """Build the level database."""
        build_database(self._workspace)

    def baselines(self, context: Context) -> None:
        """Find what results are compared with."""
        find_baselines(self._workspace)

    def search(self, context: Context) -> None:
        """Search, or go on with what an earlier run has searched."""
        search(self._workspace, self.searching, context.tracker)

    def refine(self, context: Context) -> None:
        """Compress the found genome's levels a second time."""
        refine(self._workspace)

    def evaluate(self, context: Context) -> None:
        """Measure the found genome and the baselines."""
        evaluate(self._workspace, context.tracker)

    def export(self, context: Context) -> None:
        """Write the found genome's model."""
        export(self._workspace, context)

    def report(self, context: Context) -> None:
        """Write tables, figures and the page."""
        report(self._workspace, context)
