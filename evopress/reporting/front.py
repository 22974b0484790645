"""Show the front of a run with several budgets: what each size costs in quality, as numbers, words, a figure and a page."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evopress.files import write_bytes
from evopress.progress import counted, millions
from evopress.reporting import account
from evopress.reporting.drawing import (
    COLOURS,
    MARKERS,
    STYLES,
    legend_below,
    log_scale,
    new_figure,
    open_frame,
    save,
    styles,
    title_above,
)
from evopress.reporting.findings import compared
from evopress.reporting.page import code, details, json_text, pairs, paragraph, pictures, section, table, write_page
from evopress.reporting.tables import Column, display_name, held_out_kl, number, results_columns, significant, spends_more

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation

Row = Mapping[str, Any]
_NEAR = 0.97
"""Least share of what a point spends that a genome spends to be compared with it."""
_RISING = ("top-1", "acceptance")
"""How the titles of panels begin whose measure is better the greater it is."""
_LIMITS = {"max_kl": "held-out KL", "min_agreement": "top-1"}
"""What may have to be kept, and how the title of its panel begins."""


def front_rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the found row of every budget with what its search took, in the order of `result.json`; none where it has none."""
    rows = {row.get("name"): row for row in result.get("rows") or []}
    front = result.get("front")
    points = [point for point in front if isinstance(point, Mapping)] if isinstance(front, list) else []
    return [{**rows[point["row"]], "spent": point} for point in points if point.get("row") in rows]


def write_front(front: Sequence[Row], path: Path) -> None:
    """Write `front.csv`: a line for each budget, what it spends, how good it is, what its search took and where its genome is."""
    columns = _columns(front)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    spent = ("tokens", "seconds", "evaluations")
    writer.writerow(["budget", *(column.header for column in columns), *(f"search {key}" for key in spent), "genome"])
    for index, row in enumerate(front):
        values = [column.values[index] for column in columns] + [row["spent"].get(key) for key in spent]
        genome = f"points/{row['budget']}/genome.json"
        writer.writerow([row["budget"], *("" if value is None else value for value in values), genome])
    write_bytes(path, text.getvalue().encode())


def best_baseline(rows: Sequence[Row], point: Row) -> Row | None:
    """Return the row with the least held-out KL of what was compared and spends what a point does, or a few percent less."""
    of_bytes = any("modules_dropped" in row or "experts_dropped" in row for row in (point, *rows))
    of_bytes |= not str(point["budget"]).replace(".", "", 1).isdecimal()  # "60MB", "2.25bpw": of all that is stored

    def spent(row: Row) -> float | None:
        """Return bits per weight, the share of weights that is kept, or bytes, which have what is no unit in them."""
        bits, sparsity = number(row.get("bits_per_weight")), number(row.get("sparsity"))
        if of_bytes or (bits is None and sparsity is None):
            return number(row.get("bytes"))
        return bits if bits is not None else 1 - (sparsity or 0.0)

    size = spent(point)
    others = [
        row
        for row in rows
        if row.get("name") not in ("dense", point["name"])
        and not str(row.get("name")).startswith("evopress")
        and row.get("budget", point["budget"]) == point["budget"]
        and held_out_kl(row)[1] is not None
        and row.get("within_budget") is not False
        and (of_bytes or not spends_more(row, point))
        and (size is None or _NEAR * size <= (spent(row) or 0) <= size * 1.002)
    ]
    return min(others, key=lambda row: held_out_kl(row)[1] or 0.0, default=None)


def front_words(rows: Sequence[Row], front: Sequence[Row], kept: Mapping[str, Any] | None = None) -> str:
    """Say in words what the front shows: its ends, and at each budget who is best.

    Args: kept: what the smallest model had to keep, and which it is.
    """
    measured = [row for row in front if held_out_kl(row)[1] is not None]
    if not measured:
        return "Nothing has been measured on held-out text yet."
    first, last = measured[0], measured[-1]
    sentence = f"Held-out KL is {_kl(first)} nats per token at {first['budget']}{_megabytes(first)}"
    if len(measured) > 1:
        sentence += f" and {_kl(last)} at {last['budget']}{_megabytes(last)}"
    sentences = [*([_answer(front, kept)] if kept else []), f"{sentence}."]
    for row in measured:
        best = best_baseline(rows, row)
        if best is not None:
            told = compared("EvoPress", row, display_name(str(best["name"])), best)
            sentences.append(
                f"At {row['budget']} it is {_kl(row)}, and {_kl(best)} with {display_name(str(best['name']))}: {told}."
            )
    return " ".join([*sentences, "One run, one seed: another seed finds other genomes."])


