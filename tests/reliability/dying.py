"""Runs that die: the program in a forked child that is killed, or told to stop, at a chosen moment, and then goes on.

The moments are counted, not timed, so that each can be met again. An `Event` is that a file is opened to write, renamed, removed,
synced or locked, a folder made, a block run or a minibatch drawn; a clean run lists them all, and a trial picks one.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch

import evopress.__main__ as program
from evopress.fitness.minibatch import MinibatchFitness
from evopress.models.blocks import BlockModel
from evopress.stages import one_budget

STAGES = {
    "": "no stage",
    "build_database": "database",
    "find_baselines": "baselines",
    **{name: name for name in ("search", "refine", "evaluate", "export", "report")},
}
"""Functions of a run of one budget and their names in the tally; before and after them a run is in none."""
_WRITES = os.O_WRONLY | os.O_RDWR
_AUDITED = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "fcntl.flock")


@dataclass(frozen=True)
class Event:
    """A moment at which a run can be killed."""

    stage: str
    what: str
    path: str = ""

    def __str__(self) -> str:
        return f"{self.stage or 'outside stages'}: {self.what} {Path(self.path).name}".rstrip()


@dataclass(frozen=True)
class Death:
    """Where and how a child ends: at its n-th event of a kind it sends itself a signal, or the system refuses what it asks."""

    stage: str | None = None
    """None: any."""
    what: str | None = None
    name: str = ""
    """In the name of the file."""
    nth: int = 0
    number: int = signal.SIGKILL
    torn: bool = False
    """Lose what was written there and not synced."""
    error: int = 0
    """The system's error number, instead of a signal."""

    def of(self, event: Event) -> bool:
        """Tell whether an event is of the kind."""
        return self.stage in (None, event.stage) and self.what in (None, event.what) and self.name in Path(event.path).name


@dataclass(frozen=True)
class Ending:
    """How a child ended."""

    code: int
    """Exit code, or minus the signal that killed it."""
    text: str
    events: tuple[Event, ...]
    """Those it came to; the last is where it died."""


class _Recorder:
    """Counts the events of this process, tells the parent of each, and dies at one."""

    def __init__(self, pipe: int, death: Death | None) -> None:
        self._pipe, self._death = pipe, death
        self._count = 0
        self._stage = ""
        self._busy = False
        self._process = os.getpid()

    def install(self) -> None:
        """Listen for the rest of this process's life."""
        for name in filter(None, STAGES):
            self._follow(name)
        self._precede(MinibatchFitness, "__call__", "minibatch")
        self._precede(BlockModel, "run", "block")
        self._precede(os, "fsync", "fsync")
        sys.addaudithook(self._audit)

    def _follow(self, name: str) -> None:
        original = getattr(one_budget, name)

        def stage(*args: Any, **options: Any) -> Any:
            self._stage = name
            try:
                return original(*args, **options)
            finally:
                self._stage = ""

        setattr(one_budget, name, stage)

    def _precede(self, owner: Any, name: str, what: str) -> None:
        original = getattr(owner, name)

        def preceded(*args: Any, **options: Any) -> Any:
            descriptor = args[0] if owner is os else None
            path = "" if descriptor is None else os.readlink(f"/proc/self/fd/{descriptor}")
            self.meet(what, path, descriptor)
            return original(*args, **options)

        setattr(owner, name, preceded)

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if self._busy:
            return
        if event == "open" and isinstance(args[0], (str, os.PathLike)):
            if (flags := args[2] or 0) & _WRITES:
                self.meet("open to replace" if flags & os.O_TRUNC else "open to write", os.fspath(args[0]))
        elif event in _AUDITED:
            self.meet(event, str(args[0]))

    def meet(self, what: str, path: str, descriptor: int | None = None) -> None:
        """Come to an event; die there if it is the one."""
        if self._busy or os.getpid() != self._process or path.startswith(("/dev/", "/proc/")):
            return
        self._busy = True
        try:
            event = Event(self._stage, what, path)
            os.write(self._pipe, (json.dumps(astuple(event)) + "\n").encode())
            if self._death is None or not self._death.of(event):
                return
            self._count += 1
            if self._count == self._death.nth + 1:
                if self._death.torn:
                    self._tear(what, path, descriptor)
                if self._death.error:
                    raise OSError(self._death.error, os.strerror(self._death.error), path)
                os.kill(os.getpid(), self._death.number)
        finally:
            self._busy = False

    def _tear(self, what: str, path: str, descriptor: int | None) -> None:
        """Leave a file as a crash can: just emptied to be written anew, or its last line written in part."""
        if descriptor is not None:
            content = Path(path).read_bytes() if Path(path).is_file() else b""
            start = content.rstrip(b"\n").rfind(b"\n") + 1
            if content[start:]:
                os.ftruncate(descriptor, start + random.Random(path).randrange(len(content) - start))
        elif what == "open to replace" and Path(path).parent.is_dir():
            Path(path).write_bytes(b"")


def _inside(arguments: Sequence[str], cwd: Path, cache: Path, log: Path, recorder: _Recorder) -> None:
    """Be the program; never returns."""
    code = 99
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        for variable in [name for name in os.environ if name.startswith("WANDB_")]:
            del os.environ[variable]
        os.environ["EVOPRESS_CACHE"] = str(cache)
        os.chdir(cwd)
        sys.argv = ["evopress", *arguments]
        recorder.install()
        try:
            program.main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


def run_child(
    arguments: Sequence[str],
    *,
    cwd: Path,
    cache: Path,
    death: Death | None = None,
    after: float | None = None,
    prepare: Callable[[], None] = lambda: None,
    timeout: float = 600.0,
) -> Ending:
    """Run `python -m evopress ARGUMENTS` in a forked child.

    Args:
        death: where it dies.
        after: seconds after which it is killed by SIGKILL from outside.
        prepare: called in the child first, to put faults into it.
    """
    cwd.mkdir(parents=True, exist_ok=True)
    log = cwd / "child.log"
    reading, writing = os.pipe()
    assert torch.get_num_threads() == 1, "a pool of threads does not survive a fork"
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            prepare()
        except BaseException:
            os._exit(98)
        _inside(arguments, cwd, cache, log, _Recorder(writing, death))
    os.close(writing)
    timer = threading.Timer(timeout if after is None else after, os.kill, (child, signal.SIGKILL))
    timer.start()
    with open(reading, encoding="utf-8") as pipe:
        events = tuple(Event(*json.loads(line)) for line in pipe)
    _, status = os.waitpid(child, 0)
    timer.cancel()
    timer.join()
    return Ending(os.waitstatus_to_exitcode(status), log.read_text(errors="replace") if log.exists() else "", events)


def go_on(arguments: Sequence[str], cwd: Path, *, resume: bool) -> list[str]:
    """Return the arguments that start a killed run again: `resume=` where that is wanted and it began at all, or its own."""
    if not resume or not (cwd / "run" / ".hydra" / "overrides.json").exists():
        return list(arguments)
    return ["resume=run", *(argument for argument in arguments if argument.startswith("stages="))]  # they are named each time
