"""Lay out the rows of `result.json` as tables: a data frame, CSV, Markdown, and text for the terminal."""

from __future__ import annotations

import csv
import io
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evopress.files import write_bytes
from evopress.progress import millions
from evopress.reporting.differences import Difference

if TYPE_CHECKING:
    import pandas as pd

Row = Mapping[str, Any]

_SLACK = 1.002
"""Genomes that spend this much more than another still count as of the same budget."""

LARGER = " (a larger budget)"
"""After the name of what spends more than it is beside."""
_NAMES = {
    "dp": "DP",
    "evopress": "EvoPress",
    "evopress_blocks": "EvoPress (Attn.+MLP)",
    "evopress_refined": "EvoPress, refined",
    "owl": "OWL",
    "shortgpt": "ShortGPT",
    "sliding_window": "Cosine Similarity (Window)",
    "weight_subcloning": "Weight Subcloning",
    "shortened_llama": "Shortened Llama",
    "shortened_llama_kl": "Shortened Llama (KL)",
    "l2_normalized": "l2 normalized",
}


@dataclass(frozen=True)
class Column:
    """One column of the results: a number for each row, or None where it does not apply."""

    header: str
    values: tuple[float | None, ...]
    show: Callable[[float], str]
    best: Callable[[Iterable[float]], float] | None = None
    """`min` or `max` where the column is a quality; None where it is a size."""
    stderrs: tuple[float | None, ...] = ()
    """Standard errors of the values, where they are known."""
    sequences: tuple[Sequence[float] | None, ...] = ()
    """What the values are means of, sequence by sequence of the same text, where it was kept."""
    paired: str = ""
    """What the numbers of sequences are, where that is not what the header says: perplexities are compared as logarithms."""

    def difference(self, row: int, other: int) -> Difference:
        """Compare two rows sequence by sequence; nothing is paired where it was not kept."""
        ours, theirs = (self.sequences[index] if self.sequences else None for index in (row, other))
        return Difference.of_sequences(ours or (), theirs or ())

    def ties(self, row: int, other: int) -> bool:
        """Tell whether two rows differ by no more than chance: their standard error, paired by sequence, says so."""
        return self.difference(row, other).is_tie

    def cell(self, row: int, *, with_stderr: bool = False) -> str:
        """Show one value with sensible digits; a missing one is blank."""
        value = self.values[row]
        if value is None:
            return ""
        stderr = self.stderrs[row] if with_stderr and self.stderrs else None
        error = "" if stderr is None else self.show(stderr)
        return f"{self.show(value)} ± {error}" if error.strip("0.") else self.show(value)  # 0, or what rounding leaves of it


def display_name(name: str) -> str:
    """Return a row's name as people read it: "best_of_32" becomes "best of 32", "dp@2.5" "DP at 2.5"; files stay."""
    if "/" in name:
        return name
    name, at, budget = name.partition("@")
    if at:
        return f"{display_name(name)} at {budget}"
    name, plus, more = name.partition("+")
    return _NAMES.get(name, re.sub(r"(?<!Q\d)_", " ", name)) + (f" + {more.replace('_', ' ')}" if plus else "")


def is_found(name: str) -> bool:
    """Tell whether a row is what the run found, "evopress" or "evopress_refined", and no baseline."""
    name = name.partition("@")[0]
    return name.partition("+")[0] == "evopress" or name == "evopress_refined"


def is_baseline(name: str) -> bool:
    """Tell whether a row is what the found genome is compared with: neither found nor dense."""
    return name not in ("", "dense") and not is_found(name)


def held_out_kl(row: Row) -> tuple[str | None, float | None]:
    """Return a row's held-out KL on the run's own text, and that text's name; rows of early versions know no name."""
    by_data_set = row.get("kl_by_data_set")
    if isinstance(by_data_set, Mapping) and by_data_set:
        name, value = next(iter(by_data_set.items()))
        return str(name), number(value)
    return None, number(row.get("kl"))


