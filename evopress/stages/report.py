"""Stage `report`: tables, figures and one HTML page of what a run found and measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evopress.files import shown_path
from evopress.levels.modules import dropped_modules, modules_of
from evopress.reporting import figures, tables
from evopress.reporting.curve import held_out_curve
from evopress.reporting.dropped import dropped_modules_figure
from evopress.reporting.experts import expert_figure
from evopress.reporting.findings import headline, headlines
from evopress.reporting.generations import read_generations
from evopress.reporting.held import held_figure
from evopress.reporting.lineage import lineage_figures
from evopress.reporting.metrics import baseline_lines, best_metrics, final_metrics, levels_table, switches_table
from evopress.reporting.records import read_genome
from evopress.reporting.report import write_report
from evopress.reporting.tracker import Tracker, track_figures
from evopress.resources import Needs
from evopress.stages.baselines import stored_baselines
from evopress.stages.exports import served
from evopress.stages.given import named_genome, take_best_so_far
from evopress.stages.kind import Context
from evopress.stages.needs import Planner
from evopress.stages.results import REFINED_ROW, read_result
from evopress.workspace import Workspace

_REPORT_BYTES = 4 * 2**20


def report_needs(planner: Planner) -> Needs:
    """Return what the stage `report` takes."""
    return Needs("report", "tables, figures, page", disk={planner.workspace.run_dir: _REPORT_BYTES}, alone=True)


def report(workspace: Workspace, context: Context) -> None:
    """Stage `report`: tables, figures and one HTML page; prints the table."""
    settings, run_dir, database = workspace.settings, workspace.run_dir, workspace.database
    take_best_so_far(workspace)
    result, records = read_result(run_dir), read_generations(run_dir / "metrics.jsonl", database.space)
    rows = result.get("rows", [])
    given = named_genome(workspace)
    genome, space, title = None, database.space, f"{workspace.budget.target:g} {workspace.budget.measure}"
    checkpoint = run_dir / "checkpoint"
    exported = run_dir if given is None else run_dir / "genomes" / given.folder
    pictures: list[Path] = []
    if records:
        curve = held_out_curve(records, rows)
        lines = {name: held_out["kl"] for name, held_out in curve.lines.items()}
        of_one = {name: tuple((held_out.get("perplexity") or {}).values()) for name, held_out in curve.lines.items()}
        pictures += figures.convergence(
            curve.records,
            run_dir / "figures",
            lines,
            perplexities={name: values[0] for name, values in of_one.items() if len(values) == 1},
            fitness=settings.fitness.name,
            text=curve.text,
        )
    if (run_dir / "genome.json").exists():
        genome, shown_as = read_genome(run_dir / "genome.json", database.space, database=database.fingerprint), "evopress"
    elif given is not None:
        genome, space, shown_as, title = given.genome, given.space, given.name, f"genome {given.name}"
        checkpoint = run_dir / "genomes" / given.folder / "checkpoint"
    if genome is not None:
        pictures += figures.level_heatmap(space, genome, run_dir / "figures")
        others, union = stored_baselines(workspace)
        if given is not None:
            others.setdefault(given.name, given.genome)
        others = {name: other for name, other in others.items() if not name.startswith("uniform_") and name != shown_as}
        if workspace.method.modules is not None:
            dropped = {
                tables.display_name(name): dropped_modules(union, each) for name, each in {**others, shown_as: genome}.items()
            }
            if any(map(modules_of, union.units)):
                pictures += dropped_modules_figure(dropped, len(workspace.blocks.blocks), run_dir / "figures")
        if workspace.method.weights is not None:
            pictures += figures.level_profile(union, {**others, shown_as: genome}, run_dir / "figures")
        pictures += expert_figure(space, genome, run_dir / "figures")
        pictures += held_figure(records, database.space, run_dir / "figures", fitness=settings.fitness.name)
        pictures += lineage_figures(records, database.space, run_dir / "figures", fitness=settings.fitness.name)
    if workspace.method.weights is None:
        result.pop("database", None)  # no weights are stored
    if rows:
        tables.write_tables(rows, run_dir, said=headline(rows))
    write_report(
        run_dir / "report.html",
        title=f"{workspace.pretrained.name}, {settings.method.name} {title}",
        config=context.config,
        result={**result, "checkpoint": shown_path(checkpoint)} if checkpoint.is_dir() else result,
        records=records,
        space=space,
        genome=genome,
        figures=pictures,
        command=context.command_of(refined=any(row["name"] == REFINED_ROW for row in rows)),
        environment=context.environment,
    )
    track_results(context.tracker, rows, records)
    track_figures(context.tracker, pictures)
    if genome is not None:
        context.tracker.table("levels", *levels_table(space, genome))
        context.tracker.table("accepted_switches", *switches_table(records, database.space))
    files = [run_dir / name for name in ("genome.json", "genome.txt", "result.json") if (run_dir / name).exists()]
    context.tracker.artifact(f"genome-{database.fingerprint}", "genome", files)
    if rows:
        print(f"\n{tables.format_table(rows)}\n", *headlines(rows), sep="\n", flush=True)
    print(f"report: {run_dir / 'report.html'}", *served(workspace, exported), sep="\n", flush=True)


def track_results(tracker: Tracker, rows: Sequence[Mapping[str, Any]], records: Sequence[Mapping[str, Any]] = ()) -> None:
    """Tell a tracker what was measured: once a command, in its last stage that has it."""
    if not rows:
        return
    tracker.summarize({**best_metrics(records), **final_metrics(rows)})
    if records:
        lines, axes = baseline_lines(held_out_curve(records, rows))
        tracker.lines(lines, axes=axes)
    frame = tables.results_frame(rows)
    tracker.table("results", list(frame.columns), frame.to_numpy().tolist())
