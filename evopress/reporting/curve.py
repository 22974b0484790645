"""Put what is drawn together on one text: a search's held-out curve, and the lines of what it is compared with.

A search measures its parent on the run's own held-out text, all of it unless `evaluation.every_tokens` says less. Each row of
`result.json` has the same measures on just that text, in `held_out_in_search`. Standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evopress.reporting.tables import is_baseline, number

Record = Mapping[str, Any]


@dataclass(frozen=True)
class HeldOutCurve:
    """Measurements of a search, and of other genomes on the same text."""

    records: list[dict[str, Any]]
    """All records; those that were measured on another text have lost their measurement."""
    rows: dict[str, Mapping[str, Any]]
    """Name of a row to its measures on that text, laid out like a record's `held_out`; empty where they are of another."""
    tokens: int | None
    """Predicted tokens of the text; None: of a run that did not say."""
    whole: bool
    """Whether that is the text that the results table has."""

    @property
    def lines(self) -> dict[str, Mapping[str, Any]]:
        """The rows of what was not found by the run, nor dense."""
        return {name: measures for name, measures in self.rows.items() if is_baseline(name)}

    @property
    def text(self) -> str:
        """Say which text it is: "all 16,352 held-out tokens"."""
        if self.tokens is None:
            return "part of the held-out tokens" if any(record.get("held_out") for record in self.records) else ""
        return f"{'all' if self.whole else 'the first'} {self.tokens:,} held-out tokens"


def held_out_curve(records: Sequence[Record], rows: Sequence[Mapping[str, Any]]) -> HeldOutCurve:
    """Return a search's measurements on the text of the last of them, with the rows of `result.json` on that text.

    The last point is the found genome's row, where that is on the same text: the same genome, so the same numbers as the table's.
    """
    measured = [record["held_out"] for record in records if record.get("held_out")]
    tokens = _tokens(measured[-1]) if measured else None
    on_text = {
        str(row.get("name")): row["held_out_in_search"]
        for row in rows
        if tokens is not None and _tokens(row.get("held_out_in_search")) == tokens
    }
    kept = [dict(record) for record in records]
    for record in kept:
        if record.get("held_out") and _tokens(record["held_out"]) != tokens:
            record["held_out"] = None
    if kept and kept[-1].get("held_out") and "evopress" in on_text:
        kept[-1]["held_out"] = on_text["evopress"]
    ours: Mapping[str, Any] = next((row for row in rows if row.get("name") == "evopress"), {})
    return HeldOutCurve(kept, on_text, tokens, _is_whole(ours, tokens))


def _is_whole(row: Mapping[str, Any], tokens: int | None) -> bool:
    """Tell whether so many tokens are all that the row's first data set has."""
    counts = row.get("tokens_by_data_set")
    return isinstance(counts, Mapping) and bool(counts) and next(iter(counts.values())) == tokens


def _tokens(held_out: Any) -> int | None:
    value = number(held_out.get("num_tokens")) if isinstance(held_out, Mapping) else None
    return None if value is None else int(value)
