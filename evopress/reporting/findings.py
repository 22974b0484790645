"""Say what was found: who has the lowest held-out KL within the budget, and the table of results. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from evopress.reporting.differences import Difference
from evopress.reporting.page import table
from evopress.reporting.tables import (
    MEANS,
    by_sequence,
    display_name,
    held_out_kl,
    is_found,
    number,
    results_columns,
    significant,
    spends_more,
    told,
    told_differences,
)


def headline(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the sentences of `headlines` as one text."""
    return " ".join(headlines(rows))


def headlines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say in sentences what the rows of `result.json` show: who has the lowest held-out KL within EvoPress's budget.

    KL is that on the run's own text; a difference within two of its standard errors, paired by sequence, is called a tie.
    """
    measured = {
        str(row.get("name")): row for row in rows if held_out_kl(row)[1] is not None and row.get("name") not in (None, "dense")
    }
    if not measured:
        return ["Nothing has been measured on held-out text yet."]
    if "evopress" not in measured:
        best = min(measured, key=lambda name: _kl(measured[name]))
        return [
            f"No search has been measured; of {_list(measured)}, {display_name(best)} has the lowest held-out KL"
            f"{_on(measured[best])}: {significant(_kl(measured[best]))} nats per token{_at(measured[best])}."
        ]
    ours = measured.pop("evopress")
    found = {name: measured.pop(name) for name in list(measured) if is_found(name)}
    sentences = [f"EvoPress's held-out KL{_on(ours)} is {significant(_kl(ours))} nats per token{_at(ours)}."]
    equal = {name: row for name, row in measured.items() if not spends_more(row, ours)}
    larger = {name: row for name, row in measured.items() if name not in equal}
    if equal:
        best = min(equal, key=lambda name: _kl(equal[name]))
        verdict = compared("EvoPress", ours, display_name(best), equal[best])
        sentences.append(
            f"The best baseline within this budget, {display_name(best)}, has {significant(_kl(equal[best]))}: {verdict}."
        )
        sentences += _accepted(ours, equal[best])
        if others := [f"{display_name(name)} {significant(_kl(row))}" for name, row in equal.items() if name != best]:
            sentences.append(f"Other baselines within it: {', '.join(others)}.")
    else:
        sentences.append("No baseline within this budget was measured.")
    for name, row in found.items():
        verdict = compared(display_name(name), row, "EvoPress", ours)
        sentences.append(f"{display_name(name)} has {significant(_kl(row))}{_at(row)}: {verdict}.")
    if larger:
        shown = (f"{display_name(name)} {significant(_kl(row))}{_at(row)}" for name, row in larger.items())
        sentences.append(f"With a larger budget: {', '.join(shown)}.")
    return [*sentences, "One run, one seed: another seed finds another genome."]


def compared(name: str, ours: Mapping[str, Any], other: str, theirs: Mapping[str, Any]) -> str:
    """Say who of two rows has the lower held-out KL, by how much, and whether that is more than chance.

    Args:
        name: what the first row is called.
        other: what the second is called.
    """
    data_set, kl = held_out_kl(ours)
    _, there = held_out_kl(theirs)
    assert kl is not None and there is not None
    percent = abs(kl / there - 1) * 100 if there else 0.0
    by = f"{percent:.1f}% {'lower' if kl <= there else 'higher'}"
    kept = [by_sequence(row, data_set, "kl") for row in (ours, theirs)]
    difference = Difference.of_sequences(kept[0] or (), kept[1] or ())
    if kl == there or (not difference.decided and significant(kl) == significant(there)):
        return "a tie"
    if not difference.decided:
        return f"{name} is {by}; whether that is more than chance was not measured"
    error = f"{significant(abs(difference.mean), 3)} ± {significant(difference.standard_error, 2)}"
    error += f" nats over {difference.num_pairs} sequences"
    if difference.is_tie:
        return f"a tie, {name} is {by} but the difference is within two standard errors ({error})"
    return f"{name} wins, {by} ({error})" if kl < there else f"{other} wins, {name} is {by} ({error})"


def _accepted(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Say what share of tokens would be kept if the model drafted for the dense one, and what another's would."""
    data_set, _ = held_out_kl(ours)
    values = [number((row.get("acceptance_rate_by_data_set") or {}).get(data_set)) for row in (ours, theirs)]
    if values[0] is None or values[1] is None:
        return []
    mine, other = (by_sequence(row, data_set, "acceptance_rate") or () for row in (ours, theirs))
    difference = told(Difference.of_sequences(mine, other), MEANS["acceptance_rate"][2])
    verdict = f": {difference}" if difference else ""
    return [f"EvoPress's acceptance rate is {values[0]:.4f}, the baseline's {values[1]:.4f}{verdict}."]


