"""Tables and their numbers as people read them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from evopress.progress import in_bytes
from experiments.benchmark.rows import Row

Columns = Sequence[tuple[str, Callable[[Row], str]]]


def markdown(headers: Sequence[str], body: Sequence[Sequence[str]], *, text_columns: int = 2) -> str:
    """Return a Markdown table whose first columns are text and whose others are numbers."""
    rule = ["---" if i < text_columns else "---:" for i in range(len(headers))]
    return "".join("| " + " | ".join(line) + " |\n" for line in (headers, rule, *body))


def times_table(rows: Sequence[Row]) -> str:
    """Return times, results and shares of the limit."""
    return _table(rows, _TIMES)


def memory_table(rows: Sequence[Row]) -> str:
    """Return memory, and what is stored or read."""
    return _table([row for row in rows if not row.error], _MEMORY)


def _table(rows: Sequence[Row], columns: Columns) -> str:
    """Lay rows out, lines and columns without a number left out."""
    body = [[row.part, row.case, *(cell(row) for _, cell in columns)] for row in rows]
    body = [line for line in body if any(line[2:])]
    used = [0, 1] + [i for i in range(2, 2 + len(columns)) if any(line[i] for line in body)]
    headers = ["part", "case", *(header for header, _ in columns)]
    return markdown([headers[i] for i in used], [[line[i] for i in used] for line in body])


def _difference(row: Row) -> str:
    return "" if math.isnan(row.difference) else f"{row.difference:.2g} ({row.difference_of})"


def show(value: float, form: str) -> str:
    """Format a number; NaN is blank."""
    return "" if math.isnan(value) else form.format(value)


def show_seconds(seconds: float) -> str:
    """Show a time in milliseconds or seconds, three digits."""
    if math.isnan(seconds):
        return ""
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s" if seconds < 100 else f"{seconds:,.0f} s"


def show_bytes(count: float) -> str:
    """Show an amount of memory; NaN is blank."""
    return "" if math.isnan(count) else in_bytes(count)


_TIMES: Columns = (
    ("fast", lambda row: show_seconds(row.fast_seconds)),
    ("plain", lambda row: show_seconds(row.plain_seconds)),
    ("ratio", lambda row: show(row.ratio, "{:.2f}×")),
    ("largest difference", _difference),
    ("same winners", lambda row: row.same),
    ("fast tokens/s", lambda row: show(row.fast_tokens_per_second, "{:,.0f}")),
    ("plain tokens/s", lambda row: show(row.plain_tokens_per_second, "{:,.0f}")),
    ("FLOP needed", lambda row: show(row.flops, "{:.3g}")),
    ("fast FLOP/s", lambda row: show(row.fast_flops_per_second, "{:.3g}")),
    ("share of the limit", lambda row: show(row.limit_share, "{:.0%}")),
    ("in products and attention", lambda row: show(row.products_share, "{:.0%}")),
    ("passes", lambda row: str(row.passes) if row.passes else ""),
    ("note", lambda row: f"FAILED: {row.error}" if row.error else row.note),
)
_MEMORY: Columns = (
    ("peak, fast", lambda row: show_bytes(row.fast_peak_bytes)),
    ("peak, plain", lambda row: show_bytes(row.plain_peak_bytes)),
    ("working, fast", lambda row: show_bytes(row.fast_working_bytes)),
    ("working, plain", lambda row: show_bytes(row.plain_working_bytes)),
    ("device, fast", lambda row: show_bytes(row.fast_device_bytes)),
    ("device, plain", lambda row: show_bytes(row.plain_device_bytes)),
    ("stored or read, fast", lambda row: show_bytes(row.fast_bytes)),
    ("stored or read, plain", lambda row: show_bytes(row.plain_bytes)),
    ("of", lambda row: row.bytes_of),
)


def comparison(before: Sequence[Row], after: Sequence[Row]) -> str:
    """Return the fast paths of two runs side by side, by part and case."""
    old = {(row.part, row.case): row for row in before if not row.error}
    body = []
    for row in after:
        past = old.get((row.part, row.case))
        if row.error or past is None:
            continue
        body.append(
            [
                row.part,
                row.case,
                show_seconds(past.fast_seconds),
                show_seconds(row.fast_seconds),
                show(past.fast_seconds / row.fast_seconds, "{:.2f}×"),
                show(past.ratio, "{:.2f}×"),
                show(row.ratio, "{:.2f}×"),
                show(past.limit_share, "{:.0%}"),
                show(row.limit_share, "{:.0%}"),
                show_bytes(past.fast_peak_bytes),
                show_bytes(row.fast_peak_bytes),
            ]
        )
    headers = ["part", "case", "before", "after", "faster", "over plain, before", "after", "of the limit, before", "after"]
    return markdown([*headers, "peak memory, before", "after"], body)
