"""What a run folder's `result.json` says so far, and which of its exported folders hold what was found."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from evopress.errors import EvoPressError
from evopress.reporting.records import read_document, read_json, write_json

logger = logging.getLogger(__name__)
REFINED_ROW = "evopress_refined"
OF_FOUND = ("evopress", REFINED_ROW)
"""Rows of what a search found."""


def read_result(run_dir: Path) -> dict[str, Any]:
    """Return the results that earlier stages wrote, or none but the schema.

    Raises: EvoPressError if the file is damaged or of a newer version.
    """
    path = run_dir / "result.json"
    if not path.exists():
        return {"schema": 1}
    result = read_document(path, what="result file")
    rows = result.get("rows", [])
    whole = isinstance(rows, list) and all(isinstance(row, dict) and isinstance(row.get("name"), str) for row in rows)
    if not whole or not all(isinstance(result.get(key, {}), dict) for key in ("search", "database", "memory", "refine")):
        raise EvoPressError(f"{path} is damaged: it is not laid out as a result file; remove it, and run the stage evaluate again")
    return result


def formats(files: Path) -> list[Path]:
    """Return the folders in a folder's `exports`, but for what a run that was killed left half written."""
    return sorted(path for path in (files / "exports").glob("*") if path.is_dir() and not path.name.startswith("."))


def exported_found(run_dir: Path) -> Iterator[tuple[str, Path]]:
    """Yield the row's name and the folder of each export, `checkpoint` among them, of the genome that `genome.json` has."""
    ours = run_dir / "genome.json"
    for folder in (run_dir / "checkpoint", *formats(run_dir)):
        theirs = folder / ours.name
        if ours.is_file() and theirs.is_file() and theirs.read_bytes() == ours.read_bytes():
            yield REFINED_ROW if _is_refined(folder) else "evopress", folder


def _is_refined(checkpoint: Path) -> bool:
    """Tell whether refined weights were exported, as far as the folder says so."""
    try:
        return "refined" in read_json(checkpoint / "evopress.json")
    except (EvoPressError, OSError, TypeError):
        return False


def forget_found(run_dir: Path, names: Collection[str] = OF_FOUND) -> None:
    """Take rows of what was found out of the results: something else stands in its place, which nobody has measured.

    What was exported of it stays, and is named. Called before `genome.json` is another one.
    """
    result = read_result(run_dir)
    rows = [row for row in result.get("rows", []) if row["name"] not in names]
    if len(rows) < len(result.get("rows", [])):
        logger.info("results of the previous genome are removed: the stage evaluate measures the new one")
        write_json(run_dir / "result.json", {key: value for key, value in result.items() if key != "refine"} | {"rows": rows})
    if left := [folder.relative_to(run_dir).as_posix() for name, folder in exported_found(run_dir) if name in names]:
        hold = "holds" if len(left) == 1 else "hold"
        logger.info("%s still %s the previous weights: the stage export writes the new ones", ", ".join(left), hold)
