"""Allocations side by side at equal bits, on the same levels: held-out KL, perplexity, tokens and seconds, over budgets and seeds.

    python -m experiments.allocation.run                                        # all of it: many hours on 2 cores
    python -m experiments.allocation.run --jobs 12 -- threads=1 fitness.max_tokens_in_flight=32768      # on a GPU
    python -m experiments.allocation.run --recipes best --budgets 2.5 --seeds 0
    python -m experiments.allocation.run --baselines dp mine --searches         # one of an installed package, no search
    python -m experiments.allocation.run --draw                                 # table and figure, from results.csv

Runs lie in `multirun/allocation/` and are gone on with where they were cut off. One run has the baselines of all budgets, whose
numbers depend on none; a search has a run for each. `results.csv` keeps the rows of earlier calls. What follows `--` is given to
every run.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from evopress.reporting.drawing import COLOURS, STYLES, log_scale, new_figure, open_frame, save
from evopress.reporting.records import read_json
from evopress.reporting.tables import display_name
from experiments.guided.measure import KEYS, merged, read, table
from experiments.single_runs import SingleRun, evopress_all, folder_name, why_it_failed

FOLDER = Path(__file__).parent
RUNS = Path("multirun/allocation")
BASELINES = ("uniform", "dp", "first_order", "fisher", "linear_model", "one_at_a_time")
SEARCHES = ("evolution", "guided")
BUDGETS = (2.25, 2.5, 3, 3.5, 4)
METHOD = "quant"
_EXACT = 1e-3
"""Bits within which a uniform genome is one of a budget."""


def runs(
    recipes: Sequence[str],
    seeds: Sequence[int],
    budgets: Sequence[float],
    baselines: Sequence[str],
    searches: Sequence[str],
    further: Sequence[str],
) -> Iterator[SingleRun]:
    """Yield a run of all baselines per recipe of levels and seed, then one per search and budget."""

    def run(recipe: str, seed: int, name: str, at: str, *given: str, **labels: Any) -> SingleRun:
        common = [f"+method={METHOD}", f"method.recipe={recipe}", f"seed={seed}", "tracker=none", "evaluation.every=0"]
        folder = RUNS / folder_name("-".join((recipe, name, at, str(seed))))
        about = {"method": METHOD, "recipe": recipe, "seed": seed, **labels}
        return SingleRun(folder, (*common, *given, *further), about)

    points, names = ",".join(f"{budget:g}" for budget in budgets), ",".join(baselines)
    name = "baselines" if tuple(baselines) == BASELINES else names.replace(",", "_")
    for recipe in recipes if baselines else ():
        for seed in seeds:
            stages = "stages=[database,baselines,evaluate]"
            given = (f"baselines.names=[{names}]", f"budgets=[{points}]", stages)
            yield run(recipe, seed, name, points.replace(",", "_"), *given)
    for recipe in recipes:
        for seed in seeds:
            for budget in budgets:
                for name in searches:
                    given = (f"search/strategy={name}", f"bits={budget:g}", "baselines.names=[]")
                    stages = "stages=[database,search,evaluate]"
                    yield run(recipe, seed, name, f"{budget:g}", *given, stages, target=budget, row=name)


def ends(run: SingleRun, budgets: Sequence[float], result: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a line of `results.csv` per allocation that a finished run measured; of uniform ones those that spend a budget."""
    for row in result["rows"]:
        name, _, at = row["name"].partition("@")
        bits = row["bits_per_weight"]
        if name.startswith("uniform_"):
            name, at = "uniform", next((f"{budget:g}" for budget in budgets if abs(bits - budget) < _EXACT), "")
        if name == "dense" or (not at and "row" not in run.labels):
            continue
        labels = {"row": name, **({"target": float(at)} if at else {}), **run.labels}
        yield {
            **{key: labels[key] for key in KEYS},
            "bits": bits,
            "bytes": row["bytes"],
            "held_out_kl": row["kl"],
            "perplexity": next(iter(row["perplexity"].values())),
            "top1_agreement": row["top1_agreement"],
            "tokens": row.get("tokens_spent", 0),
            "seconds": row.get("seconds_spent", 0),
        }


def draw(results: pd.DataFrame, folder: Path) -> list[Path]:
    """Draw held-out KL against the budget, a panel per recipe of levels, a line per allocation: means over seeds."""
    recipes, names = sorted(results.recipe.unique()), list(dict.fromkeys(results.row))
    figure = new_figure(4.2 * len(recipes) + 0.4, 4.2)
    lines = {}
    for panel, recipe in zip(figure.subplots(1, len(recipes), squeeze=False)[0], recipes, strict=True):
        for look, name in enumerate(names):
            kl = results[(results.recipe == recipe) & (results.row == name)].groupby("target").held_out_kl.mean()
            style = {
                "color": COLOURS[look % len(COLOURS)],
                "linestyle": STYLES[look % len(STYLES)],
                "marker": "o",
                "ms": 3,
                "lw": 1.2,
            }
            (lines[display_name(name)],) = panel.plot(kl.index, kl, **style)
        panel.set(title=f"{recipe} levels", xlabel="bits per weight")
        log_scale(panel)
        open_frame(panel)
    figure.supylabel("held-out KL, mean over seeds", fontsize=10)
    figure.legend(lines.values(), lines.keys(), frameon=False, fontsize=9, ncols=4, loc="outside upper center")
    return save(figure, folder, "allocation")


def main() -> None:
    """Run what is missing, write what was found, and draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=["best", "paper"])
    parser.add_argument("--budgets", nargs="+", type=float, default=list(BUDGETS), help="bits per weight")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--baselines", nargs="*", default=list(BASELINES))
    parser.add_argument("--searches", nargs="*", default=list(SEARCHES), help="search strategies")
    parser.add_argument("--jobs", type=int, default=1, help="at once")
    parser.add_argument("--results", type=Path, default=FOLDER / "results.csv", help="the figure goes beside it")
    parser.add_argument("--draw", action="store_true", help="draw results.csv, run nothing")
    parser.add_argument("further", nargs="*", help="overrides for every run, after --")
    asked = parser.parse_args()
    if not asked.draw:
        all_runs = runs(asked.recipes, asked.seeds, asked.budgets, asked.baselines, asked.searches, asked.further)
        for run, well in evopress_all(list(all_runs), at_once=asked.jobs):
            if not well:
                print(f"{run.folder.name}: {why_it_failed(run.folder)}", flush=True)
                continue
            merged(asked.results, list(ends(run, asked.budgets, read_json(run.folder / "result.json"))))
            print(f"{run.folder.name}: done", flush=True)
    results = read(asked.results)
    print(table(results).to_string(index=False, float_format="%.4g"))
    for file in draw(results, asked.results.parent):
        print(file)


if __name__ == "__main__":
    main()
