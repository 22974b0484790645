"""The table that a sweep ends with: what was typed, the held-out KL, and why a job failed."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from evopress.reporting import jobs
from evopress.reporting.jobs import FAILED, JobsTable, as_csv, as_markdown, as_text, columns, note_failure, own_row, read_jobs


def write_job(sweep: Path, name: str, *typed: str, kl: float | None = None, row: str = "evopress", finished: bool = True) -> Path:
    folder = sweep / name
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text("".join(f"- {each}\n" for each in typed), encoding="utf-8")
    if kl is not None:
        result = {"schema": 1, "rows": [{"name": "dense", "kl": 0.0}, {"name": row, "kl": kl}], "genome": row}
        (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    if finished:
        (folder / "finished.json").write_text("{}", encoding="utf-8")
    return folder


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    write_job(tmp_path, "0", "+method=quant", "bits=3", "seed=0", "tracker=none", kl=1.25)
    write_job(tmp_path, "10", "+method=quant", "bits=2.5", "seed=1", "tracker=wandb", kl=2.5, row="mine/best.txt")
    write_job(tmp_path, "2", "+method=quant", "bits=2.5", "seed=0", finished=False)
    note_failure(tmp_path, tmp_path / "11", ["+method=quant", "bits=9", "seed=0"], "bits=9 is above | all levels: lower it")
    return tmp_path


def test_all_jobs_are_listed_in_the_order_of_their_numbers(sweep: Path) -> None:
    found = read_jobs(sweep)
    assert [(job.name, job.kl, job.state) for job in found] == [
        ("0", 1.25, "finished"),
        ("2", None, "not finished"),
        ("10", 2.5, "finished"),
        ("11", None, "failed: bits=9 is above | all levels: lower it"),
    ]
    assert columns(found) == ["bits", "seed"]  # what all share, and where they are followed, is left out
    lines = as_text(found).splitlines()
    assert lines[0].split() == ["job", "bits", "seed", "held-out", "KL"]
    assert lines[2].split() == ["0", "3", "0", "1.250", "finished"]
    assert lines[-1].endswith("failed: bits=9 is above | all levels: lower it")
    assert list(csv.reader(as_csv(found).splitlines()))[3] == ["10", "2.5", "1", "2.5", "finished"]
    assert as_markdown(found).splitlines()[-1].endswith(r"| failed: bits=9 is above \| all levels: lower it |")


def test_a_note_lies_beside_the_jobs_and_is_gone_when_the_sweep_starts_again(sweep: Path) -> None:
    assert not (sweep / "11").exists() and len(list((sweep / FAILED).iterdir())) == 1
    config = SimpleNamespace(hydra=SimpleNamespace(sweep=SimpleNamespace(dir=str(sweep))))
    callback = JobsTable()
    callback.on_multirun_start(config=config, config_name="config")
    assert [job.name for job in read_jobs(sweep)] == ["0", "2", "10"]


def test_the_table_is_shown_once_and_written(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = SimpleNamespace(hydra=SimpleNamespace(sweep=SimpleNamespace(dir=str(sweep))))
    callback = JobsTable()
    callback.on_multirun_start(config=config)
    callback.on_job_start(config=config, task_function=None)
    callback.on_job_end(config=config, job_return=None)
    callback.on_multirun_end(config=config)
    jobs.show_jobs()
    said = capsys.readouterr().out
    assert said.count(f"the jobs in {sweep}:") == 1 and "1.250" in said
    assert (sweep / "jobs.csv").read_text(encoding="utf-8").startswith("job,bits,seed,held-out KL,state\n0,3,0,1.25,finished\n")


def test_what_a_sweeper_tunes_by_has_a_column(sweep: Path) -> None:
    (sweep / "0" / "finished.json").write_text('{"schema": 1, "fitness": 0.5}', encoding="utf-8")
    assert as_csv(read_jobs(sweep)).startswith("job,bits,seed,fitness,held-out KL,state\n0,3,0,0.5,1.25,finished\n2,2.5,0,,,not")
    assert as_text(read_jobs(sweep)).splitlines()[2].split() == ["0", "3", "0", "0.5000", "1.250", "finished"]


@pytest.mark.parametrize("damage", ["overrides", "result", "note", "nothing"])
def test_what_is_damaged_is_not_finished_or_left_out(damage: str, sweep: Path) -> None:
    if damage == "overrides":
        (sweep / "2" / ".hydra" / "overrides.yaml").write_text("{: [", encoding="utf-8")
    elif damage == "result":
        (sweep / "2" / "result.json").write_text('{"rows": [3, {"name": "evopress", "kl": "x"}]}', encoding="utf-8")
    elif damage == "note":
        (sweep / FAILED / "x.json").write_text("{", encoding="utf-8")
    found = {job.name: job for job in read_jobs(sweep)}
    assert list(found) == ["0", "2", "10", "11"] and found["2"].kl is None


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        ({"rows": [{"name": "evopress", "kl": 1}, {"name": "dp", "kl": 2}], "genome": "dp"}, 1),
        ({"rows": [{"name": "dense", "kl": 0}, {"name": "dp", "kl": 2}], "genome": "dp"}, 2),
        ({"rows": [{"name": "dense", "kl": 0}]}, None),
        ({}, None),
    ],
)
def test_a_runs_own_row(result: dict[str, Any], expected: int | None) -> None:
    row = own_row(result)
    assert (None if row is None else row["kl"]) == expected


def test_a_job_that_was_gone_on_with_is_no_failure_any_more(tmp_path: Path) -> None:
    job = tmp_path / "seed=1"
    (job / ".hydra").mkdir(parents=True)
    (job / ".hydra" / "overrides.yaml").write_text("- seed=1\n")
    jobs.note_failure(tmp_path, job, ["seed=1"], "the disk is full")
    assert jobs.read_jobs(tmp_path)[0].state == "failed: the disk is full"
    (job / "finished.json").write_text("{}")
    os.utime(job / "finished.json", (1e9, 1e9))  # a clock that is behind, set back or another machine's
    assert jobs.read_jobs(tmp_path)[0].state == "finished"
    jobs.note_failure(tmp_path, job, ["seed=1"], "the disk is full again")  # after what had finished before
    os.utime(job / "finished.json", (2e9, 2e9))
    assert jobs.read_jobs(tmp_path)[0].state == "failed: the disk is full again"
    (job / "finished.json").write_text('{"stages": ["search"]}')
    assert jobs.read_jobs(tmp_path)[0].state == "finished"


@pytest.mark.parametrize(("time", "state"), [(2e9, "finished"), (1e9, "failed: the disk is full")])
def test_a_note_of_an_earlier_version_goes_by_the_time(time: float, state: str, tmp_path: Path) -> None:
    job = write_job(tmp_path, "seed=1", "seed=1")
    jobs.note_failure(tmp_path, job, ["seed=1"], "the disk is full")
    (path,) = (tmp_path / FAILED).iterdir()
    note = json.loads(path.read_text())
    del note["finished"]
    path.write_text(json.dumps(note))
    os.utime(job / "finished.json", (time, time))
    assert jobs.read_jobs(tmp_path)[0].state == state


def test_a_finished_job_that_is_refused_keeps_what_it_had_found(sweep: Path) -> None:
    """Where it is the same job; one that was begun again and failed, or is another, has failed."""
    typed = ["+method=quant", "bits=3", "seed=0", "tracker=wandb", "stages=[search]"]
    exported = (["export=[gptq]"], True, "finished")
    for changed, refused, state in (([], True, "finished"), exported, ([], False, "failed: no"), (["seed=1"], True, "failed: no")):
        note_failure(sweep, sweep / "0", [*typed, *changed], "no", refused=refused)
        found = next(job for job in read_jobs(sweep) if job.name == "0")
        assert (found.kl, found.state) == ((1.25 if state == "finished" else None), state)


def test_the_kl_of_several_texts_is_that_of_the_runs_own(tmp_path: Path) -> None:
    job = tmp_path / "seed=1"
    (job / ".hydra").mkdir(parents=True)
    (job / ".hydra" / "overrides.yaml").write_text("- seed=1\n")
    row = {"name": "evopress", "kl": 2.0, "kl_by_data_set": {"own": 1.5, "wiki": 2.5}}
    (job / "result.json").write_text(json.dumps({"rows": [row]}))
    assert jobs.read_jobs(tmp_path)[0].kl == 1.5
