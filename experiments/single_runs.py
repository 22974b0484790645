"""Jobs of an experiment that is no sweep: each a command in a folder of its own, with what it says in a file beside that."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from evopress.config import list_of, register
from evopress.earlier_versions import as_written_now
from evopress.errors import EvoPressError
from evopress.files import sha256_file
from evopress.progress import counted
from evopress.reporting.jobs import typed_settings
from evopress.reporting.records import read_json
from evopress.run_folder import ANY_JOB, LOCK, kept_defaults, kept_overrides, own_stages
from experiments.clock import Clock
from experiments.sweeps import OF_ROUNDING, read_results

_BEGUN = "$ "
"""Before the command in a log, once for each time that it was begun."""


@dataclass(frozen=True)
class SingleRun:
    """One job."""

    folder: Path
    arguments: tuple[str, ...]
    labels: dict[str, Any] = field(default_factory=dict, hash=False)
    """What the experiment's tables call it, by column."""


class Running:
    """The processes of jobs, so that all of them can be asked to end."""

    def __init__(self) -> None:
        """Begin with none."""
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._lock, self._stopped = threading.Lock(), False

    def wait_for(self, folder: Path) -> None:
        """Wait for another process that is at work in a job's folder, such as one that outlived a killed queue."""
        while (folder / LOCK).exists() and not self._stopped:
            with suppress(Timeout), FileLock(folder / LOCK, timeout=1):
                return

    def ended_well(self, command: Sequence[str], log: IO[str]) -> bool:
        """Run a command to its end; tell whether that was a good one."""
        with self._lock:
            if self._stopped:
                return False
            process = subprocess.Popen(command, stdout=log, stderr=log)
            self._processes.add(process)
        try:
            return process.wait() == 0
        except BaseException:  # a signal to who waits
            process.terminate()
            process.wait()
            raise
        finally:
            with self._lock:
                self._processes.discard(process)

    def stop(self) -> None:
        """Ask those that run to end, and let no other begin."""
        with self._lock:
            self._stopped = True
            for process in self._processes:
                process.terminate()


def evopress(folder: Path, *arguments: str, running: Running | None = None) -> bool:
    """Run, or go on with, one job; tell whether it ended well.

    Args: running: has the job's process while it runs.
    """
    running = running or Running()
    running.wait_for(folder)
    try:
        refuse_others(folder, arguments)
    except EvoPressError as error:
        _log(folder).parent.mkdir(parents=True, exist_ok=True)
        with _log(folder).open("a", encoding="utf-8") as log:
            print(f"error: {error}", file=log)
        return False
    if has_finished(folder):
        return True
    plain = re.fullmatch(r"[\w./+-]+", str(folder))
    where = f"hydra.run.dir={folder}" if plain else f"hydra.run.dir='{folder}'"  # Hydra reads commas and equals signs otherwise
    return logged([sys.executable, "-m", "evopress", *arguments, where], folder, running=running)


def refuse_others(folder: Path, arguments: Sequence[str], *, besides: Collection[str] = ()) -> None:
    """Raise EvoPressError if a folder has a finished run of other settings than the arguments ask for.

    Args: besides: settings that are known to be the same, however they were given.
    """
    if has_finished(folder) and (other := _other_settings(folder, arguments, besides)):
        raise EvoPressError(f"{folder} has a finished run of other settings ({other}): move it away, or ask for its own")


def _other_settings(folder: Path, arguments: Sequence[str], besides: Collection[str]) -> str:
    """Say in what a folder's run was asked for something else; nothing: in nothing that decides its results."""
    defaults = kept_defaults(folder)
    there = typed_settings(as_written_now([each for each in kept_overrides(folder) or [] if each not in defaults]))
    if not there:
        return ""
    now = typed_settings(as_written_now(list(arguments)))
    keys = [key for key in {**there, **now} if there.get(key) != now.get(key)]
    keys = [key for key in keys if not ANY_JOB.fullmatch(key) and key not in (*OF_ROUNDING, *besides)]
    return ", ".join(f"{key}={there.get(key, 'not given')} there, {now.get(key, 'not given')} here" for key in keys)


