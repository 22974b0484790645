"""What is aimed at, and the authors' own code to compare with: tables made of the rows alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from experiments.benchmark.rows import Row
from experiments.benchmark.tables import markdown, show_bytes


@dataclass(frozen=True)
class Target:
    """A number to reach on two cores with SmolLM2-135M, bfloat16 forward, float32 Hessians."""

    part: str
    what: str
    aim: str
    case: str
    """How a row's case begins."""
    number: Callable[[Row], float]
    met: Callable[[Row], bool]
    show: Callable[[float], str]


def _times(value: float) -> str:
    return f"{value:.1f}×"


def _share(value: float) -> str:
    return f"1/{1 / value:.1f}"


def _winning(row: Row) -> bool:
    return row.ratio >= 2.0 and row.same == "yes"


def _stored(row: Row) -> float:
    return row.fast_bytes / row.plain_bytes


TARGETS = (
    Target("b", "stacked GPTQ sweep", "≥ 6×", "GPTQ", lambda r: r.ratio, lambda r: r.ratio >= 6.0, _times),
    Target("c", "whole GPTQ database", "≥ 3×", "GPTQ", lambda r: r.ratio, lambda r: r.ratio >= 3.0, _times),
    Target("c", "database on disk", "≤ 1/3 of dequantized", "GPTQ", _stored, lambda r: _stored(r) <= 1 / 3, _share),
    Target("d", "super_fast, same winners", "≥ 2×", "super_fast", lambda r: r.ratio, _winning, _times),
    Target("d", "quantization, same winners", "≥ 2×", "quantization", lambda r: r.ratio, _winning, _times),
    Target("e", "memory for targets", "≤ 1/20 of stored logits", "KL", _stored, lambda r: _stored(r) <= 1 / 20, _share),
    Target(
        "memory",
        "peak of a search",
        "≤ 2 GB",
        "super_fast",
        lambda r: r.fast_peak_bytes,
        lambda r: r.fast_peak_bytes <= 2e9,
        show_bytes,
    ),
    Target(
        "limit",
        "time in matrix products and attention",
        "≥ 50%",
        "quantization",
        lambda r: r.products_share,
        lambda r: r.products_share >= 0.5,
        lambda value: f"{value:.0%}",
    ),
)


def targets_table(rows: Sequence[Row]) -> str:
    """Return the targets with what was measured and whether it is met."""
    body = []
    for target in TARGETS:
        row = _found(rows, target.part, target.case)
        number = target.number(row) if row else math.nan
        verdict = "not measured" if row is None or math.isnan(number) else "met" if target.met(row) else "not met"
        if row is not None and row.same == "no":
            verdict += ", other winners"
        body.append([target.part, target.what, target.aim, "" if math.isnan(number) else target.show(number), verdict])
    return markdown(["part", "what", "target", "measured", "verdict"], body, text_columns=5)


def yardstick_table(rows: Sequence[Row]) -> str:
    """Return our numbers beside those of the authors' code, which are quoted, not measured here.

    Quiet estimates of the authors' code in float32 on this kind of machine (2 cores), with SmolLM2-135M.
    """
    quant, sparse = _found(rows, "c", "GPTQ"), _found(rows, "c", "SparseGPT")
    alone = _found(rows, "memory", "super_fast")
    searches = [row for row in rows if row.part == "d" and not row.error]
    speeds = ", ".join(f"{row.case} {row.fast_tokens_per_second:,.0f}" for row in searches)
    body = [
        ["GPTQ database of 5 levels, from 65,536 tokens", "440–655 s", _whole(quant)],
        ["SparseGPT database of 11 levels, from 16,384 tokens", "333 s", _whole(sparse)],
        ["search, candidate tokens per second", "288–350", speeds],
        ["peak memory of a search", "5.3 GB", show_bytes(alone.fast_peak_bytes) if alone else ""],
    ]
    return markdown(
        ["SmolLM2-135M", "authors' code, float32 (quoted for this kind of machine)", "here, measured"], body, text_columns=3
    )


def _whole(row: Row | None) -> str:
    return "" if row is None or math.isnan(row.whole_seconds) else f"{row.whole_seconds:.0f} s ({row.case}, times all)"


def _found(rows: Sequence[Row], part: str, case: str) -> Row | None:
    return next((row for row in rows if row.part == part and row.case.startswith(case) and not row.error), None)
