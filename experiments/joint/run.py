"""One size, three ways to reach it: bit widths alone, modules first and bit widths then, or both in one space.

    python -m experiments.joint.run                                     # three sizes, three seeds: hours on 2 cores
    python -m experiments.joint.run --jobs 12                           # on a GPU: minutes
    python -m experiments.joint.run --strategy evolution                # the paper's search
    python -m experiments.joint.run --sizes 50MB --seeds 0 -- search.generations=12 threads=1

All searches of a strategy may evaluate as many tokens, and start from dynamic programming's genome where it is within the size.
Runs lie in `multirun/joint/`, are gone on with where they were cut off, and `results.csv` is written anew after each. What follows
`--` is given to every run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.frames import write_frame
from experiments.scripts import file_to_write, with_its_jobs
from experiments.single_runs import SingleRun, evopress, evopress_all, folder_name, why_it_failed

FOLDER = Path(__file__).parent
RUNS = Path("multirun/joint")
SIZES = ("40MB", "50MB", "60MB")
LEVELS = "method.levels=[dense,8,6,5,4,3,2]"
WAYS = ("quant", "drop, then quant", "joint")
SHARE = 0.125
"""Of the blocks whose attention and whose MLP are dropped before bit widths are searched."""
_ABOVE_THE_SIZE = "is below their least cost"
"""What dynamic programming says where all modules at their cheapest levels take more than the size."""


def dropped_by(folder: Path) -> tuple[list[str], list[str]]:
    """Return the names of the modules that a run of method drop has dropped, and of those that it has kept."""
    units = json.loads((folder / "genome.json").read_text(encoding="utf-8"))["units"]
    names: dict[str, list[str]] = {"drop": [], "keep": []}
    for unit in units:
        names[unit["label"]].append(unit["name"])
    return names["drop"], names["keep"]


def arguments_of(way: str, size: str, common: list[str], found: Path) -> list[str] | None:
    """Return what a way is on the command line, less its stages; None if what it needs failed.

    Args: found: the run of method drop, for the way that begins with one.
    """
    if way == "quant":
        return ["+method=quant", LEVELS, "method.include=[blocks,head,embedding]", "search.exchange=fit", f"size={size}", *common]
    joint = ["+method=joint", LEVELS, f"size={size}", *common]
    if way == "joint":
        return joint
    if not (found / "finished.json").exists():
        return None
    dropped, kept = dropped_by(found)
    return [*joint, f"method.dropped=[{','.join(dropped)}]", f"method.exclude=[{','.join(kept)}]"]


def has_run(folder: Path, arguments: list[str], *, then: str = "evaluate") -> bool:
    """Search from dynamic programming's genome, or from random mixes where that is above the size; tell if it ended well.

    Args: then: the stages after the search.
    """
    stages = ["baselines.names=[dp]", f"stages=[database,baselines,search,{then}]"]
    if evopress(folder, *arguments, *stages, "search.starts=[dp]"):
        return True
    return _ABOVE_THE_SIZE in why_it_failed(folder) and evopress(folder, *arguments, *stages)


def rows(sizes: list[str], seeds: list[int], further: list[str], *, strategy: str, at_once: int) -> Iterator[dict[str, Any]]:
    """Yield rows of every way, size and seed; those that cannot reach the size have a sentence instead of numbers."""
    search = f"search/strategy={strategy}"
    common = {seed: [search, "tracker=none", "evaluation.every=0", f"seed={seed}", *further] for seed in seeds}
    drop = ["+method=drop", f"sparsity={SHARE}", "baselines.names=[]", "stages=[database,search]"]
    first = [SingleRun(RUNS / strategy / f"drop-seed-{seed}", (*drop, *common[seed])) for seed in seeds]
    for run, well in evopress_all(first, at_once=at_once):
        print(f"{run.folder.name}: {'done' if well else why_it_failed(run.folder)}", flush=True)

    def one(asked: tuple[int, str, str]) -> list[dict[str, Any]]:
        seed, size, way = asked
        folder = RUNS / strategy / f"{folder_name(way)}-{size}-seed-{seed}"
        dropped = RUNS / strategy / f"drop-seed-{seed}"
        arguments = arguments_of(way, size, common[seed], dropped)
        row: dict[str, Any] = {"strategy": strategy, "size": size, "seed": seed, "way": way}
        if arguments is None:
            return [row | {"said": why_it_failed(dropped)}]
        if not has_run(folder, arguments):
            return [row | {"said": why_it_failed(folder)}]
        return [row | found for found in rows_of(folder)]

    with ThreadPoolExecutor(at_once) as pool:
        for found in pool.map(one, [(seed, size, way) for seed in seeds for size in sizes for way in WAYS]):
            yield from found


def rows_of(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield what a finished run says of dynamic programming's genome, where there is one, and of its own."""
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    for found in result["rows"]:
        if found["name"] in ("dp", "evopress"):
            yield {
                "row": found["name"],
                **{key: found[key] for key in ("bytes", "kl", "top1_agreement")},
                "bits": found["bits_per_weight"],
                "modules_dropped": found.get("modules_dropped", 0),
                "perplexity": next(iter(found["perplexity"].values())),
                "tokens": result["search"]["tokens"],
            }


@with_its_jobs()
def main() -> None:
    """Run what is missing and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--strategy", default="guided", choices=["guided", "evolution"])
    parser.add_argument("--jobs", type=int, default=1, help="at once")
    parser.add_argument("--results", type=file_to_write, default=FOLDER / "results.csv")
    parser.add_argument("further", nargs="*", help="overrides for every run, after --")
    asked = parser.parse_args()
    found: list[dict[str, Any]] = []
    for row in rows(asked.sizes, asked.seeds, asked.further, strategy=asked.strategy, at_once=asked.jobs):
        found.append(row)
        write_frame(asked.results, pd.DataFrame(found))
        print(row, flush=True)


if __name__ == "__main__":
    main()