def _answer(front: Sequence[Row], kept: Mapping[str, Any]) -> str:
    """Say which is the smallest that keeps what was asked for, on search text, and what it has on held-out text."""
    of_kl = "max_kl" in kept
    key, name, asked = (
        ("kl", "KL", f"at most {kept['max_kl']:g}")
        if of_kl
        else ("top1_agreement", "top-1 agreement", f"at least {kept['min_agreement']:g}")
    )
    there: Mapping[str, Any] = next((entry for entry in kept["tried"] if entry["budget"] == kept["answer"]), {})
    row = next((row for row in front if row["budget"] == kept["answer"]), {})
    held_out = held_out_kl(row)[1] if of_kl else number(row.get("top1_agreement"))
    searched = sum(entry["budget"] in {row["budget"] for row in front} for entry in kept["tried"])
    sentence = (
        f"Of {counted(searched, 'budget')} searched, {kept['answer']} is the smallest whose {name} is {asked} on search text: "
    )
    sentence += f"{significant(there[key])} on {there['num_tokens']:,} tokens" if there else "measured before"
    return f"{sentence}, and {significant(held_out)} on held-out text." if held_out is not None else f"{sentence}."


def front_figure(
    rows: Sequence[Row], front: Sequence[Row], folder: Path, *, measure: str, kept: Mapping[str, Any] | None = None
) -> list[Path]:
    """Draw held-out KL, perplexity and acceptance rate against the size if packed, for what was found and what it is compared with.

    Top-1 agreement is drawn where it had to be kept, or an early version measured no acceptance rate.

    Args:
        measure: what the budgets count, in words.
        kept: what the smallest model had to keep, which is drawn, and which it is, which is ringed.

    Returns: the paths of `front.png` and `front.svg`.
    """
    families: dict[str, list[Row]] = {"evopress": list(front)}
    for row in rows:
        name = str(row.get("name")).partition("@")[0]
        if name not in ("dense", "evopress"):
            families.setdefault("uniform" if name.startswith("uniform") else name, []).append(row)
    texts = list(dict.fromkeys(key for row in front for key in row.get("perplexity") or {}))
    dense = next((row for row in rows if row.get("name") == "dense"), {})
    panels: list[tuple[str, Any]] = [("held-out KL (nats per token)", lambda row: held_out_kl(row)[1])]
    panels += [(f"perplexity, {text}", lambda row, text=text: (row.get("perplexity") or {}).get(text)) for text in texts[:1]]
    measured = any(number(row.get("acceptance_rate")) is not None for row in front)
    if measured:
        panels.append(("acceptance rate, drafting for the dense model", lambda row: row.get("acceptance_rate")))
    if not measured or "min_agreement" in (kept or {}):
        panels.append(("top-1 agreement with the dense model", lambda row: row.get("top1_agreement")))
    figure = new_figure(4.3 * len(panels), 4.3)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    looks = styles(families)
    answer = (kept or {}).get("answer")
    labels_of: dict[Axes, list[Annotation]] = {}
    for axis, (title, value) in zip(axes, panels, strict=True):
        seen: list[float] = []
        for name, members in families.items():
            points = sorted(
                (size / 1e6, shown, str(row.get("budget", "")))
                for row in members
                if (size := number(row.get("bytes"))) is not None and (shown := number(value(row))) is not None
            )
            if not points:
                continue
            ours, look = name == "evopress", looks[name]
            style = {"linewidth": 2.2, "zorder": 4} if ours else {"linewidth": 1.1, "alpha": 0.85}
            axis.plot(
                [x for x, _, _ in points],
                [y for _, y, _ in points],
                color=COLOURS[look],
                linestyle="-" if ours else STYLES[look],
                marker=MARKERS[look],
                markersize=6.5 if ours else 4.5,
                label=display_name(name),
                **style,
            )
            seen += [y for _, y, _ in points]
            below = title.startswith(_RISING)  # beside the line, which rises there and falls elsewhere
            for x, y, budget in points if ours else ():
                place = {"xytext": (6, -11 if below else 5), "textcoords": "offset points"}
                label = axis.annotate(budget, (x, y), fontsize=9, color=COLOURS[look], zorder=5, **place)
                labels_of.setdefault(axis, []).append(label)
        limit = next(((kept or {}).get(key) for key, start in _LIMITS.items() if title.startswith(start)), None)
        if limit is not None:
            axis.axhline(limit, color="#555555", linestyle="--", linewidth=1.0, label=f"asked for: {limit:g}")
        for row in front:
            if row["budget"] == answer and (shown := number(value(row))) is not None:
                axis.plot([(number(row.get("bytes")) or 0) / 1e6], [shown], "o", markersize=14, fillstyle="none", color=COLOURS[0])
        if (whole := number(value(dense))) is not None and title.startswith("perplexity"):
            axis.axhline(whole, color="#555555", linestyle=":", linewidth=1.2, label=f"dense: {significant(whole)}")
            seen.append(whole)
        open_frame(axis)
        if not title.startswith(_RISING) and seen and min(seen) > 0 and max(seen) > 3 * min(seen):
            log_scale(axis)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("size if packed (MB)")
    handles: dict[str, Any] = {}
    for axis in axes:
        shown_handles, labels = axis.get_legend_handles_labels()
        handles |= dict(zip(labels, shown_handles, strict=True))
    legend_below(figure, handles.values(), handles.keys(), most=6)
    title_above(figure, f"What each size costs in quality; the numbers at the points are budgets ({measure})", fontsize=12)
    _thin_out(figure, labels_of.values(), str(answer))
    return save(figure, folder, "front")


