"""What a run folder's `result.json` says so far."""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

from evopress.errors import EvoPressError
from evopress.reporting.records import read_document, write_json

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


def forget_found(run_dir: Path, names: Collection[str] = OF_FOUND) -> None:
    """Take rows of what was found out of the results: something else stands in its place, which nobody has measured."""
    result = read_result(run_dir)
    rows = [row for row in result.get("rows", []) if row["name"] not in names]
    if len(rows) < len(result.get("rows", [])):
        logger.info("results of the previous genome are removed: the stage evaluate measures the new one")
        write_json(run_dir / "result.json", {key: value for key, value in result.items() if key != "refine"} | {"rows": rows})
