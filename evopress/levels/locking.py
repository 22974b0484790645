"""One writer at a time in a folder that several runs share: a level database, or a store of Hessians."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from evopress.errors import EvoPressError
from evopress.files import explained

logger = logging.getLogger(__name__)
LOCK_TIMEOUT = 600.0
"""Seconds to wait for another process that writes a file or two."""
TEMPORARIES = (".*.tmp", ".tmp*")
"""Those of `write_atomically`, and safetensors' own."""


@contextmanager
def alone_in(
    folder: Path, *, timeout: float | None = None, temporaries: tuple[str, ...] = TEMPORARIES, waiting: str = ""
) -> Iterator[None]:
    """Let no other process write to a folder, and remove what one that was killed has left half-written there.

    Args:
        timeout: seconds to wait for another process; None: `LOCK_TIMEOUT`.
        temporaries: patterns of names to remove.
        waiting: said when there is one.

    Raises: EvoPressError if another process never stops writing, or this one may not.
    """
    lock = FileLock(lock_of(folder))
    timeout = LOCK_TIMEOUT if timeout is None else timeout
    try:
        if not _taken(lock):
            if waiting:
                logger.info("%s", waiting)
            lock.acquire(timeout=timeout)
    except Timeout:
        raise EvoPressError(
            f"another process has held {lock.lock_file} for {timeout:g} s: end it, or use another level_db.root"
        ) from None
    except OSError as error:
        raise explained(error, Path(lock.lock_file)) from error
    try:
        for pattern in temporaries:
            for path in folder.glob(pattern):
                path.unlink(missing_ok=True)
        yield
    except OSError as error:
        raise explained(error, folder) from error
    finally:
        with suppress(OSError):  # the system frees it with the process
            lock.release()


def clear(folder: Path) -> None:
    """Remove what a killed process has left half-written in a folder, unless another one is at work there."""
    if any(next(folder.glob(pattern), None) for pattern in TEMPORARIES):
        with suppress(OSError, EvoPressError), alone_in(folder, timeout=0.0):
            pass


def lock_of(folder: Path) -> Path:
    """Return the lock's path: beside the folder, so that removing the folder does not remove it from under its holder."""
    return folder.with_name(f"{folder.name}.lock")


def _taken(lock: FileLock) -> bool:
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    return True
