"""Jobs of an experiment that is no sweep: each a command in a folder of its own, with what it says in a file beside that."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class SingleRun:
    """One job."""

    folder: Path
    arguments: tuple[str, ...]
    labels: dict[str, Any] = field(default_factory=dict, hash=False)
    """What the experiment's tables call it, by column."""


def evopress(folder: Path, *arguments: str) -> bool:
    """Run, or go on with, one job; tell whether it ended well."""
    if (folder / "finished.json").exists():
        return True
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "evopress", *arguments, f"hydra.run.dir={folder}"]
    with _log(folder).open("a", encoding="utf-8") as log:
        return subprocess.run(command, stdout=log, stderr=log, check=False).returncode == 0


def evopress_all(runs: Iterable[SingleRun], *, at_once: int = 1) -> Iterator[tuple[SingleRun, bool]]:
    """Run, or go on with, jobs, so many at once; yield each as it ends, and whether it ended well.

    Several at once pay on a GPU, which one search of a small model leaves idle most of the time; on a CPU they do not.
    """
    with ThreadPoolExecutor(at_once) as pool:
        pending = {pool.submit(evopress, run.folder, *run.arguments): run for run in runs}
        for future in as_completed(pending):
            yield pending[future], future.result()


def why_it_failed(folder: Path) -> str:
    """Return the last error that a job has said."""
    lines = _log(folder).read_text(encoding="utf-8").splitlines() if _log(folder).exists() else []
    return next((line.removeprefix("error: ") for line in reversed(lines) if line.startswith("error")), "see its log")


def folder_name(words: str) -> str:
    """Return words as part of a folder's name."""
    return words.replace(", ", "-").replace(" ", "-")


def _log(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.log")