def _kl(row: Mapping[str, Any]) -> float:
    value = held_out_kl(row)[1]
    assert value is not None
    return value


def _on(row: Mapping[str, Any]) -> str:
    """Name the text of a row's held-out KL: " on python_docs"."""
    data_set = held_out_kl(row)[0]
    return "" if data_set is None else f" on {data_set}"


def _at(row: Mapping[str, Any]) -> str:
    """Say what a row spends: " at 2.499 bits per weight"."""
    for key, words in (("bits_per_weight", "bits per weight"), ("sparsity", "sparsity")):
        value = number(row.get(key))
        if value is not None:
            return f" at {value:.3f} {words}"
    value = number(row.get("modules_dropped"))
    return "" if value is None else f" with {value:.0f} modules dropped"


def results_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Lay out the results; bold is the best of each quality among the rows that spend no more than EvoPress."""
    if not rows:
        return ""
    columns = results_columns(rows)
    ours = next((row for row in rows if row.get("name") == "evopress"), None)
    fair = [index for index, row in enumerate(rows) if row.get("name") != "dense" and (ours is None or not spends_more(row, ours))]
    bold: set[tuple[int, int]] = set()
    for place, column in enumerate(columns):
        shown = {index: value for index in fair if (value := column.values[index]) is not None}
        if column.best is not None and shown:
            best = column.best(shown.values())
            winners = [index for index, value in shown.items() if value == best]
            bold |= {(index, place) for index in shown if index in winners or any(column.ties(index, other) for other in winners)}
    body = []
    for index, row in enumerate(rows):
        cells = [escape(display_name(str(row.get("name", ""))))]
        for place, column in enumerate(columns):
            cell = escape(column.cell(index))
            cells.append(f"<b>{cell}</b>" if (index, place) in bold else cell)
        body.append((cells, "" if index in fair else ' class="aside"'))
    note = (
        "Bold: best among the compressed rows"
        + (" that spend no more than EvoPress (the others are grey), " if ours is not None else ", ")
        + "with those that tie with it: within two standard errors of the difference, paired by sequence. "
        "KL: nats per token against the dense model on held-out text, lower is better; ppl: perplexity, lower is better; "
        "acceptance rate: \u03a3 min(p, q), the share of tokens that lossless speculative decoding keeps if the model drafts for "
        "the dense one; flips: the share of next tokens that one of the two is right about and the other is not; "
        "MB: 10<sup>6</sup> bytes. Size if packed: of a file that holds every level as the level database stores it, which no "
        "stage writes; checkpoint: the weight files that were exported, in the model's own dtype."
    )
    laid_out = table(["", *(escape(column.header) for column in columns)], body) + f'<p class="note">{note}</p>'
    headers, lines = told_differences(rows)
    if not lines:
        return laid_out
    paired = table(list(map(escape, headers)), [(list(map(escape, line)), "") for line in lines])
    note = "Differences are paired by sequence of the same text, \u00b1 is their standard error; within two of it they are a tie."
    return laid_out + paired + f'<p class="note">{note}</p>'


def _list(names: Mapping[str, Any]) -> str:
    return ", ".join(map(display_name, names))
