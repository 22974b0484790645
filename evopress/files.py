"""Files that are never half there: written beside their place, synced, renamed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from evopress.errors import EvoPressError


def sha256_file(path: Path) -> str:
    """Return a file's SHA-256, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, sync it and rename it to `path`.

    Raises: EvoPressError if the disk is full, or the folder cannot be written; nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise explained(error, path) from error
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable, where the system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def explained(error: OSError, path: Path) -> EvoPressError:
    """Turn an operating system's error about `path` into one sentence."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return EvoPressError(f"the disk is full while writing {path}: free some space and start the same command again, it goes on")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return EvoPressError(f"{path} cannot be written ({error.strerror}): choose a folder that you may write to")
    return EvoPressError(f"{path} cannot be written ({error.strerror or error}): check the folder and the disk")


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


def canonical_json(data: Any) -> str:
    """Serialise JSON with sorted keys and no spaces, for digests."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
