"""Jobs of a sweep on a Slurm cluster: one that ends before its time takes no other with it, and none is queued twice."""

from __future__ import annotations

import getpass
import logging
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, filter_overrides, setup_globals
from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf  # type: ignore[import-untyped, unused-ignore]
from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher  # type: ignore[import-untyped, unused-ignore]

from evopress.errors import EvoPressError
from evopress.files import remove_empty
from evopress.launching import of_killed, refuse_among_processes
from evopress.progress import counted

logger = logging.getLogger(__name__)
_SECONDS_BETWEEN = 1.0


class OutOfTimeError(BaseException):
    """A job's time is over and it is not queued again; raised by a signal, so nothing that catches errors may swallow it."""


class SlurmJobLauncher(SlurmLauncher):  # type: ignore[misc, unused-ignore]
    """Take the place of submitit's launcher, which leaves all jobs alone as soon as the first in order has not ended well."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[Any]:
        """Queue the jobs that are not in the queue already, wait for all, and return what Hydra's sweeper expects of each.

        Raises: EvoPressError if sbatch refuses them; JobFailedError when all have ended, if some ended before their time;
            KeyboardInterrupt with a note that names the jobs that go on.
        """
        refuse_among_processes()
        setup_globals()
        assert self.config is not None
        sweep = str(self.config.hydra.sweep.dir)
        Path(sweep).mkdir(parents=True, exist_ok=True)
        if "mode" in self.config.hydra.sweep:
            Path(sweep).chmod(int(str(self.config.hydra.sweep.mode), 8))
        overrides = [list(each) for each in job_overrides]
        jobs = self._queued(overrides)
        if jobs:
            logger.info("%s in Slurm's queue: %s", _counted_there(len(jobs)), _ids(jobs))
        new = [index for index in range(len(overrides)) if index not in jobs]
        for index in new:
            logger.info("#%d: %s", initial_job_idx + index, " ".join(filter_overrides(overrides[index])))
        jobs |= dict(zip(new, self._submit([overrides[index] for index in new], initial_job_idx, new), strict=True))
        try:
            while not all(job.done() for job in jobs.values()):
                time.sleep(_SECONDS_BETWEEN)
        except KeyboardInterrupt as stop:
            if left := {index: job for index, job in jobs.items() if not job.done()}:
                stop.add_note(
                    f"{_counted_there(len(left))} in Slurm's queue and not ended by this: the same command waits for them "
                    f"instead of queueing them again, `scancel {_ids(left)}` ends them"
                )
            raise
        errors = {index: job.exception() for index, job in sorted(jobs.items())}
        if killed := {index: self._how(jobs[index], error) for index, error in errors.items() if error is not None}:
            raise of_killed(killed, overrides, sweep)
        return [jobs[index].results()[0] for index in errors]

    def __call__(self, *args: Any, **kwargs: Any) -> JobReturn:
        """Run one job, in the process that Slurm started for it; one that is out of time ends as submitit expects it to."""
        from submitit.core.utils import UncompletedJobError  # type: ignore[import-not-found, unused-ignore]

        try:
            with _raising_past_handlers(UncompletedJobError):
                return super().__call__(*args, **kwargs)
        except OutOfTimeError as error:
            raise UncompletedJobError(str(error)) from None

    def _submit(self, jobs: Sequence[list[str]], first: int, indices: Sequence[int]) -> list[Any]:
        """Queue jobs, and return the first task of each; EvoPressError with Slurm's own words if it does not take them."""
        import submitit  # type: ignore[import-not-found, unused-ignore]

        if not jobs:
            return []
        given = dict(self.params)
        folder = Path(given.pop("submitit_folder"))
        fixed = submitit.core.utils.JobPaths.get_first_id_independent_folder(folder)
        before = set(fixed.iterdir()) if fixed.is_dir() else set()
        try:
            executor = submitit.AutoExecutor(cluster="slurm", folder=folder, slurm_max_num_timeout=given.pop("max_num_timeout"))
            common = BaseQueueConf.__dataclass_fields__
            executor.update_parameters(**{key if key in common else f"slurm_{key}": value for key, value in given.items()})
            state = Singleton.get_state()
            numbers = [first + index for index in indices]
            named = ["hydra.sweep.dir"] * len(jobs), numbers, [f"job_id_for_{number}" for number in numbers]
            submitted = executor.map_array(self, jobs, *named, [state] * len(jobs))
        except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
            for path in set(fixed.iterdir()) - before if fixed.is_dir() else ():  # what was to be submitted
                if path.is_file():
                    path.unlink(missing_ok=True)
            remove_empty(fixed)
            reason = "; ".join(line.removeprefix("sbatch: ").removeprefix("error: ") for line in str(error).splitlines() if line)
            raise EvoPressError(f"sbatch refused the jobs ({reason}): see hydra.launcher's settings, none was queued") from error
        except RuntimeError as error:  # of a machine without srun
            raise EvoPressError(f"the jobs cannot be queued ({error}): start this where sbatch and srun are") from error
        logger.info("%s in Slurm's queue, as %s", counted(len(submitted), "job"), " ".join(job.job_id for job in submitted))
        return [job.task(0) for job in submitted]

    def _queued(self, jobs: Sequence[list[str]]) -> dict[int, Any]:
        """Return, by index, the jobs that an earlier command has put in the queue and that have not ended."""
        import submitit  # type: ignore[import-not-found, unused-ignore]

        folder = self.params["submitit_folder"]
        fixed = submitit.core.utils.JobPaths.get_first_id_independent_folder(folder)
        known = {path.name.removesuffix("_submitted.pkl") for path in fixed.rglob("*_submitted.pkl")}
        found: dict[int, Any] = {}
        for name in known & _in_queue() if known else ():
            job = submitit.SlurmJob(folder=folder, job_id=name)
            with suppress(Exception):  # written by another version: then the folder's lock keeps two runs apart
                overrides = list(job.submission().args[0])
                if not job.paths.result_pickle.exists() and overrides in jobs:
                    found[jobs.index(overrides)] = job
        return found

    def _how(self, job: Any, error: Exception) -> str:
        """Say how a job ended that returned nothing."""
        state, words = str(job.state), str(error)
        if "timed-out too many times" in words or state.startswith("TIMEOUT"):
            return (
                f"job {job.job_id}, out of time: raise hydra.launcher.timeout_min={self.params['timeout_min']} or "
                f"max_num_timeout={self.params['max_num_timeout']}, it resumes where it was"
            )
        raised = [line for line in words.split("\n-----", 2)[1].splitlines() if line] if "trace:" in words else []
        return f"job {job.job_id}, {raised[-1] if len(raised) > 1 else state}, see {job.paths.stderr}"


