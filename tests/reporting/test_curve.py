"""What is drawn together was measured on one text, and the curve ends at the table's number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from evopress.reporting import figures
from evopress.reporting.curve import held_out_curve


def held_out(kl: float, tokens: int | None = 100) -> dict[str, Any]:
    measured: dict[str, Any] = {"kl": kl, "perplexity": {"docs": 10 * kl}, "top1_agreement": 0.5}
    return measured if tokens is None else {**measured, "num_tokens": tokens}


def records(*measured: dict[str, Any] | None) -> list[dict[str, Any]]:
    return [{"generation": i, "fitness": 1.0, "tokens": i, "seconds": i, "held_out": each} for i, each in enumerate(measured)]


def row(name: str, kl: float, *, part: float | None = None, tokens: int = 100, all_tokens: int = 100) -> dict[str, Any]:
    """Make a row of KL `kl` on all tokens, and `part` on the text of the search."""
    on_part = {} if part is None else {"held_out_in_search": held_out(part, tokens)}
    return {"name": name, "kl": kl, "kl_by_data_set": {"docs": kl}, "tokens_by_data_set": {"docs": all_tokens}, **on_part}


def kls(curve: Any) -> list[float | None]:
    return [record["held_out"] and record["held_out"]["kl"] for record in curve.records]


def test_on_all_tokens_the_last_point_is_the_tables_number() -> None:
    rows = [row("dense", 0.0, part=0.0), row("dp", 1.5, part=1.5), row("evopress", 0.98765, part=0.98765)]
    curve = held_out_curve(records(held_out(2.0), None, held_out(0.98764)), rows)
    assert kls(curve) == [2.0, None, rows[-1]["kl"]]
    assert {name: line["kl"] for name, line in curve.lines.items()} == {"dp": 1.5}
    assert curve.text == "all 100 held-out tokens"


def test_on_part_of_them_the_lines_are_on_that_part() -> None:
    rows = [row("dp", 1.5, part=1.4, all_tokens=400), row("evopress", 1.0, part=0.9, all_tokens=400)]
    curve = held_out_curve(records(held_out(2.0), held_out(0.9)), rows)
    assert kls(curve) == [2.0, 0.9]
    assert {name: line["kl"] for name, line in curve.lines.items()} == {"dp": 1.4}
    assert curve.text == "the first 100 held-out tokens"


@pytest.mark.parametrize(
    ("measured", "rows", "expected"),
    [
        ((held_out(2.0, None), held_out(1.0, None)), [row("dp", 1.5), row("evopress", 1.1)], [2.0, 1.0]),
        ((held_out(2.0, None), held_out(1.0, None)), [row("dp", 1.5, part=1.5), row("evopress", 1.1, part=1.1)], [2.0, 1.0]),
        ((held_out(2.0, None), held_out(1.0)), [row("dp", 1.5, part=1.5, tokens=50)], [None, 1.0]),
        ((held_out(2.0, 50), held_out(1.0)), [], [None, 1.0]),
    ],
    ids=["an early version's run", "evaluated again by this one", "rows of another text", "half of it on another text"],
)
def test_other_text_is_not_drawn_beside_it(measured: Any, rows: Any, expected: list[float | None]) -> None:
    curve = held_out_curve(records(*measured), rows)
    assert kls(curve) == expected
    assert curve.lines == {}


def test_what_was_found_is_no_line() -> None:
    rows = [row(name, 1.0, part=1.0) for name in ("dense", "uniform_3", "evopress", "evopress+refine")]
    assert list(held_out_curve(records(held_out(2.0), held_out(1.0)), rows).lines) == ["uniform_3"]


def test_nothing_measured() -> None:
    assert held_out_curve(records(None, None), [row("dp", 1.0, part=1.0)]).lines == {}
    assert held_out_curve([], []).text == ""


def test_the_figure_says_its_text(tmp_path: Path) -> None:
    curve = held_out_curve(records(held_out(2.0), held_out(1.0)), [row("dp", 1.5, part=1.5), row("evopress", 1.0, part=1.0)])
    drawn = figures.convergence(curve.records, tmp_path, {"dp": 1.5}, text=curve.text)
    assert "Convergence of the search (all 100 held-out tokens)" in drawn[1].read_text()