def spends_more(row: Row, ours: Row) -> bool:
    """Tell if a row is of a larger budget than ours: it says so, or it has more bits, less sparsity, or fewer modules dropped."""
    if isinstance(row.get("within_budget"), bool) and ours.get("within_budget") is True:
        return not row["within_budget"]
    for key, sign in (("bits_per_weight", 1), ("sparsity", -1), ("modules_dropped", -1)):
        theirs, limit = number(row.get(key)), number(ours.get(key))
        if theirs is not None and limit is not None:
            return theirs > limit * _SLACK if sign > 0 else theirs * _SLACK < limit
    return False


def by_sequence(row: Row, data_set: str | None, measure: str) -> Sequence[float] | None:
    """Return a row's measure ("nll", or one of `MEANS`) on each sequence of a data set; None where it was not kept."""
    kept: Any = row.get("by_sequence")
    for key in (data_set, measure):
        kept = kept.get(key) if isinstance(kept, Mapping) else None
    if not isinstance(kept, list | tuple) or not kept or any(number(value) is None for value in kept):
        return None
    return kept


def _standard_error(row: Row, data_set: str, measure: str) -> float | None:
    """Return the standard error over sequences of what a row measures against the dense model; None where it is 0 or not known."""
    kept = by_sequence(row, data_set, measure) or ()
    return number(Difference.of_sequences(kept, [0.0] * len(kept)).standard_error) or None


def number(value: Any) -> float | None:
    """Return a finite number as it is and anything else as None."""
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        return None
    return int(value) if isinstance(value, Integral) else float(value)


def significant(value: float, digits: int = 4) -> str:
    """Show a number with so many significant digits: 0.81234 is "0.8123"."""
    if value == 0 or not 1e-6 <= abs(value) < 1e6:
        return f"{value:.{digits}g}"
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


MEANS: Mapping[str, tuple[str, Callable[[float], str], Callable[[Iterable[float]], float]]] = {
    "kl": ("held-out KL", significant, min),
    "top1_agreement": ("top-1 agreement", "{:.4f}".format, max),
    "acceptance_rate": ("acceptance rate", "{:.4f}".format, max),
    "flips": ("flips", "{:.4f}".format, min),
}
"""What is measured on held-out text as a mean over tokens: its key in rows and records to what people read, which way is good."""


def told(difference: Difference, best: Callable[[Iterable[float]], float] | None) -> str:
    """Show a difference with its standard error and what may be said of it: "0.169 ± 0.028 (worse)"; blank without pairs.

    Args: best: `min` or `max`, which way the measure is good.
    """
    if not difference.num_pairs:
        return ""
    error = f" ± {significant(difference.standard_error, 2)}" if difference.decided else ""
    return f"{significant(difference.mean, 3)}{error} ({difference.verdict(best)})"


