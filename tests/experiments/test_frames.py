"""Frames as files: what to_csv writes, whole or not at all."""

from __future__ import annotations

import errno
from pathlib import Path

import pandas as pd
import pytest

from evopress.errors import EvoPressError
from experiments.frames import write_frame

FRAME = pd.DataFrame({"row": ["guided", "evolution, from dp"], "kl": [1 / 3, None], "seed": [0, 1]})


@pytest.mark.parametrize("digits", ["%.6g", "%.4g", None])
def test_a_frame_is_written_as_pandas_writes_it(digits: str | None, tmp_path: Path) -> None:
    FRAME.to_csv(tmp_path / "pandas.csv", index=False, float_format=digits)
    write_frame(tmp_path / "ours.csv", FRAME, digits=digits)
    assert (tmp_path / "ours.csv").read_bytes() == (tmp_path / "pandas.csv").read_bytes()


def test_a_full_disk_leaves_the_earlier_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is, and nothing beside it."""
    write_frame(tmp_path / "results.csv", FRAME)
    earlier = (tmp_path / "results.csv").read_bytes()

    def fill(path: Path, data: bytes) -> None:
        with path.open("wb") as file:
            file.write(data[:8])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fill)
    with pytest.raises(EvoPressError, match=r"No space left|full"):
        write_frame(tmp_path / "results.csv", pd.concat([FRAME, FRAME]))
    assert (tmp_path / "results.csv").read_bytes() == earlier and len(list(tmp_path.iterdir())) == 1