def _thin_out(figure: Figure, panels: Iterable[Sequence[Annotation]], answer: str) -> None:
    """Hide the labels of points that would print over another label or point of their panel.

    Args:
        panels: the labels of each panel, from the smallest size to the greatest.
        answer: what is labelled first, and whatever is beside it; then the ends, and what lies between them.
    """
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()  # only then do labels have their places
    point = figure.dpi / 72
    for labels in panels:
        ends = (labels[0], labels[-1])
        places = {label: label.axes.transData.transform(label.xy) for label in labels if label.axes is not None}
        taken = {label: Bbox([place - 4 * point, place + 4 * point]) for label, place in places.items()}
        shown: list[Bbox] = []
        for label in sorted(labels, key=lambda label: (label.get_text() != answer, label not in ends)):
            box = label.get_window_extent().padded(point)
            markers = [marker for other, marker in taken.items() if other is not label and label.get_text() != answer]
            if any(box.overlaps(other) for other in [*shown, *markers]):
                label.set_visible(False)
            else:
                shown.append(box)


def write_front_report(
    path: Path,
    *,
    title: str,
    config: Mapping[str, Any],
    result: Mapping[str, Any],
    rows: Sequence[Row],
    front: Sequence[Row],
    figures: Sequence[Path],
    command: str,
    environment: Mapping[str, Any],
) -> None:
    """Write the page of a run with several budgets; arguments as of `write_report`.

    Raises: EvoPressError if the file cannot be written.
    """
    shown = pictures(figures)
    kept = result.get("kept")
    picked = str(kept["answer"] if kept else front[-1]["budget"] if front else "2.5")
    asked = {
        "budgets": ", ".join(str(row["budget"]) for row in front),
        **({key: kept[key] for key in ("max_kl", "min_agreement") if key in kept} if kept else {}),
        "method": (config.get("method") or {}).get("name"),
        "strategy": ((config.get("search") or {}).get("strategy") or {}).get("name", "evolution"),
        "scale": (config.get("scale") or {}).get("name"),
        "fitness": (config.get("fitness") or {}).get("name"),
        "seed": config.get("seed"),
    }
    parts = [
        section("What was asked", pairs(asked)),
        section(
            "The front", paragraph(front_words(rows, front, kept), kind="lead") + shown.get("front", "") + _front_table(rows, front)
        ),
        section("All that was measured", details("every row", _table(rows))),
        section(
            "Take one of them",
            code(f"python -m evopress resume=RUN_FOLDER pick={picked} 'stages=[export]'")
            + paragraph(
                "Without stages it is also measured again and gets a page of its own, with what its search did; all of it lies in "
                f"points/{picked} of the run folder."
            ),
        ),
        section("What it cost", account.costs(result, [])),
        section("Run it again", code(command)),
        section("Environment", pairs({key: value for key, value in environment.items() if key != "schema"})),
        section("Configuration", details("the whole composed config", code(json_text(config))) if config else ""),
    ]
    write_page(path, title=title, parts=parts)


def _columns(front: Sequence[Row]) -> list[Column]:
    """Return the columns of a front; what its rows spent is what their searches took, which has a column of its own."""
    return [column for column in results_columns(front) if column.header != "tokens spent"]


def _front_table(rows: Sequence[Row], front: Sequence[Row]) -> str:
    if not front:
        return ""
    columns = _columns(front)
    body = []
    for index, row in enumerate(front):
        best, tokens = best_baseline(rows, row), number(row["spent"].get("tokens"))
        cells = [escape(str(row["budget"])), *(escape(column.cell(index)) for column in columns)]
        cells += [
            "" if tokens is None else f"{tokens:,.0f}",
            "" if best is None else f"{escape(display_name(str(best['name'])))}: {_kl(best)}",
        ]
        body.append((cells, ""))
    headers = ["budget", *(escape(column.header) for column in columns), "tokens of the search", "best baseline's KL"]
    note = (
        "KL: nats per token against the dense model on held-out text; ppl: perplexity; both lower is better. Size if packed: of a "
        "file that holds every level as the level database stores it. Tokens of a search count those that go backward three times."
    )
    return table(headers, body) + paragraph(note, kind="note")


def _table(rows: Sequence[Row]) -> str:
    columns = results_columns(rows)
    body = [
        ([escape(display_name(str(row.get("name", "")))), *(escape(column.cell(index)) for column in columns)], "")
        for index, row in enumerate(rows)
    ]
    return table(["", *(escape(column.header) for column in columns)], body) if rows else ""


def _kl(row: Row) -> str:
    value = held_out_kl(row)[1]
    return "" if value is None else significant(value)


def _megabytes(row: Row) -> str:
    size = number(row.get("bytes"))
    return "" if size is None else f" ({millions(size)} MB if packed)"
