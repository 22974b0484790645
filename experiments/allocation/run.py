"""Allocations side by side at equal budgets, on the same levels: held-out KL, perplexity, tokens and seconds, over seeds.

    python -m experiments.allocation.run                                        # quant, all of it: many hours on 2 cores
    python -m experiments.allocation.run --jobs 12 -- threads=1 fitness.max_tokens_in_flight=32768      # on a GPU
    python -m experiments.allocation.run --method sparsity                      # drop: modules, whose levels have no recipe
    python -m experiments.allocation.run --recipes best --budgets 2.5 --seeds 0
    python -m experiments.allocation.run --baselines dp mine --searches         # one of an installed package, no search
    python -m experiments.allocation.run --baselines --searches --genomes autoscheme=FOLDER     # FOLDER/2.5.txt and so on
    python -m experiments.allocation.run --draw                                 # table and figure, from results.csv

Runs lie in `multirun/allocation/` and are gone on with where they were cut off. Where all budgets have the same levels, one run
has the baselines of all; a search has a run for each. `results.csv` keeps the rows of earlier calls. What follows `--` is given
to every run; where another seed of theirs has finished without it they are refused.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd

from evopress.reporting.drawing import COLOURS, MARKERS, STYLES, new_figure, open_frame, save
from evopress.reporting.records import read_json
from evopress.reporting.tables import display_name
from experiments.guided.measure import KEYS, merged, read, table, with_seeds_alike
from experiments.scripts import existing, file_to_write, with_its_jobs
from experiments.single_runs import Jobs, SingleRun, folder_name

FOLDER = Path(__file__).parent
RUNS = Path("multirun/allocation")
SEARCHES = ("evolution", "guided")


@dataclass(frozen=True)
class Compared:
    """What is compared of a method."""

    target: str
    """The setting that a budget is."""
    shown: str
    budgets: tuple[float, ...]
    baselines: tuple[str, ...]
    recipes: tuple[str, ...] = ("best", "paper")
    together: bool = False
    """Whether levels are the same for all budgets, so that one run has the baselines of all."""


METHODS = {
    "quant": Compared(
        "bits",
        "bits per weight",
        (2.25, 2.5, 3, 3.5, 4),
        ("uniform", "dp", "first_order", "fisher", "linear_model", "one_at_a_time"),
        together=True,
    ),
    "sparsity": Compared(
        "sparsity",
        "sparsity",
        (0.5, 0.6, 0.7),
        ("uniform", "dp", "owl", "atp", "alphapruning", "fisher", "linear_model"),
    ),
    "drop": Compared(
        "sparsity",
        "share of modules dropped",
        (0.125, 0.25, 0.375, 0.5),
        ("shortgpt", "shortened_llama", "interactions"),
        recipes=("",),
        together=True,
    ),
}
_IN_ALL = ("guided", "evolution", "dp", "uniform", "fisher")
"""Rows that look alike in all panels."""
_EXACT = 1e-3
"""Bits within which a uniform genome is one of a budget."""


def runs(
    method: str,
    recipes: Sequence[str],
    seeds: Sequence[int],
    budgets: Sequence[float],
    baselines: Sequence[str],
    searches: Sequence[str],
    further: Sequence[str],
    genomes: Mapping[str, Path] | None = None,
) -> Iterator[SingleRun]:
    """Yield the runs of baselines per recipe of levels and seed, then one per search and budget.

    Args: genomes: row to a folder with a genome for each budget, which are measured as they are.
    """
    compared = METHODS[method]

    def run(recipe: str, seed: int, name: str, at: str, *given: str, **labels: Any) -> SingleRun:
        common = [f"+method={method}", f"seed={seed}", "tracker=none", "evaluation.every=0"]
        common += [f"method.recipe={recipe}"] if recipe else []
        where = RUNS / folder_name("-".join(filter(None, (method, recipe, name, at, str(seed)))))
        return SingleRun(where, (*common, *given, *further), {"method": method, "recipe": recipe, "seed": seed, **labels})

    points, names = [f"{budget:g}" for budget in budgets], ",".join(baselines)
    called = "baselines" if tuple(baselines) == compared.baselines else "_".join(baselines)
    chosen = (f"baselines.names=[{names}]", "stages=[database,baselines,evaluate]")
    for recipe in recipes if baselines else ():
        for seed in seeds:
            if compared.together:
                yield run(recipe, seed, called, "_".join(points), *chosen, f"budgets=[{','.join(points)}]")
                continue
            for budget, at in zip(budgets, points, strict=True):
                yield run(recipe, seed, called, at, *chosen, f"{compared.target}={at}", target=budget)
    for recipe in recipes:
        for seed in seeds:
            for budget, at in zip(budgets, points, strict=True):
                for name in searches:
                    given = (f"search/strategy={name}", f"{compared.target}={at}", "baselines.names=[]")
                    yield run(recipe, seed, name, at, *given, "stages=[database,search,evaluate]", target=budget, row=name)
                for name, folder in (genomes or {}).items():
                    given = (f"genome={folder.resolve() / f'{at}.txt'}", f"{compared.target}={at}", "baselines.names=[]")
                    yield run(recipe, seed, name, at, *given, "stages=[database,evaluate]", target=budget, row=name)


def ends(run: SingleRun, budgets: Sequence[float], result: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a line of `results.csv` per allocation that a finished run measured; of uniform ones those that spend a budget."""
    for row in result["rows"]:
        name, _, at = row["name"].partition("@")
        bits = row.get("bits_per_weight")
        if name.startswith("uniform_"):
            name, at = "uniform", next((f"{budget:g}" for budget in budgets if abs(bits - budget) < _EXACT), "")
        if name == "dense" or not (at or "target" in run.labels):
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


