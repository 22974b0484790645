"""Tables and a page of any sweep's folder, written into that folder."""

from __future__ import annotations

import csv
import html
import json
from pathlib import Path
from typing import Any

import pytest
from in_process import run_script
from omegaconf import OmegaConf

from evopress.errors import EvoPressError
from evopress.reporting.jobs import note_failure
from experiments.sweep_report import SweepPage, make_report_of
from experiments.sweeps import any_sweep, command_of_folder
from experiments.tables import make_table_of

ROOT = Path(__file__).parents[2]


def write_job(sweep: Path, name: str, typed: list[str], kl: float | None = None, **config: Any) -> None:
    """Write a made-up job; without a KL it has not been evaluated."""
    folder = sweep / name
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text(OmegaConf.to_yaml(typed), encoding="utf-8")
    settings = {"model": {"name": "toy", "path": None}, "scale": {"name": "mini"}, "data": {"source": "text"}, "seed": 0, **config}
    (folder / ".hydra" / "config.yaml").write_text(OmegaConf.to_yaml(settings), encoding="utf-8")
    (folder / ".hydra" / "hydra.yaml").write_text("hydra: {runtime: {choices: {model: toy}}}\n", encoding="utf-8")
    (folder / "environment.json").write_text(json.dumps({"machine": "one"}), encoding="utf-8")
    if kl is None:
        return
    rows = [{"name": "dense", "kl": 0.0}, {"name": "dp", "kl": 2 * kl}, {"name": "evopress", "kl": kl}]
    result = {"schema": 1, "rows": rows, "search": {"generations": 1, "tokens": 10, "seconds": 3.0, "evaluations": 4}}
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    (folder / "finished.json").write_text("{}", encoding="utf-8")
    lines = [{"generation": i, "tokens": 9 * i, "seconds": float(i), "held_out": {"kl": kl + 1 - i}} for i in range(2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def started(sweep: Path, *overrides: str, **params: str) -> None:
    """Leave what Hydra leaves of a sweep's command."""
    config = {"hydra": {"overrides": {"task": list(overrides)}, "sweeper": {"params": params or None}}}
    (sweep / "multirun.yaml").write_text(OmegaConf.to_yaml(config), encoding="utf-8")


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Two targets and three seeds: one job killed, one failed, one not begun."""
    folder = tmp_path / "my sweep"
    for number, (bits, seed, kl) in enumerate([("2.5", 0, 2.0), ("2.5", 1, 2.2), ("3", 0, 1.0), ("3", 1, None)]):
        write_job(folder, str(number), ["+method=quant", f"bits={bits}", f"seed={seed}"], kl, bits=float(bits), seed=seed)
    started(folder, "+method=quant", "bits=2.5,3", "seed=0,1,2")
    note_failure(folder, folder / "5", ["+method=quant", "bits=3", "seed=2"], "the disk is full: free some space")
    return folder


def test_what_was_swept_is_read_from_the_folder(sweep: Path) -> None:
    found = any_sweep(sweep)
    assert [job.axes for job in found.jobs] == [
        {"bits": "2.5", "seed": "0"},
        {"bits": "2.5", "seed": "1"},
        {"bits": "3", "seed": "0"},
    ]
    assert list(found.missing) == [{"bits": "2.5", "seed": "2"}, {"bits": "3", "seed": "1"}, {"bits": "3", "seed": "2"}]


def test_the_command_that_goes_on_is_the_sweeps_own(sweep: Path) -> None:
    command = f"python -m evopress -m +method=quant bits=2.5,3 seed=0,1,2 'hydra.sweep.dir={sweep}'"
    assert command_of_folder(sweep) == command
    page = make_report_of(sweep, out=sweep)[1].read_text(encoding="utf-8")
    assert html.escape(command) in page and page.index(html.escape(command)) < page.index("python -m experiments.sweep_report")
    (sweep / "multirun.yaml").unlink()
    assert command_of_folder(sweep) == ""


def test_tables_go_into_the_folder(sweep: Path) -> None:
    make_table_of(sweep, out=sweep)
    text = (sweep / "table.md").read_text(encoding="utf-8")
    assert "# The sweep in my sweep" in text and "**bits=2.5**" in text and "**bits=3**" in text
    assert "| EvoPress | 2.100 (2.000..2.200) |" in text
    assert "failed: the disk is full: free some space" in text and "not finished" in text
    rows = list(csv.DictReader((sweep / "results.csv").read_text(encoding="utf-8").splitlines()))
    assert {(row["bits"], row["method"]) for row in rows} >= {("2.5", "evopress"), ("3", "dp")}


@pytest.mark.parametrize("per_target", [4, 12])
def test_of_many_jobs_the_means_come_first(tmp_path: Path, per_target: int) -> None:
    folder = tmp_path / "sweep"
    for bits in ("2.5", "3"):
        for seed in range(per_target):
            write_job(folder, f"{bits} {seed}", [f"bits={bits}", f"seed={seed}"], 1.0 + seed, bits=float(bits), seed=seed)
    make_table_of(folder, out=folder)
    text = (folder / "table.md").read_text(encoding="utf-8")
    assert text.count("| finished |") == 2 * per_target and f"seeds 0 to {per_target - 1};" in text
    assert (text.index("**bits=2.5**") < text.index("| finished |")) == (per_target == 12)


def test_the_page_is_written_when_a_sweep_ends(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the callback `hydra/callbacks=page`; a sweep that has nothing to show says so."""
    for folder in (sweep, sweep / "empty"):
        SweepPage().on_multirun_end(OmegaConf.create({"hydra": {"sweep": {"dir": str(folder)}}}))
    assert (sweep / "report.html").is_file() and not (sweep / "empty").exists()
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()] == ["the sweep's page", "no page of the sweep"]


def test_the_page_goes_into_the_folder(sweep: Path) -> None:
    _, path = make_report_of(sweep, out=sweep)
    page = path.read_text(encoding="utf-8")
    assert path == sweep / "report.html"
    for said in (
        "3 of 6 jobs have finished",
        "not finished: bits=3 seed=1",
        "the disk is full",
        "EvoPress",
        "experiments.sweep_report",
    ):
        assert said in page, said
    assert page.count("<figure>") >= 2  # a curve for each target
    assert "_write" not in page and "<script" not in page


@pytest.mark.parametrize("module", ["tables", "sweep_report"])
def test_the_command_writes_no_tracked_file(module: str, sweep: Path) -> None:
    tracked = {
        path: path.stat().st_mtime_ns for path in (ROOT / "experiments").rglob("*") if path.is_file() and path.suffix != ".pyc"
    }
    done = run_script(f"experiments.{module}", str(sweep))
    assert done.code == 0, done.text
    assert "missing: bits=3 seed=2" in done.text
    assert {path: path.stat().st_mtime_ns for path in tracked} == tracked


def test_a_swept_group_and_a_swept_method(tmp_path: Path) -> None:
    """Options of a group change many settings; the jobs are told apart by what was typed."""
    write_job(tmp_path, "a", ["+method=quant", "bits=3", "model=toy"], 1.0, bits=3, search={"exchange": "size"})
    write_job(tmp_path, "b", ["+method=drop", "sparsity=0.5"], 2.0, sparsity=0.5, search={"exchange": "name"})
    found = any_sweep(tmp_path)
    assert [job.axes["method"] for job in found.jobs] == ["quant", "drop"]
    assert found.jobs[1].axes["model"] == "toy"


def test_defaults_that_have_changed_on_the_way_are_an_axis(tmp_path: Path) -> None:
    """Jobs of an earlier version, which had no such setting, are no seeds of what this one does."""
    before = {"name": "quant"}
    guided = {"tokens": [64], "strategy": {"name": "guided", "rounds": 5}}
    write_job(tmp_path, "a", ["bits=3", "seed=0"], 1.0, bits=3, method=before, search={"tokens": [64]}, archive=True)
    write_job(tmp_path, "b", ["bits=3", "seed=1"], 2.0, bits=3, method=before, search=guided, seed=1)
    write_job(tmp_path, "c", ["bits=3", "seed=2"], 3.0, bits=3, method=before | {"recipe": "best"}, search=guided)
    started(tmp_path, "bits=3", "seed=0,1,2,3")
    found = any_sweep(tmp_path)
    assert [tuple(job.axes.values()) for job in found.jobs] == [
        ("0", "evolution", "paper"),
        ("1", "guided", "paper"),
        ("2", "guided", "best"),
    ]
    assert list(found.jobs[0].axes) == ["seed", "search.strategy.name", "method.recipe"]
    assert list(found.missing) == [{"seed": "3"}] and found.unfinished == ()
    make_table_of(tmp_path, out=tmp_path)
    assert "search.strategy.name=guided method.recipe=paper" in (tmp_path / "table.md").read_text(encoding="utf-8")


def test_a_choice_that_earlier_versions_did_not_have_may_be_swept(tmp_path: Path) -> None:
    write_job(tmp_path, "a", ["seed=0"], 1.0)
    write_job(tmp_path, "b", ["seed=0", "search/strategy=guided"], 2.0, search={"strategy": {"name": "guided"}})
    assert [job.axes for job in any_sweep(tmp_path).jobs] == [{"search/strategy": "evolution"}, {"search/strategy": "guided"}]


def test_an_experiments_parameters_are_what_was_swept(tmp_path: Path) -> None:
    write_job(tmp_path, "a", ["seed=0", "+experiment=mine"], 1.0)
    started(tmp_path, "+experiment=mine", seed="0,1")
    assert list(any_sweep(tmp_path).missing) == [{"seed": "1"}]


@pytest.mark.parametrize("multirun", ["", "{: [", "hydra: 3\n", "hydra: {overrides: {task: ['a=b=(']}}\n"])
def test_a_folder_whose_command_is_lost_or_damaged(multirun: str, sweep: Path) -> None:
    (sweep / "multirun.yaml").write_text(multirun, encoding="utf-8")
    assert len(any_sweep(sweep).jobs) == 3


def test_folders_without_jobs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EvoPressError, match="no job of a sweep lies in"):
        make_table_of(tmp_path, out=tmp_path)
    write_job(tmp_path, "a", ["bits=3"])
    with pytest.raises(EvoPressError, match=r"no job in .* has been evaluated: run the sweep again"):
        make_table_of(tmp_path, out=tmp_path)
