"""A disk that fails on demand: the n-th thing that is done to files below a folder raises an error of the operating system.

What is done is counted at the calls that reach the system: open for writing, write, sync, rename, remove, make a folder, change a
mode, reserve room, map, lock. A write that fails has written half. A clean run tells how many calls there are.
"""

from __future__ import annotations

import builtins
import errno
import fcntl
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save

from evopress.levels import store

LOCKS = ".lock"


@dataclass(frozen=True)
class Kind:
    """One way in which a disk fails."""

    name: str
    code: int
    lasts: bool
    """Every later call fails too, those that clean up among them."""


FULL = Kind("full disk", errno.ENOSPC, lasts=False)
STAYS_FULL = Kind("disk that stays full", errno.ENOSPC, lasts=True)
READ_ONLY = Kind("read-only from then on", errno.EROFS, lasts=True)
NO_ACCESS = Kind("no access", errno.EACCES, lasts=False)
BROKEN = Kind("input/output error", errno.EIO, lasts=False)
KINDS = (FULL, STAYS_FULL, READ_ONLY, NO_ACCESS, BROKEN)
_FREES = {"remove", "close", "lock"}
"""What a full disk does not refuse."""


@dataclass
class FaultyDisk:
    """Count what is done below `root`, and let call number `at` fail; None: none of them."""

    root: Path
    kind: Kind = FULL
    at: int | None = None
    calls: list[str] = field(default_factory=list)

    def touch(self, what: str, target: int | str | os.PathLike[str], before_failing: Callable[[], object] | None = None) -> None:
        """Count a call, and raise OSError if it is to fail."""
        path = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else os.fspath(target)
        if not path.startswith(f"{self.root}{os.sep}") and path != str(self.root):
            return
        number = len(self.calls)
        self.calls.append(what)
        if self.at is None or not (number == self.at or (self.kind.lasts and number > self.at)):
            return
        if what in _FREES and self.kind.code == errno.ENOSPC:
            return
        if before_failing is not None:
            before_failing()
        code = errno.ENOLCK if what == "lock" else self.kind.code  # flock says EACCES for a lock that is held
        raise OSError(code, os.strerror(code), path)

    @contextmanager
    def installed(self) -> Iterator[FaultyDisk]:
        """Put this disk between the program and the system."""
        with pytest.MonkeyPatch.context() as patch:
            for module, name, what, place in (
                (os, "replace", "rename", 1),
                (os, "rename", "rename", 1),
                (os, "unlink", "remove", 0),
                (os, "remove", "remove", 0),
                (os, "mkdir", "make a folder", 0),
                (os, "chmod", "change a mode", 0),
                (os, "fsync", "sync", 0),
                (os, "posix_fallocate", "reserve", 0),
            ):
                patch.setattr(module, name, self._counted(getattr(module, name), what, place))
            patch.setattr(os, "open", self._counted_open(os.open))
            patch.setattr(fcntl, "flock", self._counted_lock(fcntl.flock))
            opened = self._counted_file(io.open)
            patch.setattr(io, "open", opened)
            patch.setattr(builtins, "open", opened)
            patch.setattr(store, "save_file", self._save_file)
            patch.setattr(torch, "from_file", self._counted_map(torch.from_file))
            yield self

    def _counted(self, function: Callable[..., Any], what: str, place: int) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.touch(what, args[place])
            return function(*args, **kwargs)

        return counted

    def _counted_open(self, function: Callable[..., int]) -> Callable[..., int]:
        def counted(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                self.touch("open", path)
            return function(path, flags, *args, **kwargs)

        return counted

    def _counted_lock(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(descriptor: int, operation: int) -> Any:
            if operation != fcntl.LOCK_UN:  # giving a lock back needs no disk
                self.touch("lock", descriptor)
            return function(descriptor, operation)

        return counted

    def _counted_file(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            writes = isinstance(mode, str) and set(mode) & set("wax+")
            if not writes or isinstance(path, int) or kwargs.get("opener") is not None:
                return function(path, mode, *args, **kwargs)
            self.touch("open", path)
            return _File(function(path, mode, *args, **kwargs), os.fspath(path), self)

        return counted

    def _counted_map(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(path: str, *args: Any, **kwargs: Any) -> Any:
            try:
                self.touch("map", path)
            except OSError as error:
                raise RuntimeError(f"unable to open file <{path}> in read-write mode: {error.strerror} ({error.errno})") from None
            return function(path, *args, **kwargs)

        return counted

    def _save_file(self, tensors: dict[str, torch.Tensor], path: Path) -> None:
        """Write as safetensors does: to a temporary name of its own, with errors of its own."""
        content, scratch = save(tensors), Path(path).with_name(".tmpAbC123")
        try:
            self.touch("write", path, lambda: _write(scratch, content[: len(content) // 2]))
        except OSError as error:
            if not self.kind.lasts:
                scratch.unlink()
            raise SafetensorError(f"Error while serializing: I/O error: {error.strerror} (os error {error.errno})") from None
        _write(scratch, content)
        _plain_rename(scratch, path)


class _File:
    """A file whose writes and closing are counted."""

    def __init__(self, file: Any, path: str, disk: FaultyDisk) -> None:
        self._file, self._path, self._disk = file, path, disk

    def write(self, data: Any) -> int:
        self._disk.touch("write", self._path, lambda: (self._file.write(data[: len(data) // 2]), self._file.flush()))
        return int(self._file.write(data))

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
        if error[0] is None:
            self._disk.touch("close", self._path)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


_plain_open, _plain_rename = io.open, os.rename  # as they are at import


def _write(path: Path, content: bytes) -> None:
    with _plain_open(path, "wb") as file:
        file.write(content)


def tree(root: Path) -> dict[str, bytes | str]:
    """Return all that lies below a folder: bytes of files, targets of links; locks, which say nothing, left out."""
    found: dict[str, bytes | str] = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif path.is_file() and path.suffix != LOCKS:
            found[name] = path.read_bytes()
    return found


def is_temporary(name: str) -> bool:
    """Tell whether a name is one that no run reads."""
    return Path(name).name.startswith(".")


def spread(cases: list[Any], count: int) -> list[Any]:
    """Pick so many of the cases, evenly, the first and the last among them."""
    if len(cases) <= count:
        return cases
    return [cases[round(i * (len(cases) - 1) / (count - 1))] for i in range(count)]
