"""A run on several processes, as torchrun starts them: the same bits on any number of them, one decides, none outlives another."""

from __future__ import annotations

import json
import os
import pickle
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import torch.distributed  # before processes are forked: it takes a second

from evopress import __main__ as program
from evopress import ranks
from evopress.fitness.minibatch import MinibatchFitness
from evopress.fitness.suffix import SuffixLoss

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes")]
METHODS = {
    "quant": ("+method=quant", "bits=3.5", "+debug=tiny", "scale.refine=true"),
    "sparsity": ("+method=sparsity", "sparsity=0.5", "+debug=tiny", "search/strategy=evolution"),
    "drop": ("+method=drop", "sparsity=0.5", "+debug=tiny"),
}
HERE = ("hydra.run.dir=run", "level_db.root=levels", "stages=[database,baselines,search,refine,evaluate]")
KILLED_IN: dict[str, tuple[Any, int]] = {"quant": (SuffixLoss, 2), "sparsity": (MinibatchFitness, 3), "drop": (MinibatchFitness, 3)}
"""What measures when a process is killed, and how often it has then."""


@dataclass(frozen=True)
class Process:
    """How one process of a run ended."""

    code: int
    """Exit code, or minus the signal that killed it."""
    text: str


def run_on(
    count: int, evopress: Callable[..., Any], *arguments: str, cwd: Path, in_child: Callable[[int], None] = lambda rank: None
) -> list[Process]:
    """Run the program on so many processes, with the environment that torchrun gives them: forked, since imports take seconds.

    Args: in_child: called first in each, with its number.
    """
    cwd.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    sys.stdout.flush()
    for rank in range(count):
        pid = os.fork()
        if pid == 0:
            code = 99
            try:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "TORCHELASTIC_RUN_ID": "x"}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                torch.set_num_threads(1)
                in_child(rank)
                outcome = evopress(cwd, *arguments)
                (cwd / f"said-{rank}").write_text(outcome.text)
                code = outcome.code
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    said = [cwd / f"said-{rank}" for rank in range(count)]
    return [Process(code, path.read_text() if path.exists() else "") for code, path in zip(codes, said, strict=True)]


def found_in(cwd: Path) -> dict[str, object]:
    """Return all that a run found and measured, and its level database, whatever the time it took."""
    run = cwd / "run"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    levels = sorted(path for folder in (cwd / "levels", run / "refined") for path in folder.rglob("*.safetensors"))
    rows, clock = json.loads((run / "result.json").read_text())["rows"], ("seconds", "seconds_spent")
    return {
        "genome": (run / "genome.json").read_bytes(),
        "records": [{key: value for key, value in record.items() if key not in clock} for record in records],
        "rows": [{key: value for key, value in row.items() if key not in clock} for row in rows],
        "levels": {str(path.relative_to(cwd)): path.read_bytes() for path in levels},
    }


