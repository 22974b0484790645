"""The guided search against evolution on the same levels: held-out KL, perplexity and tokens, over budgets, levels and seeds.

    python -m experiments.guided.measure                                # quant, all rows, three seeds: hours on 2 cores
    python -m experiments.guided.measure --jobs 12                      # on a GPU: minutes
    python -m experiments.guided.measure --method sparsity --targets 0.7
    python -m experiments.guided.measure --rows guided --targets 2.5 --seeds 0 -- threads=1
    python -m experiments.guided.measure --draw                         # the figures, from curves.csv

Runs lie in `multirun/guided/` and are gone on with where they were cut off. `results.csv` has how each ended, `curves.csv` the
held-out KL after every generation and round; both keep the rows of earlier calls. What follows `--` is given to every run; where
another seed of theirs has finished without it they are refused.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from evopress.errors import EvoPressError
from evopress.reporting.curve import held_out_curve
from evopress.reporting.drawing import COLOURS, STYLES, log_scale, new_figure, open_frame, save, search_styles, show_tokens
from evopress.reporting.records import read_json, read_records
from experiments.frames import write_frame
from experiments.scripts import file_to_write, with_its_jobs
from experiments.single_runs import Jobs, SingleRun, folder_name, refuse_others

FOLDER = Path(__file__).parent
RUNS = Path("multirun/guided")
KEYS = ["method", "recipe", "target", "row", "seed"]
AFTER = "search.strategy.generations_after=9"
SECOND_ORDER = "search.strategy.second_order_rounds=3"
TWICE = "search.strategy.second_order_tokens=16384"
GUIDED = "search/strategy=guided"
EVOLUTION = "search/strategy=evolution"
FROM_DP = "search.starts=[dp]"
NO_SEARCH = ("stages=[database,baselines,evaluate]",)
ROWS: dict[str, dict[str, list[str]]] = {
    "quant": {
        "baselines": ["baselines.names=[uniform,dp]", *NO_SEARCH],
        "evolution": [EVOLUTION],
        "evolution from dp": [EVOLUTION, FROM_DP, "search.exchange=any"],
        "guided": [GUIDED, FROM_DP],
        "guided, then evolution": [GUIDED, FROM_DP, AFTER, "search.exchange=any"],
        "guided, then second order": [GUIDED, FROM_DP, SECOND_ORDER],
        "guided, then second order on twice the text": [GUIDED, FROM_DP, SECOND_ORDER, TWICE],
    },
    "sparsity": {
        "baselines": ["baselines.names=[uniform,dp]", *NO_SEARCH],
        "evolution": [EVOLUTION],
        "evolution from dp": [EVOLUTION, FROM_DP],
        "guided": [GUIDED],
        "guided from dp": [GUIDED, FROM_DP],
        "guided, then evolution": [GUIDED, AFTER],
        "guided, then second order": [GUIDED, SECOND_ORDER],
        "guided, then second order on twice the text": [GUIDED, SECOND_ORDER, TWICE],
    },
    "drop": {
        "baselines": ["baselines.names=[shortgpt,sliding_window,shortened_llama]", *NO_SEARCH],
        "evolution": [EVOLUTION],
        "guided": [GUIDED],
        "guided, then evolution": [GUIDED, AFTER],
        "guided, 7 steps, then deltas": [
            GUIDED,
            "search.strategy.approach=7",
            "search.strategy.delta_rounds=4",
            "search.strategy.delta_tokens=1024",
        ],
        "measured way, then evolution": [
            GUIDED,
            "search.strategy.approach=3",
            "search.strategy.approach_tokens=512",
            "search.strategy.rounds=0",
        ],
    },
}
"""By method: a row to the overrides that make it. Baselines have a row each, and are the same for every seed."""
AS_LONG = {("measured way, then evolution", at): n for at, n in ((0.125, 14), (0.25, 38), (0.375, 52), (0.5, 57))}
"""Generations of evolution after the way, by row and target, with which the search spends what evolution does."""
TARGETS: dict[str, tuple[float, ...]] = {
    "quant": (2.25, 2.5, 3, 3.5),
    "sparsity": (0.5, 0.6, 0.7),
    "drop": (0.125, 0.25, 0.375, 0.5),
}
_UNITS = {"quant": " bits", "sparsity": " sparse", "drop": " dropped"}
_TARGET = {"quant": "bits", "sparsity": "sparsity", "drop": "sparsity"}


def runs(
    method: str,
    recipes: Sequence[str],
    names: Sequence[str],
    targets: Sequence[float],
    seeds: Sequence[int],
    further: Sequence[str],
) -> Iterator[SingleRun]:
    """Yield a run per recipe of levels, target, row and seed."""
    common = [f"+method={method}", "tracker=none", "baselines.names=[]", "stages=[database,search,evaluate]", "evaluation.every=1"]
    for recipe in recipes:
        levels = [f"method.recipe={recipe}"] if recipe else []
        for seed in seeds:
            for target in targets:
                for name in names:
                    if name == "baselines" and seed != seeds[0]:
                        continue
                    labels = dict(zip(KEYS, (method, recipe, target, name, seed), strict=True))
                    folder = folder_of(labels)
                    given = [*common, *levels, f"{_TARGET[method]}={target:g}", f"seed={seed}", *ROWS[method][name], *further]
                    if (name, target) in AS_LONG:
                        given.append(f"search.strategy.generations_after={AS_LONG[name, target]}")
                    yield SingleRun(folder, tuple(given), labels)


def folder_of(labels: Mapping[str, Any], root: Path = RUNS) -> Path:
    """Return the folder of the run that has these labels, one for each of `KEYS`."""
    parts = [f"{labels[key]:g}" if key == "target" else str(labels[key]) for key in KEYS if labels[key] != ""]
    return root / folder_name("-".join(parts))


def ends(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield what a finished run says of its genome, or of each of its baselines: the measures, and what the search cost."""
    result = read_json(folder / "result.json")
    search = result.get("search", {})
    for row in result["rows"]:
        if row["name"] != "dense":
            yield {
                **({} if row["name"] == "evopress" else {"row": row["name"]}),
                "bits": row.get("bits_per_weight"),
                "bytes": row.get("bytes"),
                "held_out_kl": row["kl"],
                "perplexity": next(iter(row["perplexity"].values())),
                "top1_agreement": row["top1_agreement"],
                "tokens": search.get("tokens", 0),
                "generations": search.get("generations", 0),
                "seconds": search.get("seconds", 0),
            }


