"""The folder of a run: one run at a time, what a killed one left behind cleared away, and the overrides to go on with."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from evopress.errors import EvoPressError
from evopress.files import explained, write_bytes
from evopress.reporting.records import read_document, write_json

LOCK = ".lock"
"""Held while a run is at work; the kernel frees it when the process ends, however it ends, so a file that is left means nothing."""
_OVERRIDES = Path(".hydra", "overrides.json")


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a run folder for one run, and clear away the temporary files of an earlier one that was killed.

    Raises: EvoPressError if another run is at work there, or the folder cannot be written to.
    """
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise EvoPressError(
            f"another run is at work in {folder}: wait for its end, or give this one a folder of its own (hydra.run.dir=DIR)"
        ) from None
    except OSError as error:
        raise explained(error, folder / LOCK) from error
    try:
        for path in (*folder.glob(".*.tmp"), *folder.glob("*/.*.tmp")):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        yield
    finally:
        lock.release()


def keep_overrides(folder: Path, overrides: Sequence[str]) -> None:
    """Keep the overrides of a run that begins.

    Hydra's own file is rewritten by runs that are refused, too, and is empty for a moment.
    """
    (folder / _OVERRIDES).parent.mkdir(exist_ok=True)
    write_json(folder / _OVERRIDES, {"schema": 1, "overrides": list(overrides)})


def kept_overrides(folder: Path) -> list[str] | None:
    """Return the overrides that a run in the folder began with; None if none did."""
    if not (folder / _OVERRIDES).is_file():
        return None
    overrides = read_document(folder / _OVERRIDES, what="list of overrides").get("overrides")
    if not isinstance(overrides, list) or not all(isinstance(override, str) for override in overrides):
        raise EvoPressError(
            f"{folder / _OVERRIDES} holds no list of overrides: remove it, {folder / '.hydra' / 'overrides.yaml'} has them"
        )
    return overrides


@contextmanager
def kept_if_refused(folder: Path, *, dry_run: bool = False) -> Iterator[None]:
    """Give a run folder its own settings back if those that it is started with again are refused before the search goes on.

    Args: dry_run: give them back in any case.
    """
    files = [*(folder / ".hydra").glob("*.yaml"), folder / _OVERRIDES, folder / "environment.json"]
    before = {path: path.read_bytes() if path.is_file() else None for path in files}
    checkpoint = _changed(folder / "state.json")
    try:
        yield
    except SystemExit as stop:
        if stop.code == 1 and _changed(folder / "state.json") == checkpoint:
            _give_back(before)
        raise
    if dry_run and any(content is not None for content in before.values()):  # there was a run
        _give_back(before)


def _give_back(before: Mapping[Path, bytes | None]) -> None:
    """Let files be what they were; None: there was none."""
    with suppress(EvoPressError):  # a full disk was told already
        for path, content in before.items():
            if content is None:
                path.unlink(missing_ok=True)
            else:
                write_bytes(path, content)


def _changed(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0
