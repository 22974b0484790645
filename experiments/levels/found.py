"""What a found model gains by the second pass along it, and what one costs whose head and embedding are compressed too.

    python -m experiments.levels.found                   # hours on 2 cores
    python -m experiments.levels.found --jobs 12         # on a GPU: minutes
    python -m experiments.levels.found --rows whole --bits 2.5 --seeds 0 -- threads=1

The second pass is measured at 2.25, 2.5 and 3 bits, models that are compressed whole at 2.5, 3 and 4. Level databases can be
corrected as the second pass is, for what activations lose at one level: uniform models of this level are better then, others worse.
Runs lie in `multirun/found/` and are gone on with where they were cut off; `found.csv` beside this file is written anew after each.
What follows `--` is given to every run.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from evopress.reporting.records import read_json
from experiments.frames import write_frame
from experiments.scripts import file_to_write, with_its_jobs
from experiments.single_runs import Jobs, SingleRun, folder_name

TABLE = Path(__file__).with_suffix(".csv")
RUNS = Path("multirun/found")
LEVELS = "method.levels=[dense,8,6,5,4,3,2]"
ROOM = ["data.search_tokens=16384"]
"""What leaves enough of python_docs for the second pass to choose by."""
PASS = ["stages=[database,baselines,search,refine,evaluate]", *ROOM, "refine.tokens=4096"]
CORRECTED = ["method.correction=0.5", "baselines.names=[uniform,dp]"]
ROWS: dict[str, tuple[tuple[float, ...], list[str]]] = {
    "second pass": ((2.25, 2.5, 3), PASS),
    "second pass, scales learned": ((2.25, 2.5, 3), [*PASS, "refine.scale_epochs=2"]),
    "second pass, not corrected": ((2.25, 2.5, 3), [*PASS, "refine.correction=0"]),
    "corrected through 2 bits": ((2.5,), [*PASS, *CORRECTED, "method.propagate_bits=2"]),
    "corrected through 3 bits": ((2.5,), [*PASS, *CORRECTED, "method.propagate_bits=3"]),
    "whole": ((2.5, 3, 4), [LEVELS, "method.include=[blocks,head,embedding]", "stages=[database,search,evaluate,export]"]),
}
"""A row to the bits per weight it is measured at, and the overrides that make it."""


def runs(names: Sequence[str], bits: Sequence[float] | None, seeds: Sequence[int], further: Sequence[str]) -> Iterator[SingleRun]:
    """Yield a run per row, bits per weight and seed."""
    common = ["+method=quant", "search/strategy=guided", "search.starts=[dp]", "baselines.names=[]", "tracker=none"]
    for name in names:
        at, overrides = ROWS[name]
        for target in bits or at:
            for seed in seeds:
                folder = RUNS / folder_name(f"{name}-{target:g}-{seed}")
                given = (*common, *overrides, *further, f"bits={target:g}", f"seed={seed}")
                yield SingleRun(folder, given, {"row": name, "target": target, "seed": seed})


def rows_of(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the measures of a finished run's models; what was exported, in bytes, beside them."""
    result = read_json(folder / "result.json")
    refined = result.get("refine", {})
    refined |= {f"scales_{key}": value for key, value in refined.pop("scales", {}).items()}
    checkpoint = folder / "checkpoint"
    exported = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors")) if checkpoint.is_dir() else None
    for row in result["rows"]:
        if row["name"] == "dense":
            continue
        yield {
            "model": row["name"],
            **{key: row[key] for key in ("bits_per_weight", "bytes", "kl", "top1_agreement")},
            "perplexity": next(iter(row["perplexity"].values())),
            "checkpoint_bytes": exported,
            **{f"refine_{key}": value for key, value in refined.items() if row["name"] != "evopress"},
        }


def asked_for(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read a command line (default: this process's)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--bits", nargs="+", type=float, default=None)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="at once")
    parser.add_argument("--out", type=file_to_write, default=TABLE)
    parser.add_argument("further", nargs="*", help="overrides for every run, after --")
    return parser.parse_args(words)


def asked_runs(asked: argparse.Namespace) -> list[SingleRun]:
    """Return the runs that a command line asks for."""
    return list(runs(asked.rows, asked.bits, asked.seeds, asked.further))


@with_its_jobs()
def main() -> None:
    """Run what is missing and write what was found."""
    asked = asked_for()
    found: list[dict[str, Any]] = []
    jobs = Jobs(asked_runs(asked), at_once=asked.jobs)
    for run in jobs:
        found += [{**run.labels, **row} for row in rows_of(run.folder)]
        frame = pd.DataFrame(found).sort_values(["row", "target", "seed"], kind="stable")
        write_frame(asked.out, frame)
        print(frame.tail(2).to_string(), flush=True)
    jobs.check()


if __name__ == "__main__":
    main()
