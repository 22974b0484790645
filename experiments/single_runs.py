"""Jobs of an experiment that is no sweep: each a command in a folder of its own, with what it says in a file beside that."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def evopress(folder: Path, *arguments: str) -> bool:
    """Run, or go on with, one job; tell whether it ended well."""
    if (folder / "finished.json").exists():
        return True
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "evopress", *arguments, f"hydra.run.dir={folder}"]
    with _log(folder).open("a", encoding="utf-8") as log:
        return subprocess.run(command, stdout=log, stderr=log, check=False).returncode == 0


def why_it_failed(folder: Path) -> str:
    """Return the last error that a job has said."""
    lines = _log(folder).read_text(encoding="utf-8").splitlines() if _log(folder).exists() else []
    return next((line.removeprefix("error: ") for line in reversed(lines) if line.startswith("error")), "see its log")


def folder_name(words: str) -> str:
    """Return words as part of a folder's name."""
    return words.replace(", ", "-").replace(" ", "-")


def _log(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.log")
