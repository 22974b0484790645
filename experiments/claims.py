"""Say of each claim of the paper's tables whether it holds here: its numbers and ours, from the committed CSVs.

    python -m experiments.claims          # writes the list into experiments/README.md

A claim is that a method has a higher or a lower perplexity than the table's reference. The paper's numbers are ratios over its
models and texts: it has an order where some are on one side of 1 and none on the other. Ours is the geometric mean of the ratios of
each seed; whether it is a tie is asked of their logarithms: two standard errors. What a t test of as many of them does not bear out
at 5% has its p beside it.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from evopress.reporting.differences import Difference
from evopress.reporting.tables import display_name
from experiments.scripts import in_one_sentence
from experiments.specs import SPECS, home
from experiments.sweeps import describe
from experiments.tables import fill_readme, number_of, read_csv

README = Path(__file__).parent / "README.md"
SURE = 0.05
_OPPOSITE = {"worse": "better", "better": "worse"}


def claims(name: str) -> Iterator[str]:
    """Yield a sentence for each table of a sweep that the paper has too: every method against the reference."""
    spec = SPECS[name]
    runs, paper = read_csv(home(name) / "runs.csv"), read_csv(home(spec.twin_of or name) / "paper.csv")
    measure = next((row["measure"] for row in runs if row["measure"].startswith("ppl ")), None)
    groups = dict.fromkeys(tuple(row[key] for key in spec.group) for row in runs)
    for group in groups if paper and measure else ():
        where = dict(zip(spec.group, group, strict=True))
        here: dict[str, dict[str, float]] = {}
        for row in _of(runs, where):
            if row["measure"] == measure:
                here.setdefault(row["method"], {})[row["seed"]] = math.log(float(row["value"]))
        there = _of(paper, where)
        compared = [method for method in here if method not in (spec.reference, *spec.apart) and spec.reference in here]
        told = [
            _against(method, Difference.of(here[method], here[spec.reference]), ratios)
            for method in compared
            if (ratios := _ratios(there, method, spec.reference))
        ]
        if told:
            about = f", {describe(where)}" if where else ""
            yield f"{spec.title}{about}: perplexity over that of {display_name(spec.reference)}: {'; '.join(told)}."


def _of(rows: Sequence[dict[str, str]], where: Mapping[str, str]) -> list[dict[str, str]]:
    return [row for row in rows if all(number_of(row[key]) == number_of(value) for key, value in where.items())]


def _ratios(rows: Sequence[Mapping[str, str]], method: str, reference: str) -> list[float]:
    """Return a method's perplexity over the reference's in each column of each model of the paper."""
    of = {(row["model"], row["method"]): row for row in rows}
    apart = {"model", "method", *(key for spec in SPECS.values() for key in spec.group)}
    columns = [key for key in (rows[0] if rows else ()) if key not in apart]
    return [
        float(row[column]) / float(other[column])
        for (model, name), row in of.items()
        if name == method and (other := of.get((model, reference))) is not None
        for column in columns
        if row[column] and other[column]
    ]


def _against(method: str, logs: Difference, ratios: Sequence[float]) -> str:
    """Say the paper's ratios, ours and what follows.

    Args: logs: logarithms of our perplexities, of the method against the reference.
    """
    least, most, verdict = min(ratios), max(ratios), logs.verdict(min)
    theirs = "worse" if least >= 1 < most else "better" if most <= 1 > least else "tie"
    if theirs == "tie":
        said = "no order in the paper, " + {"tie": "a tie here"}.get(verdict, f"{verdict} here")
    else:
        said = {theirs: "**holds**", _OPPOSITE[theirs]: "**does not hold**", "tie": "**a tie** here"}.get(verdict, "one seed")
    if (p := chance(logs)) > SURE and verdict in _OPPOSITE:
        said += f" (p={p:.2f})"
    return f"{display_name(method)} ×{least:.2f} to ×{most:.2f} in the paper, ×{math.exp(logs.mean):.2f} here, {said}"


def chance(difference: Difference) -> float:
    """Return the p of a paired t test, two-sided: of so few seeds two standard errors are not much. 0 where nothing varies."""
    from scipy.stats import t

    mean, error, pairs = difference.mean, difference.standard_error, difference.num_pairs
    return float(2 * t.sf(abs(mean) / error, pairs - 1)) if error > 0 and pairs > 1 else 0.0


def text() -> str:
    """Return the list of all sentences, in Markdown."""
    return "".join(f"- {sentence}\n" for name in SPECS for sentence in claims(name))


def write() -> None:
    """Write the list into the README of the experiments."""
    fill_readme(README, text())


@in_one_sentence()
def main() -> None:
    """Write it, and show it."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    write()
    print(text())


if __name__ == "__main__":
    main()