def told_differences(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Return headers and lines of a table: other compressed rows' differences to EvoPress in all that is paired by sequence.

    None where nothing was found, or early versions kept no numbers of sequences.
    """
    place = next((index for index, row in enumerate(rows) if row.get("name") == "evopress"), None)
    columns = [column for column in results_columns(rows) if column.best is not None and column.sequences]
    if place is None:
        return [], []
    lines = [
        [
            display_name(str(row.get("name", ""))) + (LARGER if spends_more(row, rows[place]) else ""),
            *(told(column.difference(index, place), column.best) for column in columns),
        ]
        for index, row in enumerate(rows)
        if index != place and row.get("name") != "dense"
    ]
    lines = [line for line in lines if any(line[1:])]
    return (["difference to EvoPress", *(column.paired or column.header for column in columns)] if lines else []), lines


def results_columns(rows: Sequence[Row]) -> list[Column]:
    """Return the columns that at least one row has a number for, in reading order."""

    def column(
        header: str,
        value: Callable[[Row], Any],
        show: Callable[[float], str],
        best: Callable[[Iterable[float]], float] | None = None,
        stderr: Callable[[Row], Any] | None = None,
        sequences: Callable[[Row], Sequence[float] | None] | None = None,
        paired: str = "",
    ) -> Column:
        stderrs = () if stderr is None else tuple(number(stderr(row)) for row in rows)
        kept = () if sequences is None else tuple(map(sequences, rows))
        return Column(header, tuple(number(value(row)) for row in rows), show, best, stderrs, kept, paired)

    def on_each_text(name: str, key: str, show: Callable[[float], str], best: Callable[[Iterable[float]], float]) -> list[Column]:
        """Return a column per data set and, of several, their mean, which says of how many; early versions kept the mean alone."""
        texts = _inner_keys(rows, f"{key}_by_data_set")
        columns = [
            column(
                f"{name} {text}",
                partial(_inner, outer=f"{key}_by_data_set", key=text),
                show,
                best,
                stderr=partial(_standard_error, data_set=text, measure=key),
                sequences=partial(by_sequence, data_set=text, measure=key),
            )
            for text in texts
        ]
        if len(texts) != 1:
            mean = f"{name}, mean of {len(texts)} data sets" if texts else name
            columns.append(column(mean, lambda row: row.get(key), show, best))
        return columns

    columns = [
        column("bits per weight", lambda row: row.get("bits_per_weight"), "{:.3f}".format),
        column("bits per weight with metadata", lambda row: row.get("bits_per_weight_with_metadata"), "{:.3f}".format),
        column("sparsity", lambda row: row.get("sparsity"), "{:.3f}".format),
        column("weights kept", lambda row: row.get("weights_kept"), "{:,.0f}".format),
        column("modules dropped", lambda row: row.get("modules_dropped"), "{:.0f}".format),
        column("experts dropped", lambda row: row.get("experts_dropped"), "{:.0f}".format),
        column("size MB if packed", lambda row: _megabytes(row.get("bytes")), _show_megabytes),
        column("MB read per token", lambda row: _megabytes(row.get("bytes_read_per_token")), _show_megabytes),
        column("checkpoint MB", lambda row: _megabytes(row.get("checkpoint_bytes")), _show_megabytes),
        *(column(f"{name} MB", partial(_exported_megabytes, name=name), _show_megabytes) for name in _inner_keys(rows, "exports")),
        *(each for key, (name, show, best) in MEANS.items() for each in on_each_text(name, key, show, best)),
    ]
    for data_set in _inner_keys(rows, "perplexity"):
        columns.append(
            column(
                f"ppl {data_set}",
                partial(_inner, outer="perplexity", key=data_set),
                "{:.2f}".format,
                min,
                sequences=partial(by_sequence, data_set=data_set, measure="nll"),
                paired=f"log ppl {data_set}",
            )
        )
    for task in _inner_keys(rows, "zero_shot"):
        accuracy, stderr = (partial(_inner, outer=outer, key=task) for outer in ("zero_shot", "zero_shot_stderr"))
        columns.append(column(f"zero-shot {task}", accuracy, "{:.4f}".format, max, stderr))
    columns += [
        column(
            "zero-shot mean",
            lambda row: row.get("zero_shot_mean"),
            "{:.4f}".format,
            max,
            lambda row: row.get("zero_shot_mean_stderr"),
        ),
        column("flip rate", lambda row: row.get("flip_rate"), "{:.4f}".format, min),
        column("tokens spent", lambda row: row.get("tokens_spent"), "{:,.0f}".format),
    ]
    return [column for column in columns if any(value is not None for value in column.values)]


def results_frame(rows: Sequence[Row]) -> pd.DataFrame:
    """Return the rows as a data frame: `name`, then one column per measure in full precision, NaN where it is missing.

    Units: sizes in MB (10^6 bytes), KL in nats per token, agreement and accuracies in [0, 1].
    """
    import pandas as pd

    data: dict[str, Any] = {"name": [str(row.get("name", "")) for row in rows]}
    data.update(
        (column.header, pd.Series([math.nan if value is None else value for value in column.values], dtype=float))
        for column in results_columns(rows)
    )
    return pd.DataFrame(data)


def write_tables(rows: Sequence[Row], folder: Path, *, said: str = "") -> list[Path]:
    """Write `results.csv` (full precision, for programs) and `results.md` (rounded, for people); return their paths.

    Args: said: what the rows show, in words, for below the table of `results.md`.
    """
    columns = results_columns(rows)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["name", *(column.header for column in columns)])
    for index, row in enumerate(rows):
        values = [column.values[index] for column in columns]
        writer.writerow([row.get("name", ""), *("" if value is None else value for value in values)])
    paths = [Path(folder) / "results.csv", Path(folder) / "results.md"]
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    write_bytes(paths[0], text.getvalue().encode())
    headers, lines = told_differences(rows)
    paired = f"\n{_markdown_lines([headers, *lines])}" if lines else ""
    write_bytes(paths[1], (_markdown(rows, columns) + paired + (f"\n{said}\n" if said else "")).encode())
    return paths


def format_table(rows: Sequence[Row]) -> str:
    """Return the rows as aligned plain text, long headers wrapped, without a newline at the end."""
    columns = results_columns(rows)
    cells = [[display_name(str(row.get("name", ""))), *(c.cell(i) for c in columns)] for i, row in enumerate(rows)]
    headers = [textwrap.wrap(header, 12, break_long_words=False) for header in ("name", *(column.header for column in columns))]
    height = max(len(header) for header in headers)
    padded = [[""] * (height - len(header)) + header for header in headers]
    lines = [list(line) for line in zip(*padded, strict=True)]
    widths = [max(len(line[column]) for line in lines + cells) for column in range(len(headers))]

    def aligned(line: Sequence[str]) -> str:
        numbers = (f"{cell:>{width}}" for cell, width in zip(line[1:], widths[1:], strict=True))
        return "  ".join([f"{line[0]:<{widths[0]}}", *numbers]).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([*map(aligned, lines), rule, *map(aligned, cells)])


def markdown_table(rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table, rounded for people."""
    return _markdown(rows, results_columns(rows))


def _markdown(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    return _markdown_lines(
        [
            ["name", *(column.header for column in columns)],
            *(
                [display_name(str(row.get("name", ""))), *(c.cell(i, with_stderr=True) for c in columns)]
                for i, row in enumerate(rows)
            ),
        ]
    )


def _markdown_lines(lines: list[list[str]]) -> str:
    lines = [lines[0], ["---", *("---:" for _ in lines[0][1:])], *lines[1:]]
    return "".join("| " + " | ".join(_no_pipes(cell) for cell in line) + " |\n" for line in lines)


def _no_pipes(cell: str) -> str:
    return " ".join(cell.split()).replace("|", "\\|")


def _megabytes(value: Any) -> float | None:
    count = number(value)
    return None if count is None else count / 1e6


def _show_megabytes(value: float) -> str:
    return millions(1e6 * value)


def _exported_megabytes(row: Row, name: str) -> float | None:
    """Return what a row's genome takes in an exported format."""
    export = _inner(row, "exports", name)
    return _megabytes(export.get("bytes")) if isinstance(export, Mapping) else None


def _inner(row: Row, outer: str, key: str) -> Any:
    values = row.get(outer)
    return values.get(key) if isinstance(values, Mapping) else None


def _inner_keys(rows: Sequence[Row], outer: str) -> list[str]:
    """Return the keys of a nested mapping over all rows, in order of first appearance."""
    found = [row[outer] for row in rows if isinstance(row.get(outer), Mapping)]
    return list(dict.fromkeys(key for values in found for key in values))
