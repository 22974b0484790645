"""The guided search against evolution on the same levels: held-out KL, perplexity and tokens, over budgets and seeds.

    python -m experiments.guided.measure                                # all rows, 2.5 and 3 bits, three seeds: hours on 2 cores
    python -m experiments.guided.measure --rows guided --budgets 2.5 --seeds 0 -- threads=1

Runs lie in `multirun/guided/`, are gone on with where they were cut off, and `results.csv` is written anew after each. What follows
`--` is given to every run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.single_runs import evopress, folder_name, why_it_failed

FOLDER = Path(__file__).parent
RUNS = Path("multirun/guided")
ROWS: dict[str, list[str]] = {
    "dp": ["genome=dp", "stages=[database,evaluate]"],
    "evolution from dp": ["search.starts=[dp]", "search.exchange=any"],
    "guided": ["search/strategy=guided"],
    "guided, then evolution": ["search/strategy=guided", "search.strategy.generations_after=9", "search.exchange=any"],
}
"""A row to the overrides that make it."""
BUDGETS = (2.5, 3.0)
SEEDS = (0, 1, 2)


def row_of(folder: Path) -> dict[str, Any]:
    """Return what a finished run has to say: its genome's measures, and what the search cost."""
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    names = ("evopress", "dp")
    row = next(row for name in names for row in result["rows"] if row["name"] == name)
    search = result.get("search", {})
    return {
        "bits": row["bits_per_weight"],
        "held_out_kl": row["kl"],
        "perplexity": next(iter(row["perplexity"].values())),
        "top1_agreement": row["top1_agreement"],
        "tokens": search.get("tokens", 0),
        "generations": search.get("generations", 0),
    }


def rows(names: Sequence[str], budgets: Sequence[float], seeds: Sequence[int], further: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield a row per name, budget and seed; one whose run failed has a sentence instead of numbers."""
    common = ["+method=quant", "tracker=none", "baselines.names=[]", "stages=[database,search,evaluate]", *further]
    for seed in seeds:
        for budget in budgets:
            for name in names:
                folder = RUNS / f"{folder_name(name)}-{budget:g}-seed-{seed}"
                row: dict[str, Any] = {"row": name, "budget": budget, "seed": seed}
                if evopress(folder, *common, f"bits={budget:g}", f"seed={seed}", *ROWS[name]):
                    yield {**row, **row_of(folder)}
                else:
                    yield {**row, "failed": why_it_failed(folder)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--budgets", nargs="+", type=float, default=list(BUDGETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--results", type=Path, default=FOLDER / "results.csv")
    parser.add_argument("further", nargs="*", help="overrides for every run, after --")
    arguments = parser.parse_args()
    found: list[dict[str, Any]] = []
    for row in rows(arguments.rows, arguments.budgets, arguments.seeds, arguments.further):
        found.append(row)
        pd.DataFrame(found).to_csv(arguments.results, index=False)
        print(row, flush=True)


if __name__ == "__main__":
    main()