def over_lowest(here: pd.DataFrame, on_their_build: pd.DataFrame) -> pd.DataFrame:
    """Return rows of a method and recipe with their held-out KL over the lowest mean at the budget, in a column `ratio`.

    Args: on_their_build: rows of guided on the build of the levels that allocators have; they are compared with these, where there
        are any.
    """
    lowest = here.groupby(["target", "row"]).held_out_kl.mean().groupby("target").min()
    theirs = on_their_build.groupby("target").held_out_kl.mean().reindex(lowest.index).fillna(lowest)
    searched = here.row.str.contains("|".join(SEARCHES))
    return here.assign(ratio=here.held_out_kl / here.target.map(lowest).where(searched, here.target.map(theirs)))


def draw(results: pd.DataFrame, on_their_build: pd.DataFrame, folder: Path) -> list[Path]:
    """Draw held-out KL against the budget, over the lowest there: a panel per method and recipe of levels.

    Means over seeds, with a line from the least to the greatest; a hollow mark is one seed.
    """
    panels = [key for key, _ in results.groupby(["method", "recipe"], sort=False)]
    across = min(len(panels), 2)
    figure = new_figure(6.6 * across, 4.0 * -(-len(panels) // across))
    axes = figure.subplots(-(-len(panels) // across), across, squeeze=False).flat
    for (method, recipe), axis in zip(panels, axes, strict=False):
        here, theirs = (of[(of.method == method) & (of.recipe == recipe)] for of in (results, on_their_build))
        by = over_lowest(here, theirs).groupby(["row", "target"]).ratio
        least, ratios, most, seeds = (found.unstack("target") for found in (by.min(), by.mean(), by.max(), by.count()))
        worst_first = ratios.loc[ratios.mean(axis=1).sort_values(ascending=False).index]
        looks = {name: place % len(COLOURS) for place, name in enumerate(dict.fromkeys((*_IN_ALL, *worst_first.index)))}
        for name in map(str, worst_first.index):
            ratio, look = worst_first.loc[name], looks[name]
            line = STYLES[look // (len(COLOURS) // 2)]  # colours come twice
            style = {
                "color": COLOURS[look],
                "linestyle": line,
                "marker": MARKERS[look],
                "ms": 4,
                "lw": 1.4,
            }
            there = ratio.dropna()
            axis.plot(there.index, there, label=display_name(name), **style)
            axis.vlines(there.index, least.loc[name][there.index], most.loc[name][there.index], color=COLOURS[look], lw=1)
            single = ratios.where(seeds == 1).loc[name]
            axis.plot(single.index, single, **style | {"linestyle": "", "markerfacecolor": "white"})
        axis.set(title=f"{method}{f', {recipe} levels' if recipe else ''}", xlabel=METHODS[str(method)].shown)
        axis.set_xticks(sorted(set(here.target)))
        open_frame(axis)
        axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    for axis in axes:  # of no panel
        axis.set_axis_off()
    figure.supylabel("held-out KL over the lowest at that budget: mean and range of seeds, hollow: one seed", fontsize=10)
    return save(figure, folder, "allocation")


def asked_for(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read a command line (default: this process's)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="quant", choices=list(METHODS))
    parser.add_argument("--recipes", nargs="+", default=None, help="best, paper, or both (default); method drop has none")
    parser.add_argument("--budgets", nargs="+", type=float, default=None, help="bits per weight, or sparsities")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--baselines", nargs="*", default=None)
    parser.add_argument("--searches", nargs="*", default=list(SEARCHES), help="search strategies")
    parser.add_argument("--genomes", nargs="*", default=[], metavar="ROW=FOLDER", help="of another tool: BUDGET.txt in a folder")
    parser.add_argument("--jobs", type=int, default=1, help="at once")
    parser.add_argument("--results", type=file_to_write, default=FOLDER / "results.csv", help="the figure goes beside it")
    parser.add_argument("--draw", action="store_true", help="draw results.csv, run nothing")
    parser.add_argument("further", nargs="*", help="overrides for every run, after --")
    asked = parser.parse_args(words)
    asked.budgets = asked.budgets or METHODS[asked.method].budgets
    return asked


def asked_runs(asked: argparse.Namespace) -> list[SingleRun]:
    """Return the runs that a command line asks for.

    Raises: EvoPressError as `with_seeds_alike`, or if a genome of another tool is not there.
    """
    compared = METHODS[asked.method]
    baselines, recipes = compared.baselines if asked.baselines is None else asked.baselines, asked.recipes or compared.recipes
    genomes = {row: Path(folder) for row, _, folder in (each.partition("=") for each in asked.genomes)}
    for folder, budget in product(genomes.values(), asked.budgets):
        existing(folder / f"{budget:g}.txt")
    return with_seeds_alike(
        asked,
        lambda seeds: runs(asked.method, recipes, seeds, asked.budgets, baselines, asked.searches, asked.further, genomes),
    )


@with_its_jobs()
def main() -> None:
    """Run what is missing, write what was found, and draw it."""
    asked = asked_for()
    jobs = Jobs([] if asked.draw else asked_runs(asked), at_once=asked.jobs)
    for run in jobs:
        merged(asked.results, list(ends(run, asked.budgets, read_json(run.folder / "result.json"))))
    results = read(asked.results)
    print(table(results).to_string(index=False, float_format="%.4g"))
    their_build = FOLDER / "one_build.csv"  # measured by hand: one seed of guided per budget of sparsity
    for file in draw(results, read(their_build), asked.results.parent):
        print(file)
    jobs.check()


if __name__ == "__main__":
    main()
