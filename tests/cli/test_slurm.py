"""Sweeps on Slurm, with a stand-in for submitit and its plugin, which need not be installed, nor Slurm."""

from __future__ import annotations

import importlib
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf

from evopress import __main__ as program
from evopress.config import JobFailedError
from evopress.errors import EvoPressError

JOBS = [["bits=3", f"seed={seed}"] for seed in (10, 11, 12)]


class FailedJobError(RuntimeError):
    """submitit's."""


class Job:
    """One of submitit's jobs: ended, or ending when it is looked at so many times."""

    def __init__(self, folder: Path, job_id: str, *, error: str | None = None, state: str = "COMPLETED", looks: int = 0) -> None:
        self.job_id, self.error, self.state, self.looks = job_id, error, state, looks
        self.paths = SimpleNamespace(stderr=f"{job_id}.err", result_pickle=folder / "no result")

    def task(self, number: int) -> Job:
        assert number == 0
        return self

    def done(self) -> bool:
        self.looks -= 1
        return self.looks < 0

    def exception(self) -> Exception | None:
        return None if self.error is None else FailedJobError(self.error)

    def results(self) -> list[str]:
        return [f"result of {self.job_id}"]

    def submission(self) -> SimpleNamespace:
        return SimpleNamespace(args=[JOBS[1]])


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Return what makes a launcher that is given these jobs, or an error, by what stands in for submitit."""
    submitted: list[list[list[str]]] = []

    class Theirs:
        def __init__(self, **params: Any) -> None:
            self.params = params

        def __call__(self, work: Callable[[], Any]) -> Any:
            return work()

    def executor(answer: list[Job] | Exception) -> Any:
        def map_array(_: Any, overrides: list[list[str]], *others: Any) -> list[Job]:
            if isinstance(answer, Exception):
                raise answer
            submitted.append(overrides)
            return answer[: len(overrides)]

        return SimpleNamespace(update_parameters=lambda **_: None, map_array=map_array)

    folder = tmp_path / "sweep" / ".submitit"
    fixed = SimpleNamespace(get_first_id_independent_folder=lambda _: folder)
    errors = SimpleNamespace(FailedJobError=FailedJobError, FailedSubmissionError=FailedJobError, JobPaths=fixed)
    names = ("submitit", "submitit.core", "submitit.core.utils", "submitit.core.job_environment")
    plugin = "hydra_plugins.hydra_submitit_launcher"
    modules = {name: ModuleType(name) for name in (*names, plugin, f"{plugin}.config", f"{plugin}.submitit_launcher")}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    vars(modules[names[0]]).update({"core": SimpleNamespace(utils=errors), "SlurmJob": lambda folder, job_id: Job(folder, job_id)})
    vars(modules[names[2]]).update({"UncompletedJobError": FailedJobError})
    environment = SimpleNamespace(_usr_sig=lambda: signal.SIGUSR2)
    vars(modules[names[3]]).update({"JobEnvironment": environment})
    vars(modules[f"{plugin}.config"]).update({"BaseQueueConf": SimpleNamespace(__dataclass_fields__={"timeout_min": None})})
    vars(modules[f"{plugin}.submitit_launcher"]).update({"SlurmLauncher": Theirs})
    monkeypatch.delitem(sys.modules, "evopress.launching.slurm", raising=False)
    ours = importlib.import_module("evopress.launching.slurm")
    monkeypatch.setattr(ours, "_SECONDS_BETWEEN", 0)
    monkeypatch.setattr(ours, "_in_queue", lambda: {"7"})

    def make(answer: list[Job] | Exception) -> Any:
        launcher = ours.SlurmJobLauncher(submitit_folder=folder, timeout_min=2, max_num_timeout=0)
        launcher.config = OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path / "sweep")}}})
        vars(modules["submitit"])["AutoExecutor"] = lambda **_: executor(answer)
        return SimpleNamespace(launcher=launcher, submitted=submitted, folder=folder)

    yield make
    sys.modules.pop("evopress.launching.slurm", None)


def test_jobs_that_end_well_are_returned_in_their_order(slurm: Callable[..., Any], tmp_path: Path) -> None:
    queue = slurm([Job(tmp_path, str(number), looks=number) for number in range(3)])
    assert queue.launcher.launch(JOBS, 0) == ["result of 0", "result of 1", "result of 2"]


def test_a_job_that_ends_before_its_time_is_named_when_all_have_ended(slurm: Callable[..., Any], tmp_path: Path) -> None:
    late = Job(tmp_path, "6_1", looks=3)
    given = [
        Job(tmp_path, "6_0", error="no output", state="CANCELLED by 0"),
        late,
        Job(tmp_path, "6_2", error="timed-out too many times."),
    ]
    with pytest.raises(JobFailedError) as raised:
        slurm(given).launcher.launch(JOBS, 0)
    assert late.looks < 0, "it was waited for"
    said = str(raised.value)
    assert "2 of 3 jobs were killed, the others have ended. To be run again: bits=3 seed=10 (job 6_0, CANCELLED by 0" in said
    assert "bits=3 seed=12 (job 6_2, out of time: raise hydra.launcher.timeout_min=2 or max_num_timeout=0" in said
    assert "seed=11" not in said and f"hydra.sweep.dir={tmp_path / 'sweep'}" in said


def test_what_sbatch_refuses_is_one_sentence_and_leaves_nothing(slurm: Callable[..., Any]) -> None:
    queue = slurm(FailedJobError("sbatch: error: Batch job submission failed: Invalid account"))
    with pytest.raises(EvoPressError, match=r"^sbatch refused the jobs \(Batch job submission failed: Invalid account\): see"):
        queue.launcher.launch(JOBS, 0)
    with pytest.raises(EvoPressError, match=r"^the jobs cannot be queued \(Could not detect srun\): start this where sbatch"):
        slurm(RuntimeError("Could not detect srun")).launcher.launch(JOBS, 0)


def test_an_interrupted_command_names_the_jobs_that_go_on(
    slurm: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    queue = slurm([Job(tmp_path, "7_0", looks=9), Job(tmp_path, "7_1"), Job(tmp_path, "7_2", looks=9)])

    def interrupted(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("time.sleep", interrupted)
    monkeypatch.setattr(sys, "argv", ["evopress"])
    monkeypatch.setattr(program.launching, "register", lambda: None)
    monkeypatch.setattr(program, "_compose_and_run", lambda _: queue.launcher.launch(JOBS, 0))
    with pytest.raises(SystemExit) as left:
        program.main()
    said = capsys.readouterr().err
    assert left.value.code == 130 and said.startswith(
        "error: interrupted; resume with the same command, in the same folder; 2 jobs "
    )
    assert "`scancel 7_0 7_2` ends them" in said


def test_a_job_that_is_in_the_queue_already_is_waited_for(slurm: Callable[..., Any], tmp_path: Path) -> None:
    queue = slurm([Job(tmp_path, "8_0"), Job(tmp_path, "8_1")])
    for name in ("6", "7"):  # the first has left the queue
        (queue.folder / name).mkdir(parents=True)
        (queue.folder / name / f"{name}_submitted.pkl").touch()
    assert queue.launcher.launch(JOBS, 0) == ["result of 8_0", "result of 7", "result of 8_1"]
    assert queue.submitted == [[JOBS[0], JOBS[2]]]


def test_nothing_that_catches_errors_swallows_the_end_of_a_job_s_time(
    slurm: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def theirs(number: int, frame: Any) -> None:
        raise FailedJobError("Job not requeued because: timed-out too many times.")

    def work() -> None:
        try:
            signal.raise_signal(signal.SIGUSR2)
        except Exception:
            pytest.fail("swallowed")

    launcher, before = slurm([]).launcher, signal.signal(signal.SIGUSR2, theirs)
    try:
        with pytest.raises(FailedJobError, match="timed-out too many times"):
            launcher(work)
        assert signal.getsignal(signal.SIGUSR2) is theirs
    finally:
        signal.signal(signal.SIGUSR2, before)
