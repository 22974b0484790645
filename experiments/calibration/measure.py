"""Does the text that depth pruning looks at matter more than what searches? Texts, searches and seeds side by side.

    python -m experiments.calibration.measure                                # 48 runs: a day on 2 cores
    python -m experiments.calibration.measure --jobs 20 -- fitness.max_tokens_in_flight=32768        # on a GPU: minutes
    python -m experiments.calibration.measure --targets 0.125 --texts docs code --seeds 0 -- threads=1
    python -m experiments.calibration.measure --draw                         # the table, from results.csv

A run scores blocks and searches on one text, and what it finds is measured on the held-out part of every kind. A seed has a part
of its kind's text to itself. Runs lie in `multirun/calibration/` and are gone on with where they were cut off; `results.csv`
keeps the rows of earlier calls. What follows `--` is given to every run.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from evopress.errors import EvoPressError
from evopress.reporting.differences import Difference
from evopress.reporting.records import read_json
from evopress.reporting.tables import display_name, significant
from experiments.calibration.texts import HELD_OUT, KINDS, TEXTS, write_texts
from experiments.guided.measure import KEYS, merged, read, with_seeds_alike
from experiments.scripts import file_to_write, with_its_jobs
from experiments.single_runs import Jobs, SingleRun
from experiments.tables import markdown, write_table

FOLDER = Path(__file__).parent
RUNS = Path("multirun/calibration")
TARGETS = (0.125, 0.25, 0.375, 0.5)
ONE_PASS = ("shortgpt", "sliding_window", "weight_subcloning", "shortened_llama", "shortened_llama_kl")
SEARCHED = "evopress"
TOKENS, HELD_OUT_TOKENS = 10_240, 8_192
"""Of a text that blocks are scored on, and as many that the search draws from; of each held-out text."""
OWN = "text"
"""What a run calls its own held-out text, here that of the first kind."""
Cells = dict[tuple[str, str], dict[str, float]]
"""Row and text to a number at each seed."""


def runs(
    texts: Sequence[str], targets: Sequence[float], seeds: Sequence[int], folder: Path, further: Sequence[str]
) -> Iterator[SingleRun]:
    """Yield a run per text, target and seed.

    Args: folder: of the files of `write_texts`.
    """
    folder = folder.resolve()
    first, *others = HELD_OUT
    amounts = {"calibration": TOKENS, "search": TOKENS, "evaluation": HELD_OUT_TOKENS}
    common = ["+method=drop", "data=text", "tracker=none", "evaluation.every=0", f"baselines.importance_tokens={TOKENS}"]
    common += [f"baselines.names=[{','.join(ONE_PASS)}]", "stages=[database,baselines,search,evaluate]"]
    common += [f"data.evaluation=[{folder / f'{first}-held-out.jsonl'}]"]
    common += [f"++evaluation.files.{kind}={folder / f'{kind}-held-out.jsonl'}" for kind in others]
    common += [f"data.{split}_tokens={count}" for split, count in amounts.items()]
    for target, text, seed in itertools.product(targets, texts, seeds):
        looked_at = [f"data.{split}=[{folder / f'{text}-{seed}.jsonl'}]" for split in ("calibration", "search")]
        labels = dict(zip(KEYS, ("drop", text, target, "", seed), strict=True))
        given = (*common, *looked_at, f"sparsity={target:g}", f"seed={seed}", *further)
        yield SingleRun(RUNS / f"{text}-{target:g}-{seed}", given, labels)


def ends(run: SingleRun) -> Iterator[dict[str, Any]]:
    """Yield a line of `results.csv` for each genome of a finished run: its KL and perplexity on every text, and what it drops."""
    result, levels = read_json(run.folder / "result.json"), read_json(run.folder / "baselines.json")["genomes"]
    levels[SEARCHED] = [unit["level"] for unit in read_json(run.folder / "genome.json")["units"]]
    for row in result["rows"]:
        if (name := row["name"]) == "dense":
            continue
        named = {HELD_OUT[0] if kind == OWN else kind: kind for kind in row["perplexity"]}
        yield {
            **run.labels,
            "row": name,
            **{f"kl_{kind}": row["kl_by_data_set"][called] for kind, called in named.items()},
            **{f"perplexity_{kind}": row["perplexity"][called] for kind, called in named.items()},
            "tokens": row.get("tokens_spent", 0),
            "seconds": row.get("seconds_spent", 0),
            "dropped": " ".join(str(i) for i, level in enumerate(levels[name]) if level),
        }


def shares(values: np.ndarray[Any, Any]) -> dict[str, float]:
    """Return what texts, methods, the two together and the rest (samples and seeds) have of a number's sum of squares.

    Args: values: float [T, M, S] of T texts, M methods and S seeds.
    """
    cell, mean = values.mean(2), values.mean()
    text, method = cell.mean(1) - mean, cell.mean(0) - mean
    both = cell - mean - text[:, None] - method[None, :]
    total, size = ((values - mean) ** 2).sum(), values.shape
    squares = {
        "text": size[1] * size[2] * (text**2).sum(),
        "method": size[0] * size[2] * (method**2).sum(),
        "both": size[2] * (both**2).sum(),
    }
    parts = {name: float(value / total) if total else math.nan for name, value in squares.items()}
    return {**parts, "seeds": 1 - sum(parts.values())}


def cells(results: pd.DataFrame, column: str) -> Cells:
    """Return a column at every seed, by row and text (which the CSV has as `recipe`)."""
    found: Cells = {}
    for row, text, seed, value in zip(results.row, results.recipe, results.seed, results[column], strict=True):
        found.setdefault((row, text), {})[str(seed)] = value
    return found


def mean(seeds: Mapping[str, float]) -> float:
    """Return the mean over seeds, NaN without any."""
    return statistics.fmean(seeds.values()) if seeds else math.nan


def compared(ours: Mapping[str, float], theirs: Mapping[str, float]) -> str:
    """Say by how much of theirs ours is lower or higher, and whether that is more than chance over seeds."""
    if not ours or not theirs:
        return ""
    change = mean(ours) / mean(theirs) - 1
    return f"{change:+.0%} ({Difference.of(ours, theirs).verdict(min)})"


def overlap(results: pd.DataFrame, over: str) -> float:
    """Return how much of what is dropped two genomes share, |A ∩ B| / |A ∪ B|: mean over pairs that differ in one column alone."""
    found = []
    for _, group in results.groupby([key for key in ("recipe", "row", "seed") if key != over]):
        sets = [frozenset(dropped.split()) for dropped in group.dropped]
        found += [len(a & b) / len(a | b) for a, b in itertools.combinations(sets, 2)]
    return statistics.fmean(found) if found else math.nan


def by_text(here: pd.DataFrame) -> str:
    """Lay out the KL divergence, mean over the held-out texts and seeds, of every method by what it looked at."""
    texts = list(dict.fromkeys(here.recipe))
    of = cells(here.assign(kl=here[[f"kl_{kind}" for kind in HELD_OUT]].mean(axis=1)), "kl")
    names = [name for name in (*ONE_PASS, SEARCHED) if any(row == name for row, _ in of)]
    body = [[display_name(name), *(significant(mean(of.get((name, text), {}))) for text in texts)] for name in names]
    return markdown(["method", *texts], body)


def question(results: pd.DataFrame) -> str:
    """Lay out what texts and what searches are worth on every held-out text, real texts alone, and random tokens beside them."""
    headers = ["dropped", "held-out", "text's share", "method's", "both's", "samples' and seeds'"]
    headers += ["one-pass, own text", "search, own text", "search over one-pass"]
    headers += ["search on the best other text", "search on random"]
    body = []
    for target, here in results.groupby("target"):
        for kind in HELD_OUT:
            of = cells(here, f"kl_{kind}")
            real = [text for text in dict.fromkeys(here.recipe) if text in HELD_OUT]
            rows, seeds = list(dict.fromkeys(here.row)), sorted({seed for each in of.values() for seed in each})
            whole = all(len(of.get((row, text), {})) == len(seeds) for row in rows for text in real)
            share = dict.fromkeys(("text", "method", "both", "seeds"), math.nan)
            if whole and len(real) > 1:
                share = shares(np.log([[[of[row, text][seed] for seed in seeds] for row in rows] for text in real]))
            search = {text: of.get((SEARCHED, text), {}) for text in (*real, "random")}
            one_pass = min((of[row, kind] for row in rows if row != SEARCHED and (row, kind) in of), key=mean, default={})
            own = search.get(kind, {})
            other = min((search[text] for text in real if text != kind and search[text]), key=mean, default={})
            told = [f"{100 * float(str(target)):g}%", kind, *("" if math.isnan(x) else f"{x:.0%}" for x in share.values())]
            told += [significant(mean(one_pass)) if one_pass else "", significant(mean(own)) if own else ""]
            body.append([*told, compared(own, one_pass), compared(other, own), compared(search["random"], own)])
    return markdown(headers, body)


def patterns(results: pd.DataFrame) -> str:
    """Lay out how much of what is dropped is the same on another text, by another method, at another seed."""
    real = results[results.recipe.isin(HELD_OUT)]
    body = []
    for target, here in real.groupby("target"):
        searched, count = here[here.row == SEARCHED], len(here.dropped.iloc[0].split())
        same = [overlap(searched, "recipe"), overlap(here[here.row != SEARCHED], "recipe"), overlap(here, "row")]
        same += [overlap(searched, "seed"), overlap(here[here.row != SEARCHED], "seed")]
        told = ["" if math.isnan(value) else f"{value:.2f}" for value in same]
        body.append([f"{100 * float(str(target)):g}%", str(count), *told])
    headers = ["dropped", "modules", "search, other texts", "one-pass, other texts", "other methods"]
    return markdown([*headers, "search, other samples and seeds", "one-pass, other samples"], body)


def render(results: pd.DataFrame) -> str:
    """Return the tables in Markdown."""
    seeds = ", ".join(str(seed) for seed in sorted(set(results.seed)))
    parts = [
        f"Seeds {seeds}. Shares are of the sum of squares of log KL over {', '.join(HELD_OUT)}, all methods and seeds. The "
        "one-pass method is the best of them on that held-out text. Changes are of the mean KL, paired by seed; within two "
        "standard errors it is a tie.\n",
        question(results),
        "How much of what is dropped two genomes share (1: the same modules), on real texts:\n",
        patterns(results),
        "KL divergence in nats per token, mean over held-out texts and seeds, by what a method looked at:\n",
    ]
    for target, here in results.groupby("target"):
        parts += [f"**{100 * float(str(target)):g}% dropped**\n", by_text(here)]
    return "\n".join(parts)


def kept(values: Collection[str], known: Collection[str], option: str) -> None:
    """Raise EvoPressError for a value that is not known."""
    if unknown := [value for value in values if value not in known]:
        raise EvoPressError(f"{option} {unknown[0]!r} is unknown: choose among {', '.join(known)}")


def asked_for(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read a command line (default: this process's)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", nargs="+", default=list(KINDS), help="that are looked at (default: all)")
    parser.add_argument("--targets", nargs="+", type=float, default=list(TARGETS), help="shares of modules that are dropped")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="0 to 2, each with a part of its own of every text")
    parser.add_argument("--folder", type=Path, default=TEXTS, help="of the texts (default %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="at once")
    parser.add_argument("--results", type=file_to_write, default=FOLDER / "results.csv")
    parser.add_argument("--draw", action="store_true", help="make the table of results.csv, run nothing")
    parser.add_argument("further", nargs="*", help="overrides for every run, after --")
    return parser.parse_args(words)


def asked_runs(asked: argparse.Namespace) -> list[SingleRun]:
    """Return the runs that a command line asks for; raise EvoPressError for texts that are not known."""
    kept(asked.texts, KINDS, "--texts")
    return with_seeds_alike(asked, lambda seeds: runs(asked.texts, asked.targets, seeds, asked.folder, asked.further))


def prepare(asked: argparse.Namespace) -> None:
    """Write the texts that the runs of a command line look at."""
    write_texts(asked.folder)


@with_its_jobs()
def main() -> None:
    """Run what is missing, and write what was found."""
    asked = asked_for()
    jobs = Jobs([] if asked.draw else asked_runs(asked), at_once=asked.jobs)
    if not asked.draw:
        prepare(asked)
    for run in jobs:
        merged(asked.results, list(ends(run)))
    text = render(read(asked.results))
    write_table(asked.results.parent, "Text against search", text)
    print(text)
    jobs.check()


if __name__ == "__main__":
    main()