def dying_in(kind: Any, nth: int, *, of: int) -> Callable[[int], None]:
    """Let one process be killed when such a thing measures for the n-th time."""

    def install(rank: int) -> None:
        measured, calls = kind._sums, 0

        def dying(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == nth:
                os.kill(os.getpid(), signal.SIGKILL)
            return measured(*args)

        if rank == of:
            kind._sums = dying

    return install


@pytest.mark.parametrize("method", list(METHODS))
def test_a_run_whose_processes_were_killed_goes_on_with_another_number_of_them(
    method: str, evopress_in: Callable[..., Any], tmp_path: Path
) -> None:
    """And finds, on two, what one process finds that nobody disturbs, to the bit."""
    command = (*METHODS[method], *HERE)
    whole = run_on(1, evopress_in, *command, cwd=tmp_path / "whole")
    assert whole[0].code == 0, whole[0].text

    killed = run_on(4, evopress_in, *command, cwd=tmp_path / "killed", in_child=dying_in(*KILLED_IN[method], of=2))
    assert [process.code for process in killed] == [1, 1, -signal.SIGKILL, 1], killed[0].text
    for process in (killed[0], killed[1], killed[3]):
        (error,) = [line for line in process.text.splitlines() if line.startswith("error: ")]
        assert "another process of this run has ended" in error and "Traceback" not in process.text
    assert "resume with: python -m evopress resume=run" in killed[0].text

    ended = run_on(2, evopress_in, "resume=run", HERE[-1], cwd=tmp_path / "killed")
    assert [process.code for process in ended] == [0, 0], ended[0].text
    assert ended[1].text == ""  # the first one says what there is to say
    assert found_in(tmp_path / "killed") == found_in(tmp_path / "whole")


def as_tasks_of_srun(rank: int) -> None:
    """Let a process be one of two tasks that srun has started."""
    for name in ("TORCHELASTIC_RUN_ID", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"):
        del os.environ[name]
    job = str(int(os.environ.pop("MASTER_PORT")) % 20000)
    os.environ |= {"SLURM_JOB_ID": job, "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2"}
    os.environ |= {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}


def as_tasks_of_a_launcher(rank: int) -> None:
    """Let a process be what submitit's job is: one of two such tasks, which runs the job that it is given."""
    as_tasks_of_srun(rank)
    os.environ["SUBMITIT_EXECUTOR"] = "slurm"
    run_job = program.run_job
    program.run_job = lambda command, config: run_job(pickle.loads(pickle.dumps(command)), config)


def test_tasks_of_a_slurm_job_share_it(evopress_in: Callable[..., Any], tmp_path: Path) -> None:
    command = (*METHODS["drop"], *HERE)
    ends = [run_on(2, evopress_in, *command, cwd=tmp_path / "torchrun")]
    for name, in_child in {"srun": as_tasks_of_srun, "launcher": as_tasks_of_a_launcher}.items():
        ends.append(run_on(2, evopress_in, *command, cwd=tmp_path / name, in_child=in_child))
    assert [process.code for end in ends for process in end] == [0] * 6, ends[1][0].text
    assert all("2 processes share the work" in end[0].text for end in ends)
    assert ends[0][0].text.count("what this run will take in each of 2 processes") == 1
    assert f"of memory for 2 processes on {socket.gethostname()}" in ends[0][0].text
    assert found_in(tmp_path / "srun") == found_in(tmp_path / "launcher") == found_in(tmp_path / "torchrun")


def without_memory(rank: int) -> None:
    """Let the second process find no memory."""
    if rank:
        psutil.virtual_memory = lambda: SimpleNamespace(available=1000)


@pytest.mark.parametrize(
    ("argument", "in_child", "says"),
    [("bits=99", lambda rank: None, "99"), ("bits=3", without_memory, "of memory for 2 processes on")],
)
def test_what_is_refused_is_said_once_and_ends_all(
    argument: str, in_child: Callable[[int], None], says: str, evopress_in: Callable[..., Any], tmp_path: Path
) -> None:
    """Also what another process has too little for, before one of them begins."""
    refused = run_on(2, evopress_in, "+method=quant", argument, "+debug=tiny", *HERE, cwd=tmp_path / "two", in_child=in_child)
    assert [process.code for process in refused] == [1, 0]
    (error,) = [line for line in refused[0].text.splitlines() if line.startswith("error: ")]
    assert says in error and refused[1].text == ""
    assert not list(tmp_path.rglob("*.safetensors"))


def test_slurm_s_first_task_is_where_its_step_is_and_what_is_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "4", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"}
    told |= {"SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1", "SLURM_STEP_NUM_NODES": "1"}
    for key in ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST"):
        monkeypatch.setenv(key, "")  # to be given back
        monkeypatch.delenv(key)
    for key, value in told.items():
        monkeypatch.setenv(key, value)
    before = dict(os.environ)
    assert ranks.is_task_of_several() and ranks.asked_for() and not ranks.is_first() and dict(os.environ) == before
    ranks.adopt_slurm_task()
    assert os.environ["MASTER_ADDR"] == "127.0.0.1" and os.environ["WORLD_SIZE"] == "4"
    monkeypatch.setenv("MASTER_ADDR", "mine")
    ranks.adopt_slurm_task()
    assert os.environ["MASTER_ADDR"] == "mine"
    monkeypatch.delenv("MASTER_ADDR")
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", "2")
    ranks.adopt_slurm_task()
    assert os.environ["MASTER_ADDR"] == "10.0.0.1", "where scontrol says nothing"
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert not ranks.is_task_of_several(), "a step of one task in a job of four"