def curve(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the held-out KL after every generation or round of a run, and the tokens spent until then."""
    if not (folder / "metrics.jsonl").exists():
        return
    rows = read_json(folder / "result.json")["rows"]
    for record in held_out_curve(list(read_records(folder / "metrics.jsonl")), rows).records:
        if record.get("held_out"):
            yield {"generation": record["generation"], "tokens": record["tokens"], "held_out_kl": record["held_out"]["kl"]}


def table(results: pd.DataFrame) -> pd.DataFrame:
    """Return the mean over seeds and the range of each row's held-out KL, and its tokens, by method, recipe, target and row."""
    by = results.groupby(KEYS[:4], dropna=False, sort=False)
    kl = by.held_out_kl
    found = pd.DataFrame({"KL": kl.mean(), "least": kl.min(), "most": kl.max(), "perplexity": by.perplexity.mean()})
    return found.assign(tokens=by.tokens.mean().round().astype(int), seeds=kl.count()).reset_index()


def draw(curves: pd.DataFrame, folder: Path) -> list[Path]:
    """Draw held-out KL against tokens, a row of panels per recipe, a panel per target, a curve per seed: one picture per method.

    Guided is above the rows that begin with its rounds, which go on where it ends.
    """
    files = []
    for method, of_method in curves.groupby("method"):
        unit, recipes = _UNITS[str(method)], sorted(of_method.recipe.unique())
        targets, names = sorted(of_method.target.unique()), list(dict.fromkeys(of_method.row))
        looks = search_styles(names)
        figure = new_figure(min(3.1 * len(targets), 12.4) + 0.4, 2.6 * len(recipes) + 0.5)
        panels, lines = figure.subplots(len(recipes), len(targets), squeeze=False), {}
        for row, recipe in zip(panels, recipes, strict=True):
            for panel, target in zip(row, targets, strict=True):
                here = of_method[(of_method.target == target) & (of_method.recipe == recipe)]
                if here.empty:
                    panel.set_axis_off()
                    continue
                for (name, _), points in here.groupby(["row", "seed"], sort=False):
                    above = {"lw": 1.7, "zorder": 3} if name == "guided" else {"lw": 1.2, "zorder": 2}
                    style = {"color": COLOURS[looks[name]], "linestyle": STYLES[looks[name]], **above}
                    (lines[name],) = panel.plot(points.tokens, points.held_out_kl, **style)
                panel.set(title=f"{target:g}{unit}{f', {recipe} levels' if recipe else ''}")
                panel.xaxis.set_major_formatter(show_tokens)
                log_scale(panel)
                open_frame(panel)
        figure.supylabel("held-out KL, a line per seed", fontsize=10)
        figure.supxlabel("tokens; one forward and backward counts as three", fontsize=10)
        figure.legend(lines.values(), lines.keys(), frameon=False, fontsize=9, ncols=len(lines), loc="outside upper center")
        files += save(figure, folder, f"curves-{method}")
    return files


def read(path: Path) -> pd.DataFrame:
    """Return the rows of a CSV that was written here.

    Raises: EvoPressError if there is none.
    """
    if not path.is_file():
        raise EvoPressError(f"{path} is not there: no run has ended well yet")
    return pd.read_csv(path).assign(recipe=lambda rows: rows.recipe.astype(object).fillna(""))


def merged(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows to a CSV, in place of those that it has of the same runs."""
    if not rows:
        return
    new = pd.DataFrame(rows)
    if path.exists():
        old, seen = read(path), set(new[KEYS].itertuples(index=False, name=None))
        new = pd.concat([old[[key not in seen for key in old[KEYS].itertuples(index=False, name=None)]], new])
    write_frame(path, new.sort_values(KEYS, kind="stable"))


def with_seeds_alike(asked: argparse.Namespace, runs: Callable[[Sequence[int]], Iterable[SingleRun]]) -> list[SingleRun]:
    """Return the runs of the seeds that a command line asks for.

    Raises: EvoPressError if one of them, or of another seed that is in the results, has finished with other settings.
    """
    there = list(read(asked.results).seed) if asked.results.is_file() else []
    for run in runs(list(dict.fromkeys((*asked.seeds, *there)))):
        refuse_others(run.folder, run.arguments)
    return list(runs(asked.seeds))


def asked_for(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read a command line (default: this process's)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="quant", choices=list(ROWS))
    parser.add_argument("--recipes", nargs="+", default=None, help="paper, best, or both (default); method drop has none")
    parser.add_argument("--rows", nargs="+", default=None)
    parser.add_argument("--targets", nargs="+", type=float, default=None)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="at once")
    parser.add_argument("--results", type=file_to_write, default=FOLDER / "results.csv", help="curves.csv goes beside it")
    parser.add_argument("--draw", action="store_true", help="draw curves.csv, run nothing")
    parser.add_argument("further", nargs="*", help="overrides for every run, after --")
    asked = parser.parse_args(words)
    if unknown := [name for name in asked.rows or () if name not in ROWS[asked.method]]:
        parser.error(f"--rows {unknown[0]!r} is unknown for method {asked.method}: choose among {', '.join(ROWS[asked.method])}")
    return asked


def asked_runs(asked: argparse.Namespace) -> list[SingleRun]:
    """Return the runs that a command line asks for; raise EvoPressError as `with_seeds_alike`."""
    names, targets = asked.rows or list(ROWS[asked.method]), asked.targets or TARGETS[asked.method]
    recipes = [""] if asked.method == "drop" else asked.recipes or ["best", "paper"]
    return with_seeds_alike(asked, lambda seeds: runs(asked.method, recipes, names, targets, seeds, asked.further))


@with_its_jobs()
def main() -> None:
    """Run what is missing, write what was found, and draw it."""
    asked = asked_for()
    curves_at = asked.results.with_name("curves.csv")
    jobs = Jobs([] if asked.draw else asked_runs(asked), at_once=asked.jobs)
    found: list[dict[str, Any]] = []
    points: list[dict[str, Any]] = []
    for run in jobs:
        found += [{**run.labels, **end} for end in ends(run.folder)]
        points += [{**run.labels, **point} for point in curve(run.folder)]
        print(found[-1], flush=True)
        merged(asked.results, found)
        merged(curves_at, points)
    if not asked.draw and asked.results.exists():
        print(table(read(asked.results)).to_string(index=False, float_format="%.3f"))
    for file in draw(read(curves_at), curves_at.parent):
        print(file)
    jobs.check()


if __name__ == "__main__":
    main()
