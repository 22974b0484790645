"""Tables of the paper from the runs of guided: which rows a job gets, from which folders."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest

from evopress.reporting.drawing import COLOURS, search_styles
from experiments.guided import measure, tables
from experiments.guided.measure import asked_for, folder_of, runs


def _row(name: str, kl: float, bits: float = 2.25, **more: Any) -> dict[str, Any]:
    return {"name": name, "kl": kl, "bits_per_weight": bits, "bytes": bits * 100, **more}


def _write(root: Path, row: str, seed: int, rows: list[dict[str, Any]], target: float = 2.25) -> Path:
    folder = folder_of({"method": "quant", "recipe": "best", "target": target, "row": row, "seed": seed}, root)
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "config.yaml").write_text("seed: 0\n")
    (folder / ".hydra" / "overrides.yaml").write_text(f"- seed={seed}\n")
    search = {} if row == "baselines" else {"search": {"tokens": 500}}
    (folder / "result.json").write_text(json.dumps({"rows": [_row("dense", 0.0, 16.0), *rows], **search}))
    return folder


def _record(folder: Path, evaluations: int) -> None:
    held_out = {"kl": 0.9, "perplexity": {"docs": 30.0}, "top1_agreement": 0.5}
    (folder / "metrics.jsonl").write_text(json.dumps({"evaluations": evaluations, "tokens": 320, "held_out": held_out}) + "\n")


def test_a_job_has_its_baselines_its_start_guided_and_what_it_found(tmp_path: Path) -> None:
    _record(_write(tmp_path, "evolution", 1, [_row("evopress", 0.8)]), 32)
    _write(tmp_path, "baselines", 0, [_row("uniform_2", 1.3, 2.0), _row("dp", 0.85)])
    _write(tmp_path, "guided", 1, [_row("evopress", 0.6)])
    found = list(tables.jobs_of("table16_best", tmp_path))
    assert [axes for axes, job in found if job is not None] == [{"bits": "2.25", "seed": "1"}] and len(found) == 6
    job = next(job for _, job in found if job is not None)
    assert [(row["name"], row["kl"]) for row in job.result["rows"]] == [
        ("dense", 0.0),
        ("dp", 0.85),
        ("best_of_32", 0.9),
        ("guided", 0.6),
        ("evopress", 0.8),
    ]
    start, _, ours = job.result["rows"][2:]
    assert (start["bits_per_weight"], start["kl_by_data_set"], start["tokens_spent"]) == (2.25, {"docs": 0.9}, 320)
    assert (ours["tokens_spent"], job.axes) == (500, {"bits": "2.25", "seed": "1"})


def test_a_search_from_a_level_began_with_no_random_mix(tmp_path: Path) -> None:
    _record(_write(tmp_path, "evolution", 0, [_row("evopress", 0.3, 3.0)], target=3), 0)
    _write(tmp_path, "baselines", 0, [_row("uniform_3", 0.34, 3.0)], target=3)
    job = next(job for _, job in tables.jobs_of("table3_best", tmp_path) if job is not None)
    assert [row["name"] for row in job.result["rows"]] == ["dense", "uniform_3", "evopress"]


def test_folders_are_those_that_measure_makes() -> None:
    (run,) = runs("quant", ["best"], ["evolution"], [3.0], [0], [])
    assert run.folder == folder_of(tables.labels_of("table3_best", {"seed": "0"}, "evolution"))


def test_a_file_of_results_has_its_folder_before_hours_of_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = asked_for(["--results", str(tmp_path / "new" / "results.csv")])
    assert asked.results == tmp_path / "new" / "results.csv" and asked.results.parent.is_dir()
    (tmp_path / "file").touch()
    for path, said in ((tmp_path / "file" / "results.csv", "file"), (tmp_path, "is a folder: name a file in it")):
        with pytest.raises(SystemExit):
            asked_for(["--results", str(path)])
        assert said in capsys.readouterr().err


def test_a_script_that_is_stopped_takes_its_jobs_along(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "experiments.guided.measure", "--recipes", "best", "--rows", "guided", "--targets", "2.5"]
    paths = {"PYTHONPATH": str(Path(measure.__file__).parents[2]), "EVOPRESS_CACHE": str(tmp_path / "cache")}
    asked = ["--seeds", "0", "--results", str(tmp_path / "results.csv"), "--", "+debug=tiny"]
    script = subprocess.Popen([*command, *asked], cwd=tmp_path, env=os.environ | paths, stderr=subprocess.PIPE, text=True)
    jobs: list[psutil.Process] = []
    deadline = time.monotonic() + 120
    while not jobs and script.poll() is None and time.monotonic() < deadline:
        jobs = psutil.Process(script.pid).children()
        time.sleep(0.05)
    assert jobs
    script.send_signal(signal.SIGTERM)
    said = script.communicate(timeout=120)[1]
    assert script.returncode == 128 + signal.SIGTERM and said == "stopped; the same command goes on\n", said
    assert not psutil.wait_procs(jobs, timeout=60)[1]


def test_guided_is_drawn_above_what_begins_with_its_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(measure, "save", lambda figure, *_: drawn.append(figure) or [])
    rows = [("evolution", 9), ("guided", 2), ("guided, then evolution", 4)]
    points = [("quant", "best", 2.5, row, 0, place, 100 * place, 1 / (1 + place)) for row, last in rows for place in range(last)]
    measure.draw(pd.DataFrame(points, columns=[*measure.KEYS, "generation", "tokens", "held_out_kl"]), tmp_path)
    evolution, guided, after = drawn[0].axes[0].get_lines()
    assert guided.get_zorder() > max(evolution.get_zorder(), after.get_zorder())
    assert len({line.get_color() for line in (evolution, guided, after)}) == 3
    looks = search_styles(["evolution", "guided"])
    assert [line.get_color() for line in (evolution, guided)] == [COLOURS[look] for look in looks.values()]


def test_results_that_nothing_wrote_are_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["measure", "--draw", "--results", str(tmp_path / "results.csv")])
    with pytest.raises(SystemExit) as ended:
        measure.main()
    assert ended.value.code == 1
    assert capsys.readouterr().err == f"error: {tmp_path / 'curves.csv'} is not there: no run has ended well yet\n"


def test_the_page_says_by_how_much_its_results_are_lower() -> None:
    """Guided against evolution from dynamic programming, mean over seeds, and the pairs of runs that have one seed."""
    kl = measure.read(measure.FOLDER / "results.csv").set_index(measure.KEYS).held_out_kl.unstack("row").drop(index="drop", level=0)
    pairs = kl[["guided", "evolution from dp"]].dropna()
    means = pairs.groupby(level=["method", "recipe", "target"]).mean()
    lower = (100 * (1 - means["guided"] / means["evolution from dp"])).groupby(level="method").agg(["min", "max"])
    bits, sparsity = lower.loc["quant"], lower.loc["sparsity"]
    page = " ".join((measure.FOLDER / "README.md").read_text(encoding="utf-8").split())
    assert f"by {bits['min']:.2g} to {bits['max']:.0f}% for bits and by {sparsity['min']:.0f} to {sparsity['max']:.0f}% for" in page
    assert f"on {(pairs['guided'] < pairs['evolution from dp']).sum()} of the {len(pairs)} pairs" in page
