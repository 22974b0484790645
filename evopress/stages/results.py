"""What a run folder's `result.json` says so far."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from evopress.reporting.records import read_json


def read_result(run_dir: Path) -> dict[str, Any]:
    """Return the results that earlier stages wrote, or none but the schema."""
    path = run_dir / "result.json"
    return read_json(path) if path.exists() else {"schema": 1}
