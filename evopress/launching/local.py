"""Jobs of a sweep side by side on one machine, each in a process of its own: one that is killed takes no other with it."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import joblib  # type: ignore[import-untyped, unused-ignore]
from hydra.core.singleton import Singleton
from hydra.core.utils import configure_log, setup_globals
from hydra_plugins.hydra_joblib_launcher._core import execute_job  # type: ignore[import-untyped, unused-ignore]
from hydra_plugins.hydra_joblib_launcher.joblib_launcher import JoblibLauncher  # type: ignore[import-untyped, unused-ignore]

from evopress.config import JobFailedError
from evopress.launching import of_killed, refuse_among_processes
from evopress.progress import counted

try:
    import cloudpickle  # type: ignore[import-untyped, unused-ignore]
except ImportError:  # joblib before 1.6 brings it
    from joblib.externals import cloudpickle  # type: ignore[import-untyped, no-redef, unused-ignore]

logger = logging.getLogger(__name__)
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "BLIS_MAX_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
"""What libraries take their number of threads from, where nobody has set it."""
_SECONDS_TO_END = 10.0


class JobLauncher(JoblibLauncher):  # type: ignore[misc, unused-ignore]
    """Take joblib's place in Hydra: its workers all end when one is killed, and it says of none which job it had."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[Any]:
        """Run all jobs, `n_jobs` at a time, and return what Hydra's sweeper expects of each.

        Raises: JobFailedError when all have ended, if some were killed, with what they were.
        """
        setup_globals()
        refuse_among_processes()
        assert self.config is not None and self.hydra_context is not None and self.task_function is not None
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        sweep = str(self.config.hydra.sweep.dir)
        Path(sweep).mkdir(parents=True, exist_ok=True)
        side_by_side = joblib.effective_n_jobs(self.joblib.get("n_jobs", -1))
        jobs = [tuple(overrides) for overrides in job_overrides]
        logger.info("%s, %d at a time, in %s", counted(len(jobs), "job"), side_by_side, sweep)
        shared = (self.hydra_context, self.config, self.task_function, Singleton.get_state())
        arguments = [cloudpickle.dumps((initial_job_idx + index, overrides, *shared)) for index, overrides in enumerate(jobs)]
        with _threads_shared_by(side_by_side):
            results, killed = _run(arguments, side_by_side)
        if killed:
            raise of_killed(killed, jobs, sweep)
        return [results[index] for index in range(len(jobs))]


def _run(arguments: Sequence[bytes], side_by_side: int) -> tuple[dict[int, Any], dict[int, str]]:
    """Return the results of jobs by their index, and of those whose process was killed, how."""
    context = multiprocessing.get_context("spawn")
    results: dict[int, Any] = {}
    killed: dict[int, str] = {}
    waiting = list(range(len(arguments)))
    running: dict[Connection, tuple[int, SpawnProcess]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < side_by_side:
                index = waiting.pop(0)
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_work, args=(sender, arguments[index]))
                process.start()
                sender.close()  # here: then the pipe ends with the process, however that ends
                running[receiver] = index, process
            for ended in wait(list(running)):
                assert isinstance(ended, Connection)
                index, process = running.pop(ended)
                try:
                    results[index] = cloudpickle.loads(ended.recv_bytes())
                except EOFError:
                    process.join()
                    killed[index] = _how(process.exitcode)
                process.join()
                ended.close()
    finally:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.join(_SECONDS_TO_END)
            process.kill()
            process.join()
    for index, result in results.items():
        if isinstance(result, BaseException):
            raise JobFailedError(f"job {index}: {result}") from result
    return results, killed


def _work(sender: Connection, arguments: bytes) -> None:
    """Run one job in this process and send back how it ended."""
    try:
        result = execute_job(*cloudpickle.loads(arguments))
    except Exception as error:
        result = error
    sender.send_bytes(cloudpickle.dumps(result))
    sender.close()


def _how(code: int | None) -> str:
    """Say how a process ended that sent nothing: by a signal, or by itself."""
    return signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"


@contextmanager
def _threads_shared_by(processes: int) -> Iterator[None]:
    """Give each process that is started its share of the cores, as joblib does."""
    share = str(max(joblib.cpu_count() // processes, 1))
    given = [name for name in _THREADS if name not in os.environ]
    os.environ.update(dict.fromkeys(given, share))
    try:
        yield
    finally:
        for name in given:
            del os.environ[name]
