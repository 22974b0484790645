"""One size, three ways to reach it: bit widths alone, modules first and bit widths then, or both in one space.

    python -m experiments.joint.run                                     # three sizes, three seeds: hours on 2 cores
    python -m experiments.joint.run --sizes 50MB --seeds 0 --generations 12 --threads 1

All searches evaluate the same number of candidate tokens and start from dynamic programming's genome where it is within the size.
Runs lie in `multirun/joint/`, are gone on with where they were cut off, and `results.csv` is written anew after each.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

FOLDER = Path(__file__).parent
RUNS = Path("multirun/joint")
SIZES = ("40MB", "50MB", "60MB")
LEVELS = "method.levels=[dense,8,6,5,4,3,2]"
WAYS = ("quant", "drop, then quant", "joint")
SHARE = 0.125
"""Of the blocks whose attention and whose MLP are dropped before bit widths are searched."""


def evopress(folder: Path, *arguments: str) -> bool:
    """Run, or go on with, one job; tell whether it ended well. What it says goes to a file beside its folder."""
    if (folder / "finished.json").exists():
        return True
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "evopress", *arguments, f"hydra.run.dir={folder}"]
    with folder.with_name(f"{folder.name}.log").open("a", encoding="utf-8") as log:
        return subprocess.run(command, stdout=log, stderr=log, check=False).returncode == 0


def dropped_by(folder: Path) -> tuple[list[str], list[str]]:
    """Return the names of the modules that a run of method drop has dropped, and of those that it has kept."""
    units = json.loads((folder / "genome.json").read_text(encoding="utf-8"))["units"]
    names: dict[str, list[str]] = {"drop": [], "keep": []}
    for unit in units:
        names[unit["label"]].append(unit["name"])
    return names["drop"], names["keep"]


def arguments_of(way: str, size: str, common: list[str], seed: int) -> list[str] | None:
    """Return what a way is on the command line; None if what it needs failed."""
    if way == "quant":
        return ["+method=quant", LEVELS, "method.include=[blocks,head,embedding]", "search.exchange=fit", f"size={size}", *common]
    joint = ["+method=joint", LEVELS, f"size={size}", *common]
    if way == "joint":
        return joint
    found = RUNS / f"drop-seed-{seed}"
    depth = ["+method=drop", f"sparsity={SHARE}", "stages=[database,search]", *(c for c in common if "starts" not in c)]
    if not evopress(found, *depth):
        return None
    dropped, kept = dropped_by(found)
    return [*joint, f"method.dropped=[{','.join(dropped)}]", f"method.exclude=[{','.join(kept)}]"]


def rows(sizes: list[str], seeds: list[int], generations: int | None, threads: int | None) -> Iterator[dict[str, Any]]:
    """Yield a row per way, size and seed, those that cannot reach the size with a sentence instead of numbers."""
    common = ["tracker=none", "evaluation.every=0", "baselines.names=[dp]", "stages=[database,baselines,search,evaluate]"]
    common += [f"search.generations={generations}"] if generations else []
    common += [f"threads={threads}"] if threads else []
    for seed in seeds:
        for size in sizes:
            for way in WAYS:
                folder = RUNS / f"{way.replace(', ', '-').replace(' ', '-')}-{size}-seed-{seed}"
                arguments = arguments_of(way, size, [*common, f"seed={seed}"], seed)
                row: dict[str, Any] = {"size": size, "seed": seed, "way": way}
                done = arguments is not None and (
                    evopress(folder, *arguments, "search.starts=[dp]") or evopress(folder, *arguments)  # dp may be above the size
                )
                if not done:
                    log = folder.with_name(f"{folder.name}.log")
                    said = log.read_text(encoding="utf-8").strip().splitlines()[-1] if log.exists() else ""
                    yield row | {"said": said.removeprefix("error: ")}
                    continue
                result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
                for found in result["rows"]:
                    if found["name"] in ("dp", "evopress"):
                        of = {key: found[key] for key in ("bytes", "kl", "top1_agreement")}
                        of |= {"bits": found["bits_per_weight"], "modules_dropped": found.get("modules_dropped", 0)}
                        of |= {"perplexity": next(iter(found["perplexity"].values()))}
                        yield row | {"row": found["name"], **of, "tokens": result["search"]["tokens"]}


def main() -> None:
    """Run what is missing and write `results.csv`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--generations", type=int, help="as the scale says where it is not given")
    parser.add_argument("--threads", type=int)
    asked = parser.parse_args()
    found: list[dict[str, Any]] = []
    for row in rows(asked.sizes, asked.seeds, asked.generations, asked.threads):
        found.append(row)
        pd.DataFrame(found).to_csv(FOLDER / "results.csv", index=False, float_format="%.6g")
        print(row, flush=True)


if __name__ == "__main__":
    main()
