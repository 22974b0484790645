"""Say what was found: who has the lowest held-out KL within the budget, and the table of results. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from evopress.reporting.page import table
from evopress.reporting.tables import display_name, number, results_columns, significant

_SLACK = 1.002
"""Genomes that spend this much more than another still count as of the same budget."""


def headline(rows: Sequence[Mapping[str, Any]]) -> str:
    """Say in words what the rows of `result.json` show: who has the lowest held-out KL within EvoPress's budget."""
    measured = {
        str(row.get("name")): row for row in rows if number(row.get("kl")) is not None and row.get("name") not in (None, "dense")
    }
    if not measured:
        return "Nothing has been measured on held-out text yet."
    if "evopress" not in measured:
        best = min(measured, key=lambda name: measured[name]["kl"])
        return (
            f"No search has been measured; of {_list(measured)}, {display_name(best)} has the lowest held-out KL: "
            f"{significant(measured[best]['kl'])} nats per token{_at(measured[best])}."
        )
    ours = measured.pop("evopress")
    kl = ours["kl"]
    sentence = f"EvoPress's held-out KL is {significant(kl)} nats per token{_at(ours)}"
    equal = {name: row["kl"] for name, row in measured.items() if not _spends_more(row, ours)}
    larger = {name: row["kl"] for name, row in measured.items() if name not in equal}
    if equal:
        best = min(equal, key=lambda name: equal[name])
        sentence += f"; the best baseline within this budget, {display_name(best)}, has {significant(equal[best])}: "
        change = (kl / equal[best] - 1) * 100 if equal[best] else 0.0
        if significant(kl) == significant(equal[best]):
            sentence += "a draw"
        elif kl < equal[best]:
            sentence += f"EvoPress wins, {abs(change):.1f}% lower"
        else:
            sentence += f"{display_name(best)} wins, EvoPress is {abs(change):.1f}% higher"
        others = [f"{display_name(name)} at {significant(value)}" for name, value in equal.items() if name != best]
        sentence += f" (others: {', '.join(others)})" if others else ""
    else:
        sentence += "; no baseline within this budget was measured"
    if larger:
        sentence += ". With a larger budget: " + ", ".join(
            f"{display_name(name)} has {significant(value)}{_at(measured[name])}" for name, value in larger.items()
        )
    return sentence + ". One run, one seed: small differences may be chance."


def _at(row: Mapping[str, Any]) -> str:
    """Say what a row spends: " at 2.499 bits per weight"."""
    for key, words in (("bits_per_weight", "bits per weight"), ("sparsity", "sparsity")):
        value = number(row.get(key))
        if value is not None:
            return f" at {value:.3f} {words}"
    value = number(row.get("modules_dropped"))
    return "" if value is None else f" with {value:.0f} modules dropped"


def _spends_more(row: Mapping[str, Any], ours: Mapping[str, Any]) -> bool:
    """Tell if a row is of a larger budget than ours: more bits, less sparsity, or fewer modules dropped."""
    for key, sign in (("bits_per_weight", 1), ("sparsity", -1), ("modules_dropped", -1)):
        theirs, limit = number(row.get(key)), number(ours.get(key))
        if theirs is not None and limit is not None:
            return theirs > limit * _SLACK if sign > 0 else theirs * _SLACK < limit
    return False


def results_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Lay out the results; bold is the best of each quality among the rows that spend no more than EvoPress."""
    if not rows:
        return ""
    columns = results_columns(rows)
    ours = next((row for row in rows if row.get("name") == "evopress"), None)
    fair = [index for index, row in enumerate(rows) if row.get("name") != "dense" and (ours is None or not _spends_more(row, ours))]
    bold: set[tuple[int, int]] = set()
    for place, column in enumerate(columns):
        shown = {index: value for index in fair if (value := column.values[index]) is not None}
        if column.best is not None and shown:
            best = column.best(shown.values())
            bold |= {(index, place) for index, value in shown.items() if value == best}
    body = []
    for index, row in enumerate(rows):
        cells = [escape(display_name(str(row.get("name", ""))))]
        for place, column in enumerate(columns):
            cell = escape(column.cell(index))
            cells.append(f"<b>{cell}</b>" if (index, place) in bold else cell)
        body.append((cells, "" if index in fair else ' class="aside"'))
    note = (
        "Bold: best among the compressed rows"
        + (" that spend no more than EvoPress; the others are grey. " if ours is not None else ". ")
        + "KL: nats per token against the dense model on held-out text, lower is better; ppl: perplexity, lower is "
        "better; MB: 10<sup>6</sup> bytes."
    )
    return table(["", *(escape(column.header) for column in columns)], body) + f'<p class="note">{note}</p>'


def _list(names: Mapping[str, Any]) -> str:
    return ", ".join(map(display_name, names))