def _in_queue() -> set[str]:
    """Return the ids of this user's jobs that Slurm has not ended, those of arrays one by one; empty where it does not say."""
    with suppress(OSError, subprocess.SubprocessError, KeyError):
        command = ["squeue", "--noheader", "--array", "--format=%i", f"--user={getpass.getuser()}"]
        return set(subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.split())
    return set()


@contextmanager
def _raising_past_handlers(uncompleted: type[Exception]) -> Iterator[None]:
    """Let submitit's handler of the signal before a job's end raise OutOfTimeError where it raises its own error."""
    from submitit.core.job_environment import JobEnvironment  # type: ignore[import-not-found, unused-ignore]

    number = JobEnvironment._usr_sig()
    theirs = signal.getsignal(number)

    def ours(received: int, frame: FrameType | None) -> None:
        try:
            theirs(received, frame)  # type: ignore[operator, misc]
        except uncompleted as error:
            raise OutOfTimeError(str(error)) from None

    if not callable(theirs):
        yield
        return
    signal.signal(number, ours)
    try:
        yield
    finally:
        signal.signal(number, theirs)


def _ids(jobs: Mapping[int, Any]) -> str:
    return " ".join(job.job_id for _, job in sorted(jobs.items()))


def _counted_there(count: int) -> str:
    return f"{counted(count, 'job')} of this sweep {'is' if count == 1 else 'are'}"
