"""Write what was measured: results.csv, table.md, machine.json, where_time_goes.csv, growth.csv and figures; read it again."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evopress.errors import EvoPressError
from evopress.files import make_folder, write_bytes
from experiments.benchmark import figures
from experiments.benchmark.rows import Row
from experiments.benchmark.sizes import Size
from experiments.benchmark.tables import markdown, memory_table, times_table
from experiments.benchmark.targets import targets_table, yardstick_table


def write_results(
    folder: Path,
    size: Size,
    rows: Sequence[Row],
    *,
    parts: Sequence[str],
    where: Sequence[Mapping[str, Any]],
    growth: Sequence[Mapping[str, Any]],
    machine: Mapping[str, Any],
) -> str:
    """Write all files and return the text of table.md; rows of parts that were not measured now stay as they were.

    Args:
        parts: those measured now.
        where: rows of where_time_goes.csv.
        growth: rows of growth.csv.
    """
    make_folder(folder)
    kept = [row for row in read_rows(folder) if row.part not in parts]
    order = {part: i for i, part in enumerate(size.parts)}
    everything = sorted([*kept, *rows], key=lambda row: order.get(row.part, len(order)))
    write_bytes(folder / "results.csv", _csv([row.to_dict() for row in everything]).encode())
    said = []
    for name, new, draw in (("where_time_goes", where, figures.where_time_goes), ("growth", growth, figures.growth)):
        if new:
            write_bytes(folder / f"{name}.csv", _csv(new).encode())
            said.append(draw(new, folder))
    write_bytes(folder / "machine.json", (json.dumps(_history(folder, machine, parts), indent=1, sort_keys=True) + "\n").encode())
    text = _text(folder, size, everything, machine, [sentence for sentence in said if sentence])
    write_bytes(folder / "table.md", text.encode())
    return text


def read_rows(folder: Path) -> list[Row]:
    """Read results.csv; none where there is none.

    Raises: EvoPressError if it is no file of ours.
    """
    path = folder / "results.csv"
    if not path.is_file():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [Row.of_dict(values) for values in csv.DictReader(file)]
    except (OSError, ValueError, TypeError) as error:
        raise EvoPressError(f"{path} cannot be read ({error}): remove it and measure again") from None


def _text(folder: Path, size: Size, rows: Sequence[Row], machine: Mapping[str, Any], said: Sequence[str]) -> str:
    failed = [row for row in rows if row.error]
    measured = [row for row in rows if row.part != "growth"]
    parts = [
        f"# Benchmark, size {size.name}",
        f"{size.about}, {size.dtype} on {machine['device']}; {machine['machine']}; "
        f"revision {machine['git_revision']}, torch {machine['torch']}"
        + (f"; {machine['label']}" if machine.get("label") else "")
        + ".",
        "Medians of the timed passes. Fast is the code that runs, plain the obvious way to the same result, ratio how many times "
        "faster. The limit is what the matrix products that the work needs would take at the rate measured in this run for their "
        "shapes and dtype.",
        times_table(measured).rstrip("\n"),
        "Peak is the greatest resident memory of the process, working what the path itself adds to it.",
        memory_table(measured).rstrip("\n"),
    ]
    if size.model == "smollm2_135m":
        parts += ["## Targets", targets_table(rows).rstrip("\n")]
        if "yardstick" in size.parts:
            parts += ["## Yardstick", yardstick_table(rows).rstrip("\n")]
    growing = [row for row in rows if row.part == "growth" and not row.error]
    if growing:
        body = [[row.part, row.case, row.note] for row in growing]
        parts += ["## Growth", markdown(["part", "work and axis", "fit"], body, text_columns=3).rstrip("\n")]
    if failed:
        parts += ["## Failed", "\n".join(f"- {row.part}: {row.error}" for row in failed)]
    parts += [*said]
    return "\n\n".join(parts) + "\n"


def _history(folder: Path, machine: Mapping[str, Any], parts: Sequence[str]) -> dict[str, Any]:
    """Return machine.json: where each part was measured last, whatever the order."""
    try:
        before = json.loads((folder / "machine.json").read_text(encoding="utf-8"))["parts"]
    except (OSError, ValueError, KeyError, TypeError):
        before = {}
    return {"schema": 1, "parts": {**before, **{part: dict(machine) for part in parts}}}


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows with eight digits, whole numbers in full, NaN blank."""
    text = io.StringIO()
    names = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: _cell(value) for key, value in row.items()})
    return text.getvalue()


def _cell(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    if math.isnan(value):
        return ""
    return str(int(value)) if value.is_integer() and abs(value) < 1e15 else f"{value:.8g}"


def cpu_name() -> str:
    """Name the processor; its number of cores where the system does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), f"{os.cpu_count()} cores")
