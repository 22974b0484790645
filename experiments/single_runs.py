"""Jobs of an experiment that is no sweep: each a command in a folder of its own, with what it says in a file beside that."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Iterator, MutableSet, Sequence
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


def evopress(folder: Path, *arguments: str, running: MutableSet[subprocess.Popen[bytes]] | None = None) -> bool:
    """Run, or go on with, one job; tell whether it ended well.

    Args: running: has the job's process while it runs.
    """
    if (folder / "finished.json").exists():
        return True
    return logged([sys.executable, "-m", "evopress", *arguments, f"hydra.run.dir={folder}"], folder, running=running)


def logged(command: Sequence[str], folder: Path, *, running: MutableSet[subprocess.Popen[bytes]] | None = None) -> bool:
    """Run a command, with what it says in a file beside a folder; tell whether it ended well. Arguments as of `evopress`."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    running = set() if running is None else running
    with _log(folder).open("a", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        running.add(process)
        try:
            return process.wait() == 0
        finally:
            running.discard(process)


def evopress_all(runs: Iterable[SingleRun], *, at_once: int = 1) -> Iterator[tuple[SingleRun, bool]]:
    """Run, or go on with, jobs, so many at once; yield each as it ends, and whether it ended well.

    Several at once pay on a GPU, which one search of a small model leaves idle most of the time; on a CPU with a thread each.
    Whoever stops taking stops the jobs.
    """
    running: set[subprocess.Popen[bytes]] = set()
    with ThreadPoolExecutor(at_once) as pool:
        pending = {pool.submit(evopress, run.folder, *run.arguments, running=running): run for run in runs}
        try:
            for future in as_completed(pending):
                yield pending[future], future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(running):
                process.terminate()


def why_it_failed(folder: Path) -> str:
    """Return the last error that a job has said."""
    lines = _log(folder).read_text(encoding="utf-8").splitlines() if _log(folder).exists() else []
    return next((line.removeprefix("error: ") for line in reversed(lines) if line.startswith("error")), "see its log")


def folder_name(words: str) -> str:
    """Return words as part of a folder's name."""
    return words.replace(", ", "-").replace(" ", "-")


def _log(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.log")
