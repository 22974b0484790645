"""How a run ends before its time: by a signal, for want of memory or by a full disk. Each is one sentence and an exit code."""

from __future__ import annotations

import errno
import os
import re
import select
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from safetensors import SafetensorError

from evopress.errors import EvoPressError
from evopress.files import explained

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory", "alloc_failed")
"""What torch, its back ends and the C library say, in small letters."""
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}
_received: int | None = None
"""The signal that asked this process to stop."""


class Stopped(KeyboardInterrupt):
    """A signal asked the run to stop; like Ctrl-C it passes everything that catches errors."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def exit_code(stop: KeyboardInterrupt) -> int:
    """Return 128 and the signal's number, as shells do: 130 after Ctrl-C, 143 after SIGTERM."""
    return 128 + (stop.number if isinstance(stop, Stopped) else signal.SIGINT)


@contextmanager
def stopping_at_signals() -> Iterator[None]:
    """Let the first SIGINT or SIGTERM raise `Stopped` in the main thread; a second one ends the process at once.

    A signal that the process was started to ignore (`nohup`, a background job of a script) stays ignored.
    """
    global _received
    _received = None
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    process = os.getpid()
    before = {number: handler for number in _SIGNALS if (handler := signal.getsignal(number)) not in (signal.SIG_IGN, None)}

    def stop(number: int, frame: FrameType | None) -> None:
        global _received
        for each in before:
            signal.signal(each, signal.SIG_DFL)
        if os.getpid() != process:  # a child that a library forked: not for it to tell the story
            os.kill(os.getpid(), number)
            return
        _received = number
        raise Stopped(number)

    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_if_asked() -> None:
    """Raise `Stopped` if a signal came in a place that swallows what is raised there, such as a finaliser."""
    if _received is not None:
        raise Stopped(_received)


def silenced_without_reader() -> bool:
    """Send what this process still says to nowhere if nobody reads it any more; return whether that is so."""
    try:
        said_to, poll = sys.stdout.fileno(), select.poll()
        poll.register(said_to, select.POLLOUT)
        if not any(event & select.POLLERR for _, event in poll.poll(0)):
            return False
        os.dup2(os.open(os.devnull, os.O_WRONLY), said_to)
    except (AttributeError, ValueError, OSError):  # there is none, it is closed, or no file
        return False
    return True


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that memory ran out, of the host or of the device."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _MEMORY)
    )


def of_the_disk(error: BaseException, folder: Path) -> EvoPressError | None:
    """Turn a full or read-only disk, or a limit of it, met where nobody expected it, into one sentence; None for any other error.

    Args: folder: named where the error names no file.
    """
    found = os_error(error) if isinstance(error, SafetensorError) else error
    if isinstance(found, OSError) and found.errno in _DISK:
        return explained(found, Path(os.fsdecode(found.filename)) if isinstance(found.filename, (str, bytes)) else folder)
    return None


def os_error(error: SafetensorError | OSError) -> OSError:
    """Turn safetensors' own error on writing, which is no OSError, into the one of the operating system behind it."""
    if isinstance(error, OSError):
        return error
    found = re.search(r"os error (\d+)", str(error))
    return OSError(int(found[1]), str(error)) if found else OSError(str(error))
