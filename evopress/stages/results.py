"""What a run folder's `result.json` says so far."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from evopress.errors import EvoPressError
from evopress.reporting.records import read_document


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
