"""The run of one budget, with a folder of its own; what is done with several is in `points.py`."""

from __future__ import annotations

from dataclasses import dataclass

from evopress.reporting.records import read_genome
from evopress.search.strategy import Searching
from evopress.units import Genome
from evopress.workspace import Workspace


@dataclass(frozen=True)
class PointRun:
    """The run of one budget."""

    name: str
    """Of its point; empty: the run has no other budget."""
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
