"""The smallest model that keeps something: a bisection over budgets, each searched as a point of a front.

What is to be kept is measured on search text, so that held-out text decides nothing and can tell what it is worth.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from evopress.errors import EvoPressError
from evopress.evaluation.heldout import Scores, measure_held_out
from evopress.json_files import shown
from evopress.methods.points import Point, grid, in_order, point_at
from evopress.ranks import collective
from evopress.reporting.records import read_document, write_json
from evopress.reporting.tables import significant
from evopress.settings import RunSettings
from evopress.stages.baselines import find_baselines
from evopress.stages.exports import export
from evopress.stages.front import PointRun, nearest, open_point, search_one
from evopress.stages.results import read_result
from evopress.units import Genome
from evopress.workspace import Workspace

logger = logging.getLogger(__name__)
MOST_TOKENS = 32768
"""Search tokens that a genome is held to, at most."""
_BEYOND = "no smaller one is tried, and all units at their most compressed level may keep it, too: give budgets to choose among"


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


def budgets_to_try(workspace: Workspace) -> list[Point]:
    """Return the budgets among which the smallest is looked for, from the least compressed on; builds nothing.

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


def likely_tries(workspace: Workspace, tried: Sequence[Point]) -> list[PointRun]:
    """Return as many runs as the bisection does at most, at budgets all over the range: for what they will take."""
    count = math.ceil(math.log2(len(tried) + 1))
    return [open_point(workspace, tried[(2 * i + 1) * len(tried) // (2 * count)]) for i in range(count)]


def find_smallest(workspace: Workspace, tried: Sequence[Point], points: list[PointRun]) -> None:
    """Stage `search`: find the smallest budget whose found genome keeps what is asked for, by bisection.

    Whether a budget keeps it is taken to be so for all greater ones too.

    Args: points: becomes the runs of the budgets that were searched.

    Raises: EvoPressError if not even the least compressed keeps it.
    """
    kept, database = Kept.of(workspace.settings), workspace.database
    known = _known(workspace)
    runs: dict[str, PointRun] = {}
    entries: list[dict[str, Any]] = []

    def keeps(genome: Genome, budget: str) -> bool:
        scores = known.get((budget, genome)) or _on_search_text(workspace, genome)
        entries.append(
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

    def try_at(place: int) -> bool:
        point = open_point(workspace, tried[place])
        near = nearest(point, runs.values())
        logger.info("budget %s%s", point.name, "" if near is None else f", from what was found at {near.name}")
        search_one(point, near)
        runs[point.name] = point
        return keeps(point.genome(), point.name)

    if workspace.settings.budgets:
        if not try_at(0):
            raise _kept_by_none(kept, entries[-1], f"at {tried[0].name}, the least compressed,", "add a less compressed budget")
        best, over = 0, len(tried)
    else:
        if not keeps((0,) * len(database.space), "least compressed"):
            raise _kept_by_none(kept, entries[-1], "with every unit at its least compressed level", "add a less compressed level")
        best, over = -1, len(tried)
    while over - best > 1:
        middle = (best + over) // 2
        if try_at(middle):
            best = middle
        else:
            over = middle
    if best < 0:
        last = min(entries[1:], key=lambda entry: abs(kept.limit - entry[kept.measure]))
        raise _kept_by_none(kept, last, f"at {last['budget']}", "add a less compressed level")
    answer = runs[tried[best].name]
    told = {"schema": 1, kept.key: kept.limit, "answer": answer.name, "tried": entries}
    write_json(workspace.run_dir / "front.json", told)
    result = read_result(workspace.run_dir)
    result["kept"] = {**told, "tried": [{key: value for key, value in entry.items() if key != "genome"} for entry in entries]}
    del result["kept"]["schema"]
    write_json(workspace.run_dir / "result.json", result)
    beyond = "" if over < len(tried) or workspace.settings.budgets else f"; {_BEYOND}"
    logger.info("the smallest of %d budgets that keeps %s: %s%s", len(tried), kept, answer.name, beyond)
    if "baselines" in workspace.settings.stages:
        find_baselines(answer.workspace)
    places = {
        point.name: place for place, point in enumerate(in_order([tried[0], *(point_at(workspace.settings, n) for n in runs)]))
    }
    points[:] = sorted(runs.values(), key=lambda run: places[run.name])


def refuse_without_answer(workspace: Workspace) -> None:
    """Raise EvoPressError if a stage is for the smallest budget, and none was found nor will be: before any model work."""
    stages = set(workspace.settings.stages)
    if "search" in stages:
        return
    if stages & {"baselines", "export"}:
        _answer(workspace)
    elif stages & {"evaluate", "report"} and (told := _told(workspace)) is not None:
        _check_answer(workspace, told)


def find_baselines_of_smallest(workspace: Workspace) -> None:
    """Stage `baselines`: those of the smallest budget that keeps what is asked for; a search finds them when it has found it."""
    if "search" not in workspace.settings.stages:
        find_baselines(_answer(workspace).workspace)


def export_smallest(workspace: Workspace, *, command: str) -> None:
    """Stage `export`: write what was found at the smallest budget that keeps what is asked for."""
    export(_answer(workspace).workspace, command=command)


def _answer(workspace: Workspace) -> PointRun:
    told = _told(workspace)
    if told is None:
        raise EvoPressError(
            f"there is no front.json in {workspace.run_dir} that names the smallest budget: run the stage search first"
        )
    _check_answer(workspace, told)
    return open_point(workspace, point_at(workspace.settings, told["answer"]), all_stages=True)


def _check_answer(workspace: Workspace, told: dict[str, Any]) -> None:
    """Raise EvoPressError if the budget that was found keeps another limit than the one that is asked for."""
    kept = Kept.of(workspace.settings)
    if told.get(kept.key) != kept.limit:
        there = next((f"{key}={shown(told[key])}" for key in ("max_kl", "min_agreement") if key in told), "another limit")
        raise EvoPressError(
            f"the smallest budget in {workspace.run_dir}, {told['answer']}, was found for {there}, not for {kept.key}="
            f"{kept.limit:g}: run the stage search for this one first, or give that one"
        )


def _kept_by_none(kept: Kept, entry: dict[str, Any], where: str, otherwise: str) -> EvoPressError:
    value = significant(entry[kept.measure])
    change = "raise it" if kept.key == "max_kl" else "lower it"
    return EvoPressError(
        f"{kept} is kept by no budget: {where} the {kept.name} is {value} on {entry['num_tokens']:,} tokens of search "
        f"text; {change}, or {otherwise}"
    )


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
