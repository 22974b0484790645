"""The same sweep again: finished jobs are left alone, killed ones go on, changed ones run."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evopress.fitness.minibatch import MinibatchFitness
from evopress.pipeline import FINISHED

SWEEP = ("-m", "+method=quant", "bits=3.5", "+debug=tiny", "seed=0,1", "hydra.sweep.dir=sweep", "hydra.sweep.subdir=seed-${seed}")
FEW = ("baselines.names=[]", "stages=[database,search,evaluate]")
SKIPPED = "finished before, so not run again"


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Return when each result in a run folder was written, and its bytes."""
    names = ("metrics.jsonl", "state.json", "genome.json", "result.json", "environment.json", FINISHED)
    return {name: ((folder / name).stat().st_mtime_ns, (folder / name).read_bytes()) for name in names}


def skipped(outcome: Any) -> list[str]:
    return [line.split(": ")[1].split(" ")[0] for line in outcome.text.splitlines() if SKIPPED in line]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def sweep(kept: Path, evopress: Callable[..., Any], tmp_path: Path) -> Path:
    """A finished sweep of two seeds, run once and copied for each test."""
    if not (kept / "sweep").exists():
        outcome = evopress(*SWEEP, *FEW)
        assert outcome.code == 0, outcome.text
        shutil.move(tmp_path / "sweep", kept / "sweep")
    return shutil.copytree(kept / "sweep", tmp_path / "sweep")


def killed(*arguments: Any, **options: Any) -> Any:
    raise KeyboardInterrupt


def test_finished_jobs_are_not_run_again(sweep: Path, evopress: Callable[..., Any]) -> None:
    before = [contents(sweep / f"seed-{seed}") for seed in (0, 1)]
    outcome = evopress(*SWEEP, *FEW)
    assert outcome.code == 0, outcome.text
    assert skipped(outcome) == ["sweep/seed-0", "sweep/seed-1"]
    assert [contents(sweep / f"seed-{seed}") for seed in (0, 1)] == before
    assert json.loads((sweep / "seed-0" / FINISHED).read_text())["stages"] == ["database", "search", "evaluate"]


def test_a_killed_job_goes_on_and_the_others_are_left_alone(
    sweep: Path, evopress: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [contents(sweep / f"seed-{seed}") for seed in (0, 1)]
    shutil.rmtree(sweep / "seed-1")
    original, calls = MinibatchFitness.__call__, itertools.count()
    with monkeypatch.context() as patch:
        patch.setattr(MinibatchFitness, "__call__", lambda *a, **k: (killed if next(calls) == 4 else original)(*a, **k))
        assert evopress(*SWEEP, *FEW).code == 130  # in generation 2
    assert (sweep / "seed-1" / "state.json").exists() and not (sweep / "seed-1" / FINISHED).exists()
    outcome = evopress(*SWEEP, *FEW)
    assert outcome.code == 0, outcome.text
    assert skipped(outcome) == ["sweep/seed-0"]
    assert "going on at generation 2" in outcome.text
    assert contents(sweep / "seed-0") == expected[0]
    assert contents(sweep / "seed-1")["genome.json"][1] == expected[1]["genome.json"][1]


@pytest.mark.parametrize(
    ("change", "again"),
    [
        ("evaluation.every=3", ["seed-0", "seed-1"]),  # another setting
        ("stages=[database,search,evaluate,report]", ["seed-0", "seed-1"]),  # more to do
        ("stages=[database,search]", []),  # less
    ],
)
def test_what_is_asked_decides(change: str, again: list[str], sweep: Path, evopress: Callable[..., Any]) -> None:
    outcome = evopress(*SWEEP, *FEW, change)
    assert outcome.code == 0, outcome.text
    assert skipped(outcome) == [f"sweep/seed-{seed}" for seed in (0, 1) if f"seed-{seed}" not in again]
    for job in again:
        record = json.loads((sweep / job / FINISHED).read_text())
        assert {"database", "search", "evaluate"} <= set(record["stages"])
        assert ("report" in record["stages"]) == ("report" in change)


def test_what_is_damaged_or_missing_runs_again(sweep: Path, evopress: Callable[..., Any]) -> None:
    (sweep / "seed-0" / FINISHED).write_text("{", encoding="utf-8")
    (sweep / "seed-1" / "result.json").unlink()
    outcome = evopress(*SWEEP, *FEW)
    assert outcome.code == 0, outcome.text
    assert skipped(outcome) == []
    assert all(json.loads((sweep / f"seed-{seed}" / "result.json").read_text())["rows"] for seed in (0, 1))


def test_a_job_that_fails_half_way_is_not_taken_for_finished(
    sweep: Path, evopress: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another evaluation that is cut off leaves neither its own results nor the earlier ones as finished."""
    with monkeypatch.context() as patch:
        patch.setattr("evopress.pipeline.evaluate", killed)
        assert evopress(*SWEEP, *FEW, "evaluation.every=3").code == 130
    assert not (sweep / "seed-0" / FINISHED).exists()
    outcome = evopress(*SWEEP, *FEW)
    assert skipped(outcome) == ["sweep/seed-1"]


def test_a_run_of_its_own_is_always_run(sweep: Path, evopress: Callable[..., Any]) -> None:
    outcome = evopress(*SWEEP[1:4], *FEW, "seed=0", "hydra.run.dir=sweep/seed-0", "evaluation.every=2")
    assert outcome.code == 0, outcome.text
    assert SKIPPED not in outcome.text
