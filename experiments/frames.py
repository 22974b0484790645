"""Frames of results as CSV files, written whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from evopress.files import write_bytes

if TYPE_CHECKING:
    import pandas as pd


def write_frame(path: Path, frame: pd.DataFrame, *, digits: str | None = "%.6g") -> None:
    """Write a frame without its index, floats by the format `digits`; null: all their digits.

    Raises: EvoPressError if the folder cannot be written to, or the disk is full; an earlier file is then as it was.
    """
    write_bytes(path, frame.to_csv(index=False, float_format=digits).encode())