def logged(command: Sequence[str], folder: Path, *, running: Running | None = None) -> bool:
    """Run a command, with what it says in a file beside a folder; tell whether it ended well. Arguments as of `evopress`."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _log(folder).open("a", encoding="utf-8") as log:
        print(f"{_BEGUN}{shlex.join(command)}", file=log, flush=True)
        return (running or Running()).ended_well(command, log)


def evopress_all(runs: Iterable[SingleRun], *, at_once: int = 1) -> Iterator[tuple[SingleRun, bool]]:
    """Run, or go on with, jobs, so many at once; yield each as it ends, and whether it ended well.

    Several at once pay on a GPU, which one search of a small model leaves idle most of the time; on a CPU with a thread each.
    Whoever stops taking stops the jobs.
    """
    running = Running()
    with ThreadPoolExecutor(at_once) as pool:
        try:
            left, pending = iter(runs), dict[Future[bool], SingleRun]()
            while True:
                for run in islice(left, 2 * at_once - len(pending)):  # as many wait: composing all takes most of a minute
                    pending[pool.submit(evopress, run.folder, *run.arguments, running=running)] = run
                if not pending:
                    break
                for future in wait(pending, return_when=FIRST_COMPLETED).done:
                    yield pending.pop(future), future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            running.stop()


class Jobs:
    """The jobs of a script: those that end well are taken one by one, and the script ends with an error where another did not."""

    def __init__(self, runs: Sequence[SingleRun], *, at_once: int = 1) -> None:
        """Run nothing yet."""
        self._runs, self._at_once = runs, at_once
        self._failed = 0

    def __iter__(self) -> Iterator[SingleRun]:
        """Do as `evopress_all`, and say of each how it ended and how long what is left will take; yield those that ended well."""
        left = {run.folder for run in self._runs if not has_finished(run.folder)}
        clock = Clock({"": len(left)}, self._at_once)
        if self._runs:
            print(f"{counted(len(self._runs), 'job')}, {clock}", flush=True)
        for run, well in evopress_all(self._runs, at_once=self._at_once):
            if run.folder in left:
                clock.ended("")
            print(f"{run.folder.name}: {'done' if well else why_it_failed(run.folder)}; {clock}", flush=True)
            if well:
                yield run
            else:
                self._failed += 1

    def check(self) -> None:
        """Raise EvoPressError if a job ended badly; called last, when tables are made of what there is."""
        if self._failed:
            failed = f"{self._failed} of {counted(len(self._runs), 'job')} failed"
            raise EvoPressError(f"{failed}; the same command goes on with what is missing")


def has_finished(folder: Path) -> bool:
    """Tell whether a job has ended well, of whatever settings, and its results are there.

    Not if a later command was killed in one of its stages, or the file of the genome that it measured is another one now.
    """
    path, config = folder / "finished.json", folder / ".hydra" / "config.yaml"
    if not path.exists():
        return False
    try:
        finished, given = read_json(path), kept_overrides(folder) or []
        if _has_changed(typed_settings(given).get("genome", ""), finished.get("contents")):
            return False
        done, own = finished.get("stages"), own_stages(given)
        asked = list_of(own) if own else []
        if own is None and config.exists():
            register()  # of what the stages are by default
            asked = list(OmegaConf.select(OmegaConf.load(config), "stages") or ())
        if isinstance(done, list) and "evaluate" in done:
            read_results(folder)
    except (EvoPressError, AttributeError, YAMLError, OmegaConfBaseException):
        return False
    return not isinstance(done, list) or (set(asked) <= set(done) and config.with_name("overrides.yaml").exists())


def _has_changed(genome: str, contents: Mapping[str, str] | None) -> bool:
    """Tell whether a genome is a file that has changed since a run has measured it: what that came from says so."""
    known = (contents or {}).get("genome")
    return known is not None and Path(genome).is_file() and sha256_file(Path(genome)) != known


def why_it_failed(folder: Path) -> str:
    """Return the last error that a job has said since it was last begun."""
    text = _log(folder).read_text(encoding="utf-8") if _log(folder).exists() else ""
    lines = text.rpartition(_BEGUN)[2].splitlines()
    return next((line.removeprefix("error: ") for line in reversed(lines) if line.startswith("error")), "see its log")


def folder_name(words: str) -> str:
    """Return words as part of a folder's name."""
    return words.replace(", ", "-").replace(" ", "-")


def _log(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.log")
