"""Files that are never half there: written beside their place, synced, renamed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from evopress.errors import EvoPressError

_MADE_BY_DEFAULT = re.compile(r"multirun|debug|\d{4}-\d\d-\d\d")
"""Folders around a run's that nobody named."""
_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)


def sha256_file(path: Path) -> str:
    """Return a file's SHA-256, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def shown_path(path: str | Path) -> str:
    """Return a path relative to the working directory where it lies below it."""
    return str(Path(path).relative_to(Path.cwd()) if Path(path).is_relative_to(Path.cwd()) else Path(path))


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, sync it and rename it to `path`.

    Raises: EvoPressError if the disk is full, or the folder cannot be written; nothing is left behind.
    """
    temporary = temporary_beside(path)
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise explained(error, path) from error
    finally:
        with suppress(OSError):  # of a disk that already failed; the error on its way says more
            temporary.unlink(missing_ok=True)


def write_bytes(path: str | Path, data: bytes) -> None:
    """Replace a file as a whole or not at all.

    Raises: EvoPressError if the folder cannot be written to; the old file is then as it was.
    """
    write_atomically(Path(path), lambda temporary: _fill(temporary, data))


def _fill(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def temporary_beside(path: Path) -> Path:
    """Name a temporary file beside `path` that no other process or thread names, on this machine or another: `.NAME.….tmp`."""
    return path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp")


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable, where the file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # what file systems say that cannot
            raise
    finally:
        os.close(descriptor)


def explained(error: OSError, path: Path) -> EvoPressError:
    """Turn an operating system's error about `path` into one sentence."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return EvoPressError(f"the disk is full while writing {path}: free some space and start the same command again, it goes on")
    if error.errno in _READ_ONLY:
        return EvoPressError(f"{path} cannot be written ({error.strerror}): choose a folder that you may write to")
    return EvoPressError(f"{path} cannot be written ({error.strerror or error}): check the folder and the disk")


def unreadable(error: OSError, path: Path) -> EvoPressError:
    """Turn an operating system's error on reading `path`, which made it before and can make it again, into one sentence."""
    return EvoPressError(
        f"{path} cannot be read ({error.strerror or error}): check the disk and the permissions, and start again; "
        "if the file is lost, remove it, and it is made again"
    )


def given_path(given: str | Path, what: str) -> Path:
    """Return a path that a person gave, its `~` expanded; there need be nothing at it.

    Args: what: the setting: "model.path".

    Raises: EvoPressError if no file can have it: empty, too long, or of a user who is not there.
    """
    if not str(given):  # of a shell's variable that is not set; the working directory is nobody's wish
        raise EvoPressError(f"{what}= names no path: give one, or leave it out")
    try:
        path = Path(given).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, PermissionError):
            return path
        reason = getattr(error, "strerror", None) or str(error)
        raise EvoPressError(f"{what}={given!s:.100} is no path that can be opened ({reason}): give another one") from error
    return path


def make_folder(folder: Path) -> Path:
    """Create a folder and check that files can be written there.

    Raises: EvoPressError if not.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"x")
    except OSError as error:
        raise explained(error, folder) from error
    return folder


def open_folder(folder: Path) -> Path:
    """Create a folder, or take one that has something in it and may only be read: what a group shares.

    Raises: EvoPressError if it is neither.
    """
    try:
        return make_folder(folder)
    except EvoPressError as error:
        if not is_read_only(error) or not folder.is_dir() or not any(folder.iterdir()):
            raise
    return folder


def is_read_only(error: EvoPressError) -> bool:
    """Tell whether what could not be written is a place that this user, or anybody, may only read."""
    return isinstance(error.__cause__, OSError) and error.__cause__.errno in _READ_ONLY


def canonical_json(data: Any) -> str:
    """Serialise JSON with sorted keys and no spaces, for digests."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def seal(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON object with its own digest, so that any change of its content shows."""
    return {**record, "digest": _digest(record)}


def is_sealed(record: Mapping[str, Any]) -> bool:
    """Tell whether a JSON object has its own digest, the one of its content."""
    return record.get("digest") == _digest(record)


def _digest(record: Mapping[str, Any]) -> str:
    """SHA-256 over an object's content without the digest itself."""
    return hashlib.sha256(canonical_json({key: record[key] for key in record if key != "digest"}).encode()).hexdigest()


def remove_empty(folder: Path) -> None:
    """Remove a folder of a run or a sweep if nothing is in it, and the empty ones around it that nobody named."""
    with suppress(OSError):  # something is in it
        folder.rmdir()
        for parent in folder.parents:
            if not _MADE_BY_DEFAULT.fullmatch(parent.name):
                break
            parent.rmdir()
