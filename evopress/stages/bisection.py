"""Bisection over budgets for the smallest whose found genome keeps a limit, measured on search text.

So held-out text decides nothing and can tell what the answer is worth.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evopress.errors import EvoPressError
from evopress.evaluation.heldout import Scores, measure_held_out
from evopress.methods.points import Point, grid
from evopress.ranks import collective
from evopress.reporting.tables import significant
from evopress.settings import RunSettings
from evopress.stages.point_run import PointRun
from evopress.stages.points import nearest, open_point, search_one
from evopress.units import Genome
from evopress.workspace import Workspace

logger = logging.getLogger(__name__)
MOST_TOKENS = 32768
"""Search tokens that a genome is held to, at most."""


@dataclass(frozen=True)
class Kept:
    """What the smallest model has to keep."""

    key: str
    """The setting: "max_kl"."""
    limit: float

    @classmethod
    def of(cls, settings: RunSettings) -> Kept:
        """Take it out of a run's settings."""
        if settings.max_kl is not None:
            return cls("max_kl", settings.max_kl)
        assert settings.min_agreement is not None
        return cls("min_agreement", settings.min_agreement)

    @property
    def name(self) -> str:
        """What it is, for people."""
        return "KL divergence" if self.key == "max_kl" else "top-1 agreement"

    @property
    def measure(self) -> str:
        """What it is in scores and entries."""
        return "kl" if self.key == "max_kl" else "top1_agreement"

    def value(self, scores: Scores) -> float:
        """Return what a genome has of it."""
        return float(getattr(scores, self.measure))

    def holds(self, scores: Scores) -> bool:
        """Tell whether a genome keeps it."""
        value = self.value(scores)
        return value <= self.limit if self.key == "max_kl" else value >= self.limit

    def __str__(self) -> str:
        return f"{self.key}={self.limit:g}"


class Bisection:
    """Searches at budgets until the smallest that keeps a limit is known: one that keeps it is taken to do so at all greater ones.

    Args:
        kept: the limit.
        tried: budgets to choose among, from the least compressed on.
        known: what an earlier run measured, by budget and genome.
    """

    def __init__(
        self, workspace: Workspace, kept: Kept, tried: Sequence[Point], known: Mapping[tuple[str, Genome], Scores]
    ) -> None:
        self._workspace, self._kept, self._tried, self._known = workspace, kept, tried, known
        self.runs: dict[str, PointRun] = {}
        """Those of the budgets that were searched, by their names."""
        self.entries: list[dict[str, Any]] = []
        """What was measured at each, in the order of the search."""
        self.all_keep = False
        """Whether no budget that was tried is too small."""

    def find(self) -> PointRun:
        """Return the run of the smallest budget that keeps the limit.

        Raises: EvoPressError if not even the least compressed does.
        """
        best, over = self._begin(), len(self._tried)
        while over - best > 1:
            middle = (best + over) // 2
            if self._try_at(middle):
                best = middle
            else:
                over = middle
        if best < 0:
            kept = self._kept
            last = min(self.entries[1:], key=lambda entry: abs(kept.limit - entry[kept.measure]))
            raise self._kept_by_none(last, f"at {last['budget']}", "add a less compressed level")
        self.all_keep = over == len(self._tried)
        return self.runs[self._tried[best].name]

    def _begin(self) -> int:
        """Try the least that can be done; return the greatest index of a budget that is known to keep the limit, -1: of none."""
        if self._workspace.settings.budgets:
            if not self._try_at(0):
                raise self._kept_by_none(
                    self.entries[-1], f"at {self._tried[0].name}, the least compressed,", "add a less compressed budget"
                )
            return 0
        if not self._keeps((0,) * len(self._workspace.database.space), "least compressed"):
            raise self._kept_by_none(
                self.entries[-1], "with every unit at its least compressed level", "add a less compressed level"
            )
        return -1

    def _try_at(self, place: int) -> bool:
        """Search at one budget, and tell whether what is found keeps the limit."""
        point = open_point(self._workspace, self._tried[place])
        near = nearest(point, self.runs.values())
        logger.info("budget %s%s", point.name, "" if near is None else f", from what was found at {near.name}")
        search_one(point, near)
        self.runs[point.name] = point
        return self._keeps(point.genome(), point.name)

    def _keeps(self, genome: Genome, budget: str) -> bool:
        kept, scores = self._kept, self._known.get((budget, genome)) or _on_search_text(self._workspace, genome)
        self.entries.append(
            {
                "budget": budget,
                "kl": scores.kl,
                "top1_agreement": scores.top1_agreement,
                "num_tokens": scores.num_tokens,
                "keeps": kept.holds(scores),
                "genome": list(genome),
            }
        )
        said = f"{kept.name} {significant(kept.value(scores))} on {scores.num_tokens:,} tokens of search text"
        logger.info("%s: %s, %s is %skept", budget, said, kept, "" if kept.holds(scores) else "not ")
        return kept.holds(scores)

    def _kept_by_none(self, entry: Mapping[str, Any], where: str, otherwise: str) -> EvoPressError:
        kept = self._kept
        value = significant(entry[kept.measure])
        change = "raise it" if kept.key == "max_kl" else "lower it"
        return EvoPressError(
            f"{kept} is kept by no budget: {where} the {kept.name} is {value} on {entry['num_tokens']:,} tokens of search "
            f"text; {change}, or {otherwise}"
        )


def budgets_to_try(workspace: Workspace) -> list[Point]:
    """Return the budgets among which the smallest is looked for, from the least compressed on.

    Raises: EvoPressError if there is none.
    """
    space, _ = workspace.databases.plan()
    found = grid(workspace.settings, space, workspace.rest_of(space))
    if not found:
        raise EvoPressError(
            f"{Kept.of(workspace.settings)} has no budget to try between the most and the least compressed level: give budgets to "
            "choose among, or more levels"
        )
    return found


@collective
def _on_search_text(workspace: Workspace, genome: Genome) -> Scores:
    fitness, tokens = workspace.settings.fitness, workspace.search_tokens
    count = max(MOST_TOKENS // tokens.shape[1], 1)
    (scores,) = measure_held_out(
        workspace.evaluator,
        [genome],
        tokens[:count],
        base=workspace.search_base[:count],
        batch_tokens=fitness.max_tokens_in_flight,
        chunk_tokens=fitness.chunk_tokens,
        what="on search text",
    )
    return scores
