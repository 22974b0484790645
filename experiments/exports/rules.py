"""The price of an engine's rules: one size in bytes, searched by the rules of each engine and by none.

    python -m experiments.exports.rules --jobs 5                                    # SmolLM2 in bfloat16, three seeds
    python -m experiments.exports.rules --engines none vllm --sizes 96.5MB --seeds 0 -- threads=1
    python -m experiments.exports.rules --sizes 80kB --results /tmp/rules.csv -- +debug=tiny model.group_size=32

All are searched by guided from dynamic programming's genome. The bytes of `none` are the level database's, those of an engine its
file's but for the header; `file_bytes` has the header, too. Runs lie in `multirun/exports/rules/` and are gone on with where they
were cut off. `rules.csv` is written anew after each; what it has is not run again. What follows `--` is given to every run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd

from evopress.engines import ENGINES, NONE
from experiments.frames import write_frame
from experiments.joint.run import has_run, rows_of
from experiments.scripts import file_to_write, with_its_jobs
from experiments.single_runs import why_it_failed

FOLDER = Path(__file__).parent
RUNS = Path("multirun/exports/rules")
SIZES = ("96.5MB", "116MB")
"""SmolLM2 in bfloat16: 3 bits a weight with scales and zeros, and a size that the types of GGUF reach for its rows."""


def arguments_of(engine: str, size: str) -> list[str]:
    """Return what a search by an engine's rules is on the command line, less its stages."""
    types = engine != NONE and ENGINES[engine].gguf_types
    export = [] if engine == NONE else [ENGINES[engine].export]
    method = ["+method=gguf" if types else "+method=quant", "search/strategy=guided", "search.exchange=fit"]
    return [*method, f"engine={engine}", f"size={size}", *export, "tracker=none", "evaluation.every=0"]


def rows(asked: argparse.Namespace, known: Collection[tuple[int, str, str]]) -> Iterator[dict[str, Any]]:
    """Yield rows of every engine, size and seed that is not known; those that cannot be have a sentence instead of numbers."""

    def one(which: tuple[int, str, str]) -> list[dict[str, Any]]:
        seed, size, engine = which
        folder = asked.runs / f"{engine}-{size}-seed-{seed}"
        row: dict[str, Any] = {"engine": engine, "size": size, "seed": seed}
        then = "evaluate" if engine == NONE else "evaluate,export"
        if not has_run(folder, [*arguments_of(engine, size), f"seed={seed}", *asked.further], then=then):
            return [row | {"said": why_it_failed(folder)}]
        (exported,) = [*json.loads((folder / "result.json").read_text(encoding="utf-8")).get("exports", {}).values()] or [{}]
        return [
            row | {"file_bytes": exported.get("bytes") if found["row"] == "evopress" else None} | found for found in rows_of(folder)
        ]

    with ThreadPoolExecutor(asked.jobs) as pool:
        every = product(asked.seeds, asked.sizes, asked.engines)
        for found in pool.map(one, [which for which in every if which not in known]):
            yield from found


def table(found: pd.DataFrame) -> pd.DataFrame:
    """Return means over seeds by size and engine, with the difference of KL divergence to no rules on the same seed."""
    if "kl" not in found:
        return found
    searched = found[found["row"] == "evopress"]
    free = searched[searched["engine"] == NONE].set_index(["size", "seed"])["kl"]
    against = [free.get((size, seed)) for size, seed in zip(searched["size"], searched["seed"], strict=True)]
    searched = searched.assign(price=searched["kl"] - pd.Series(against, index=searched.index, dtype=float))
    columns = [name for name in ("bytes", "file_bytes", "bits", "kl", "price", "perplexity", "tokens") if name in searched]
    means = searched.groupby(["size", "engine"], sort=False)[columns].mean()
    spread = searched.groupby(["size", "engine"], sort=False)["kl"].agg(least="min", greatest="max", seeds="count")
    return means.join(spread).reset_index()


@with_its_jobs()
def main() -> None:
    """Run what is missing and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", default=[NONE, *ENGINES], choices=[NONE, *ENGINES])
    parser.add_argument("--sizes", nargs="+", default=list(SIZES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="at once")
    parser.add_argument("--runs", type=Path, default=RUNS)
    parser.add_argument("--results", type=file_to_write, default=FOLDER / "rules.csv")
    parser.add_argument("further", nargs="*", help="overrides for every run, after --")
    asked = parser.parse_args()
    found: list[dict[Any, Any]] = pd.read_csv(asked.results).to_dict("records") if asked.results.exists() else []
    found = [row for row in found if "row" in row and not pd.isna(row["row"])]  # a sentence may no longer be true
    for row in rows(asked, {(row["seed"], row["size"], row["engine"]) for row in found}):
        found.append(row)
        write_frame(asked.results, pd.DataFrame(found))
        print(row, flush=True)
    print(table(pd.DataFrame(found)).to_string(index=False))


if __name__ == "__main__":
    main()
