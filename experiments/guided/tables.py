"""Make tables of the paper from the runs of `experiments.guided.measure`: the same searches on both kinds of levels, ours beside.

    python -m experiments.guided.measure --method quant
    python -m experiments.guided.tables table3_best table16 table16_best       # of what has been measured for them

A job of such a table is the row "evolution" of a target and seed. Its baselines are those of the target, which no seed changes; the
best of the random mixes is the one that this search began with, and "guided" is ours on the same levels.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from evopress.errors import EvoPressError
from evopress.reporting.records import read_json, read_records
from experiments.guided.measure import RUNS, folder_of
from experiments.scripts import in_one_sentence
from experiments.specs import SPECS, home
from experiments.sweeps import Job, Sweep, expected_jobs, read_job
from experiments.tables import write_tables

EXPERIMENTS = ("table2_sparsity", "table3", "table14_15_sparsity", "table16")
"""What those runs have; each of them on the best levels too, as NAME_best."""
COSTS = ("bits_per_weight", "bits_per_weight_with_metadata", "weights_kept", "sparsity", "bytes")
TABLES = tuple(name for each in EXPERIMENTS for name in (each, f"{each}_best"))


def labels_of(experiment: str, axes: Mapping[str, str], row: str) -> dict[str, Any]:
    """Return the labels of the run that has a row of an experiment's job; baselines are there at the first seed."""
    spec, is_sparse = SPECS[experiment], "sparsity" in axes
    return {
        "method": "sparsity" if is_sparse else "quant",
        "recipe": "best" if spec.twin_of else "paper",
        "target": float(axes["sparsity"] if is_sparse else axes.get("bits", 3)),
        "row": row,
        "seed": 0 if row == "baselines" else int(axes["seed"]),
    }


def jobs_of(experiment: str, root: Path) -> Iterator[tuple[dict[str, str], Job | None]]:
    """Yield the axes of each job of an experiment, and the job as the runs under a folder have it; None: not all of them."""
    for axes in expected_jobs(SPECS[experiment].twin_of or experiment):
        folders = {row: folder_of(labels_of(experiment, axes, row), root) for row in ("evolution", "baselines", "guided")}
        try:
            job = read_job(folders["evolution"], [])
            baselines = read_job(folders["baselines"], []).result["rows"]
        except EvoPressError:
            yield axes, None
            continue
        dense, found = job.result["rows"]
        rows = [dense, *(row for row in baselines if row["name"] != "dense" and _costs_as_much(row, found))]
        rows += [*_best_of_random(job.folder, found), *_guided(folders["guided"]), _with_tokens(found, job.result)]
        yield axes, replace(job, axes=dict(axes), result={**job.result, "rows": rows})


def _costs_as_much(row: Mapping[str, Any], found: Mapping[str, Any]) -> bool:
    """Tell whether a baseline spends what the genome that was found does: uniform ones on both sides of a target do not."""
    return all(abs(float(row[key]) - float(found[key])) <= 1e-3 * float(found[key]) for key in COSTS if key in found)


def _with_tokens(row: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row that says what its search spent; earlier versions did not."""
    return {**row, "tokens_spent": result["search"]["tokens"]}


def _best_of_random(folder: Path, found: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield what the search began with, where that was the best of random mixes."""
    first = read_records(folder / "metrics.jsonl")[0]
    if first["evaluations"] > 1:
        held_out = {key: first["held_out"][key] for key in ("kl", "perplexity", "top1_agreement")}
        by_data_set = {
            f"{key}_by_data_set": dict.fromkeys(held_out["perplexity"], held_out[key]) for key in ("kl", "top1_agreement")
        }
        costs = {key: found[key] for key in COSTS if key in found}
        yield {"name": f"best_of_{first['evaluations']}", **costs, **held_out, **by_data_set, "tokens_spent": first["tokens"]}


def _guided(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the row of the guided search, where it has ended."""
    if (folder / "result.json").exists():
        result = read_json(folder / "result.json")
        yield {**_with_tokens(result["rows"][-1], result), "name": "guided"}


@in_one_sentence()
def main() -> None:
    """Make the tables that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=TABLES, metavar="NAME", help=f"of {', '.join(TABLES)}")
    parser.add_argument("--runs", type=Path, default=RUNS)
    asked = parser.parse_args()
    for name in asked.names:
        found = list(jobs_of(name, asked.runs))
        jobs = tuple(job for _, job in found if job is not None)
        if not jobs:
            parser.error(f"{name}: no search of it has ended in {asked.runs}: run python -m experiments.guided.measure first")
        write_tables(name, Sweep(jobs, (), tuple(axes for axes, job in found if job is None)), home(name))
        print(f"{name}: {len(jobs)} of {len(found)} jobs, {home(name) / 'table.md'}")


if __name__ == "__main__":
    main()
