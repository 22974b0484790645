"""The queue of all tables: what is missing is run, once, and tables are made of what there is."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from experiments import queue
from experiments.single_runs import SingleRun, evopress_all
from experiments.specs import BEST_LEVELS, home


def write_job(folder: Path, typed: list[str], **config: Any) -> None:
    """Write a made-up job that has ended."""
    (folder / ".hydra").mkdir(parents=True)
    settings = {"model": {"name": "toy", "path": None}, "scale": {"name": "mini"}, "data": {"source": "docs"}, **config}
    (folder / ".hydra" / "overrides.yaml").write_text(OmegaConf.to_yaml(typed), encoding="utf-8")
    (folder / ".hydra" / "config.yaml").write_text(OmegaConf.to_yaml(settings), encoding="utf-8")
    kl = {"dense": 0.0, "uniform_3": 1.0, "dp": 0.8, "evopress": 0.5}
    rows = [{"name": name, "kl": value, "perplexity": {"docs": 9 + value}} for name, value in kl.items()]
    result = {"schema": 1, "rows": rows, "search": {"seconds": 12.0, "tokens": 100}}
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[SingleRun]:
    """Let jobs end at once with made-up results; those of seed 2 fail the first time."""
    seen: list[SingleRun] = []

    def instead(runs: Iterable[SingleRun], *, at_once: int) -> Iterator[tuple[SingleRun, bool]]:
        for run in runs:
            failed = "seed=2" in run.arguments and run not in seen
            seen.append(run)
            if not failed:
                write_job(run.folder, [each for each in run.arguments if "hydra" not in each])
            yield run, not failed

    monkeypatch.setattr(queue, "evopress_all", instead)
    return seen


def test_what_is_missing_is_run_and_what_failed_is_run_again(
    ran: list[SingleRun], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def go() -> tuple[int, str]:
        failed = queue.go(["table3"], root=tmp_path / "runs", out=tmp_path / "out", at_once=2, further=["threads=1"])
        return failed, capsys.readouterr().out

    failed, said = go()
    assert failed == 1
    assert [run.folder.relative_to(tmp_path / "runs").as_posix() for run in ran] == [f"table3/seed-{seed}" for seed in range(3)]
    assert ran[0].arguments == ("hydra.mode=RUN", "+experiment=table3", "seed=0", "threads=1")
    assert said.startswith("3 jobs left\n") and "table3 seed=0: done; 2 jobs left, about " in said
    assert "table3 seed=2: failed, see its log; 0 jobs left" in said
    assert "Missing: seed=2." in (tmp_path / "out" / "table3" / "table.md").read_text(encoding="utf-8")
    assert {path.name for path in (tmp_path / "out" / "table3").iterdir()} == {"results.csv", "runs.csv", "table.md"}

    failed, said = go()
    assert failed == 0 and [run.arguments[2] for run in ran[3:]] == ["seed=2"]
    assert said.startswith("1 jobs left, about ")
    assert "Missing" not in (tmp_path / "out" / "table3" / "table.md").read_text(encoding="utf-8")
    assert go() == (0, "0 jobs left\n") and len(ran) == 4


def test_a_list_runs_nothing(ran: list[SingleRun], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    queue.show(["table3", "figure5", "guided"], tmp_path, 4, ["threads=1", "+debug=tiny"])
    said = capsys.readouterr().out.splitlines()
    assert said[:4] == ["table3: 3 of 3 jobs missing", "    seed=0", "    seed=1", "    seed=2"]
    assert f"figure5: python -m experiments.figure5.run --root {tmp_path}" in said
    assert "guided: python -m experiments.guided.measure --method drop --jobs 4 -- threads=1 +debug=tiny" in said
    assert said[-1] == "3 jobs left" and not ran


def test_jobs_that_do_not_belong_together_stop_no_other_sweep(ran: list[SingleRun], tmp_path: Path) -> None:
    for name, count in (("a", 16), ("b", 8)):
        write_job(tmp_path / "table3" / name, [f"seed={count}"], search={"num_offspring": count})
    assert queue.go(["table3", "demo"], root=tmp_path, out=tmp_path / "out", at_once=1, further=[]) == 2
    assert {run.labels["sweep"] for run in ran} == {"demo"}


def test_scripts_are_run_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(queue, "logged", lambda command, folder: asked.append(command[1:]) or len(asked) > 1)
    run = lambda *further: queue.run_script("table13", tmp_path, 2, further)  # noqa: E731
    assert [run(), run(), run(), run("threads=2")] == [False, True, True, True]
    assert [command[1] for command in asked] == ["evopress", *["evopress", "experiments.table13.run"] * 2]


def test_a_twin_is_the_same_sweep_on_other_levels(ran: list[SingleRun], tmp_path: Path) -> None:
    """It has folders of its own, and the paper's numbers of what it is a twin of."""
    for seed in (1, 2):
        write_job(tmp_path / "table3_best" / f"seed-{seed}", [f"seed={seed}"])
    assert queue.go(["table3_best"], root=tmp_path, out=tmp_path / "out", at_once=1, further=[]) == 0
    assert [(run.folder, run.arguments) for run in ran] == [
        (tmp_path / "table3_best" / "seed-0", ("hydra.mode=RUN", "+experiment=table3", "method.recipe=best", "seed=0"))
    ]
    text = (tmp_path / "out" / "table3" / "best" / "table.md").read_text(encoding="utf-8")
    assert (
        text.startswith("# Table 3: 3 bits per weight, on the best levels")
        and "The paper: EvoPress < uniform < DP in 8 of 8" in text
    )
    assert home("table3_best") == home("table3") / "best" and set(queue.SWEEPS) >= {f"{name}_best" for name in BEST_LEVELS}


def test_whoever_stops_taking_stops_the_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that run are asked to end and the others never begin."""
    begun: list[str] = []
    ended: list[str] = []

    class Process:
        def __init__(self, command: list[str], **_: Any) -> None:
            self.name, self.event = command[3], threading.Event()
            begun.append(self.name)

        def wait(self) -> int:
            return 0 if self.name == "first" or self.event.wait(20) else 1

        def terminate(self) -> None:
            ended.append(self.name)
            self.event.set()

    monkeypatch.setattr("experiments.single_runs.subprocess.Popen", Process)
    names = ("first", "second", "third", "fourth")
    jobs = evopress_all([SingleRun(tmp_path / name, (name,)) for name in names], at_once=2)
    assert next(jobs)[0].folder.name == "first"
    jobs.close()
    assert set(begun) - set(ended) == {"first"} and len(begun) < 4

    def interrupted() -> Iterator[SingleRun]:
        for name in names[1:]:
            yield SingleRun(tmp_path / name, (name,))
        raise KeyboardInterrupt

    begun.clear()
    ended.clear()
    with pytest.raises(KeyboardInterrupt):
        next(evopress_all(interrupted(), at_once=1))
    assert begun == ended and len(begun) < 2
