"""What kinds of run have in common: what each refuses, what it will take, and a method for every stage."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from evopress.reporting.tracker import Tracker
from evopress.search.strategy import Searching
from evopress.settings import RunSettings
from evopress.stages.point_run import PointRun
from evopress.workspace import Workspace


@dataclass(frozen=True)
class Context:
    """What stages say of the run that they belong to, and to whom."""

    tracker: Tracker
    config: dict[str, Any]
    """The composed config."""
    command: str
    """What was typed."""
    environment: dict[str, Any]
    """Versions and machine."""
    second_pass: str = ""
    """What follows the command where weights were refined, unless it refines them itself."""

    def command_of(self, *, refined: bool) -> str:
        """Return what makes the model again, whose weights were refined or were not."""
        return self.command + (self.second_pass if refined else "")


class Kind(Protocol):
    """A kind of run, by what it looks for; its stages are methods of their names, called in order and any of them alone."""

    searching: Searching
    """Numbers of the search."""
    each: ClassVar[str]
    """Of what a search is told of, in words: "", or " at each budget"."""
    exports: ClassVar[bool]
    """Whether the stage `export` writes something."""
    once: ClassVar[Collection[str]]
    """Stages that are done once, and not for every run that is planned."""

    def __init__(self, workspace: Workspace) -> None: ...

    @staticmethod
    def check(settings: RunSettings, run_dir: Path) -> None:
        """Raise EvoPressError if the settings mean nothing to this kind of run, or the folder's run is of another."""

    def refuse(self) -> None:
        """Raise EvoPressError if what an earlier run left is not this one's, or lacks what a stage needs."""

    def planned(self) -> Sequence[PointRun]:
        """Return the runs of one budget that there will be."""

    def target(self) -> tuple[str, float | str]:
        """Return what the run is to reach, and the setting that says so."""

    def database(self, context: Context) -> None:
        """Build the level database."""

    def baselines(self, context: Context) -> None:
        """Find what results are compared with."""

    def search(self, context: Context) -> None:
        """Search."""

    def refine(self, context: Context) -> None:
        """Compress what was found a second time."""

    def evaluate(self, context: Context) -> None:
        """Measure on held-out text."""

    def export(self, context: Context) -> None:
        """Write what was found as a checkpoint, or in other formats."""

    def report(self, context: Context) -> None:
        """Write tables, figures and the page."""
