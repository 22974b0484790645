"""A run that is refused leaves no folder, and in a folder that was there what was there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TINY = ("+method=quant", "+debug=tiny", "search/strategy=evolution")


@pytest.mark.parametrize(
    "arguments",
    [
        ("bit=3",),
        ("bits=few",),
        ("bits=9",),
        ("data.search_tokens=-1",),
        ("search.survivors=[2]",),
        ("-m", "bits=3,few"),
        ("-m", "bit=3,3.5"),
    ],
    ids=" ".join,
)
def test_nothing_is_left(arguments: tuple[str, ...], evopress: Callable[..., Any], tmp_path: Path) -> None:
    outcome = evopress(*(("-m",) if "-m" in arguments else ()), *TINY, *(each for each in arguments if each != "-m"))
    assert (outcome.code, len(outcome.errors)) == (1, 1), outcome.text
    assert not list(tmp_path.iterdir())


def test_what_was_there_stays(evopress: Callable[..., Any], tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    (folder / "evopress.log").write_text("mine too\n")
    assert evopress(*TINY, "bits=9", "hydra.run.dir=mine").code == 1
    assert {path.name: path.read_text() for path in folder.iterdir()} == {"notes.txt": "mine", "evopress.log": "mine too\n"}


def test_jobs_of_a_sweep_are_refused_alone(evopress: Callable[..., Any], tmp_path: Path) -> None:
    """Their sentences are in the sweep's table; the others' folders are theirs."""
    outcome = evopress("-m", *TINY, "bits=9,3.5", "stages=[database]", "hydra.sweep.dir=sweep")
    assert outcome.code == 1 and len(outcome.errors) == 1
    jobs = [path.name for path in (tmp_path / "sweep").iterdir() if path.is_dir() and path.name != ".failed"]
    assert len(jobs) == 1 and jobs[0].startswith("bits=3.5")
    assert "above the highest level" in (tmp_path / "sweep" / "jobs.csv").read_text()
