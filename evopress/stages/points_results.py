"""Stages `evaluate` and `report` of a run with several budgets: one table, one figure and one page of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evopress.progress import counted
from evopress.reporting import tables
from evopress.reporting.front import front_figure, front_rows, front_words, write_front, write_front_report
from evopress.reporting.generations import read_generations
from evopress.reporting.records import write_json
from evopress.reporting.tracker import Tracker, track_figures
from evopress.stages.baselines import spent_on_baselines, stored_baselines
from evopress.stages.evaluate import add_spent, measured_rows
from evopress.stages.given import take_best_so_far
from evopress.stages.kind import Context
from evopress.stages.measured import MEASURED
from evopress.stages.point_run import PointRun
from evopress.stages.report import track_results
from evopress.stages.results import read_result
from evopress.units import Genome
from evopress.workspace import Workspace


def evaluate_points(workspace: Workspace, points: Sequence[PointRun], tracker: Tracker) -> None:
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
            shared = space.has(genome) and name.startswith("uniform") and genomes.get(name, genome) == genome
            own = name if shared else f"{name}@{point.name}"
            spent[own] = took.get(name, {})
            if own != name:
                budgets[own] = point.name
            if space.has(genome):
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


def report_points(workspace: Workspace, context: Context) -> None:
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
        config=context.config,
        result=result,
        rows=rows,
        front=front,
        figures=pictures,
        command=context.command,
        environment=context.environment,
    )
    track_results(context.tracker, rows)
    track_figures(context.tracker, pictures)
    if rows:
        print(f"\n{tables.format_table(rows)}\n\n{said}", flush=True)
    print(f"report: {run_dir / 'report.html'}", flush=True)


def _spent(point: PointRun) -> dict[str, Any]:
    """Return what the search at a budget took."""
    records = read_generations(point.workspace.run_dir / "metrics.jsonl", point.workspace.database.space)
    if not records:
        return {}
    spent = {key: records[-1][key] for key in ("tokens", "seconds", "evaluations")}
    return {**spent, "generations": records[-1]["generation"]}
