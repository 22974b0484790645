"""The queue of all tables: what is missing is run, once, and tables are made of what there is."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from omegaconf import OmegaConf

from evopress.errors import EvoPressError
from evopress.files import sha256_file
from evopress.run_folder import LOCK, keep_overrides
from evopress.settings import STAGES
from experiments import claims, queue
from experiments.single_runs import Jobs, SingleRun, evopress, evopress_all, has_finished, logged, why_it_failed
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
    (folder / "finished.json").write_text("{}", encoding="utf-8")


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
    assert said.startswith("1 job left, about ")
    assert "Missing" not in (tmp_path / "out" / "table3" / "table.md").read_text(encoding="utf-8")
    assert go() == (0, "0 jobs left\n") and len(ran) == 4


def test_a_job_that_is_damaged_is_run_again_and_failed_as_long_as_it_is(
    ran: list[SingleRun], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where an earlier table has more jobs, it stays."""
    jobs, out = [tmp_path / "table3" / f"seed-{seed}" for seed in range(3)], tmp_path / "out"
    for seed, folder in enumerate(jobs):
        write_job(folder, [f"seed={seed}"], stages=["evaluate"])
        (folder / "finished.json").write_text('{"stages": ["evaluate"]}')
    go = lambda: queue.go(["table3"], root=tmp_path, out=out, at_once=1, further=[])  # noqa: E731
    assert go() == 0 and not ran
    table = (out / "table3" / "runs.csv").read_text(encoding="utf-8")
    shutil.rmtree(jobs[0] / ".hydra")
    (jobs[1] / "result.json").write_text('{"sch')
    assert [has_finished(folder) for folder in jobs] == [False, False, True]

    monkeypatch.setattr(queue, "evopress_all", evopress_all)
    monkeypatch.setattr("experiments.single_runs.logged", lambda *_, **__: True)
    capsys.readouterr()
    assert go() == 3, "two jobs and the table"
    said = capsys.readouterr().out
    assert f"table3 seed=0: failed, it ended without results that can be read ({jobs[0]}/.hydra does not say what it is" in said
    assert "table3 seed=1: failed, " in said and f"remove {jobs[1]}, then it is run anew" in said
    assert "table3: no table: the one in" in said and "has 12 rows of single seeds" in said
    assert (out / "table3" / "runs.csv").read_text(encoding="utf-8") == table


def test_a_sweep_without_a_table_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "evopress_all", lambda runs, at_once: ((run, False) for run in runs))
    assert queue.go(["table3"], root=tmp_path, out=tmp_path / "out", at_once=1, further=[]) == 4, "three jobs and the table"


def test_a_table_that_cannot_be_written_stops_no_other_sweep(
    ran: list[SingleRun], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in range(3):
        write_job(tmp_path / "table3" / f"seed-{seed}", [f"seed={seed}"])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "table3").write_text("")
    go = lambda: queue.go(["table3", "demo"], root=tmp_path, out=tmp_path / "out", at_once=1, further=[])  # noqa: E731
    assert go() > 0 and {run.labels["sweep"] for run in ran} == {"demo"}
    assert f"table3: no table: {tmp_path}/out/table3 cannot be written (" in capsys.readouterr().out


def test_a_list_runs_nothing(ran: list[SingleRun], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    queue.show(["table3", "figure5", "guided"], tmp_path, 4, ["threads=1", "+debug=tiny"])
    said = capsys.readouterr().out.splitlines()
    assert said[:4] == ["table3: 3 of 3 jobs missing", "    seed=0", "    seed=1", "    seed=2"]
    assert f"figure5: python -m experiments.figure5.run --root {tmp_path}" in said
    assert "guided: python -m experiments.guided.measure --method drop --jobs 4 -- threads=1 +debug=tiny" in said
    assert "guided: 348 of 348 jobs missing" in said
    assert said[-1] == "351 jobs left" and not ran


def test_a_list_goes_on_where_a_sweep_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in (0, 1):
        write_job(tmp_path / "table3" / f"{seed}", [f"seed={seed}"], bits=3.0 + seed)
    assert queue.show(["table3", "table16"], tmp_path, 4, ["threads=1"]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("table3: left out: the runs are not of one table: bits is 3.0 in")
    assert said[1] == "table16: 6 of 6 jobs missing"


def test_what_scripts_run_are_jobs_of_the_queue(
    ran: list[SingleRun], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They have their place in what is left, are run beside the sweeps', and are not run again; the script makes its table then."""
    monkeypatch.chdir(tmp_path)
    asked: list[str] = []
    monkeypatch.setattr(queue, "logged", lambda command, folder: asked.append(command[2]) or asked.count(command[2]) > 1)
    monkeypatch.setattr(queue.claims, "write", lambda: None)
    monkeypatch.setattr("experiments.calibration.measure.write_texts", lambda folder: asked.append(folder.as_posix()))
    script = "experiments.calibration.measure"
    monkeypatch.setitem(queue.SCRIPTS, "calibration", (f"{script} --seeds 1 2 --texts docs --jobs {{jobs}} -- {{further}}",))

    def go() -> tuple[int, str]:
        failed = queue.go(["calibration"], root=tmp_path / "multirun", out=None, at_once=2, further=["threads=1"])
        return failed, capsys.readouterr().out

    failed, said = go()
    assert said.startswith("8 jobs left\n") and "calibration docs-0.125-1: done; 7 jobs left, about " in said
    assert asked == ["multirun/calibration/texts", script] and len(ran) == 8
    assert {"+method=drop", "threads=1"} <= set(ran[0].arguments)
    assert failed == 1, "the script; jobs that have failed are its own to try again"

    failed, said = go()
    assert said.startswith("4 jobs left\n") and len(ran) == 12 and failed == 0
    assert go() == (0, "0 jobs left\ncalibration: done\n") and asked.count(script) == 2


def test_a_job_that_was_killed_after_its_evaluation_is_gone_on_with(tmp_path: Path) -> None:
    jobs = [tmp_path / "table3" / f"seed-{seed}" for seed in range(3)]
    for seed, folder in enumerate(jobs):
        write_job(folder, [f"seed={seed}"])
    (jobs[1] / "finished.json").unlink()
    (jobs[2] / "finished.json").write_text(json.dumps({"stages": ["database", "search"]}))
    keep_overrides(jobs[2], ["seed=2", "stages=[database,search,evaluate]"])
    left = queue.missing("table3", tmp_path)
    assert [dict(each) for each in left.jobs] == [{"seed": "1"}, {"seed": "2"}] and left.total == 3


def test_a_job_that_is_told_no_stages_has_all_by_default(tmp_path: Path) -> None:
    write_job(tmp_path / "job", ["seed=0"], stages="${stages_by_default:false}")
    (tmp_path / "job" / "finished.json").write_text(json.dumps({"stages": [each for each in STAGES if each != "refine"]}))
    ask = "from pathlib import Path; from experiments.single_runs import has_finished; print(has_finished(Path('job')))"
    asked = subprocess.run([sys.executable, "-c", ask], cwd=tmp_path, env=with_sources(), capture_output=True, text=True)
    assert asked.stdout == "True\n", asked.stderr  # where nothing else has made Hydra's resolvers known


def with_sources() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(queue.__file__).parents[1])}


def test_a_job_has_finished_when_the_stages_of_its_own_config_are_done(tmp_path: Path) -> None:
    write_job(tmp_path, ["seed=0"], stages=["database", "search", "evaluate", "report"])
    finished = tmp_path / "finished.json"
    for done, expected in (("database search evaluate report", True), ("database search evaluate", False)):
        finished.write_text(json.dumps({"stages": done.split()}))
        assert has_finished(tmp_path) == expected
    keep_overrides(tmp_path, ["seed=0", "stages=[database, search]"])  # what was typed counts, a later command's config does not
    assert has_finished(tmp_path)


def test_a_job_whose_genome_has_changed_is_measured_again(tmp_path: Path) -> None:
    genome = tmp_path / "2.5.txt"
    genome.write_text("one")
    write_job(tmp_path / "job", [])
    keep_overrides(tmp_path / "job", [f"genome={genome}", "stages=[evaluate]"])
    for told in ({}, {"contents": {"genome": sha256_file(genome)}}):
        (tmp_path / "job" / "finished.json").write_text(json.dumps({"stages": ["evaluate"], **told}))
        assert has_finished(tmp_path / "job")
    genome.write_text("another")
    assert not has_finished(tmp_path / "job")
    genome.unlink()
    assert has_finished(tmp_path / "job")


def test_a_job_that_outlived_its_queue_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, ran = tmp_path / "job", []
    folder.mkdir()
    monkeypatch.setattr("experiments.single_runs.logged", lambda *args, **options: ran.append(1) or True)
    with FileLock(folder / LOCK):
        waiting = threading.Thread(target=lambda: evopress(folder, "bits=3"))
        waiting.start()
        time.sleep(0.5)
        assert waiting.is_alive() and not ran
        (folder / "finished.json").write_text("{}")
    waiting.join(timeout=10)
    assert not waiting.is_alive() and not ran, "it has finished meanwhile"
    assert evopress(tmp_path / "other", "bits=3") and ran


def test_paper_stands_for_its_tables_and_figures() -> None:
    assert {"table16", "table3_best", "demo_paper", "figure1", "theorem1", "table13"} <= set(queue.GROUPS["paper"])
    assert not {"demo", "guided", "allocation"} & set(queue.GROUPS["paper"])


def test_the_papers_are_what_is_run_unless_names_are_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[list[str]] = []
    monkeypatch.setattr(queue, "show", lambda names, *_: told.append(names))
    for words in ([], ["paper"], ["all"], ["table3", "paper"]):
        monkeypatch.setattr(sys, "argv", ["queue", *words, "--root", str(tmp_path), "--list"])
        queue.main()
    default, paper, everything, first = told
    assert default == paper and everything == list(queue.NAMES) and set(paper) < set(everything)
    assert first[0] == "table3" and sorted(first) == sorted(paper)


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


def test_a_script_whose_jobs_failed_keeps_no_other_from_its_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(queue, "logged", lambda command, folder: asked.append(command[4]) or len(asked) != 1)
    monkeypatch.setattr(queue, "missing_of_script", lambda *_: None)
    assert [queue.run_script("guided", tmp_path, 2, []), queue.run_script("guided", tmp_path, 2, [])] == [False, True]
    assert asked == ["quant", "sparsity", "drop"] * 2


@pytest.mark.parametrize("failing", [(), ("b",), ("a", "b")])
def test_a_script_ends_with_an_error_where_a_job_has(
    failing: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The others are taken, and tables made of them, before."""
    monkeypatch.setattr("experiments.single_runs.evopress", lambda folder, *_, running: folder.name not in failing)
    jobs = Jobs([SingleRun(tmp_path / name, ()) for name in "abc"])
    assert sorted(run.folder.name for run in jobs) == sorted({*"abc"} - {*failing})
    said = capsys.readouterr().out
    assert said.startswith("3 jobs, 3 jobs left\n") and said.count("see its log") == len(failing)
    if failing:
        with pytest.raises(EvoPressError, match=f"^{len(failing)} of 3 jobs failed; the same command goes on with what is missing"):
            jobs.check()
    else:
        jobs.check()


def test_scripts_that_read_sweeps_are_run_again_when_these_have_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(queue, "logged", lambda command, folder: asked.append(command[2]) or True)
    write_job(tmp_path / "table9_12" / "seed-0", [])
    assert queue.run_script("figure5", tmp_path, 2, ()) and queue.run_script("figure5", tmp_path, 4, ())
    assert asked == ["experiments.figure5.run"], "with as many at once as ever"
    write_job(tmp_path / "table9_12" / "seed-1", [])
    os.utime(tmp_path / "table9_12" / "seed-1" / "result.json", (2e9, 2e9))
    assert queue.run_script("figure5", tmp_path, 2, ()) and len(asked) == 2


def test_a_table_is_made_again_of_jobs_that_ended_without_the_queue(ran: list[SingleRun], tmp_path: Path) -> None:
    for seed in range(3):
        write_job(tmp_path / "table3" / f"seed-{seed}", [f"seed={seed}"])
    table = tmp_path / "out" / "table3" / "table.md"
    table.parent.mkdir(parents=True)
    table.write_text("OLD", encoding="utf-8")
    go = lambda: queue.go(["table3"], root=tmp_path, out=tmp_path / "out", at_once=1, further=[])  # noqa: E731
    assert go() == 0 and table.read_text(encoding="utf-8") == "OLD", "it is newer than they are"
    os.utime(table, (1e9, 1e9))
    assert go() == 0 and table.read_text(encoding="utf-8").startswith("# Table 3") and not ran


def test_one_queue_at_a_time_and_no_script_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["queue", "table3", "--root", str(tmp_path), "--list"])
    with queue.alone(tmp_path):
        queue.main()
        monkeypatch.setattr(sys, "argv", ["queue", "table3", "--root", str(tmp_path)])
        with pytest.raises(SystemExit):
            queue.main()
    assert f"error: another queue is at work in {tmp_path}: wait" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["queue", "table13", "--root", str(tmp_path), "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        queue.main()
    assert "table13 writes into its own folder" in capsys.readouterr().err


def test_a_stopped_script_ends_with_the_queue_and_the_last_attempt_says_why(tmp_path: Path, monkeypatch: Any) -> None:
    asked: list[str] = []

    class Process:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def wait(self) -> int:
            asked.append("wait")
            if asked.count("wait") == 1:
                raise KeyboardInterrupt
            return 1

        def terminate(self) -> None:
            asked.append("terminate")

    monkeypatch.setattr("experiments.single_runs.subprocess.Popen", Process)
    (tmp_path / "job.log").write_text("$ python\nerror: the disk is full\n", encoding="utf-8")
    assert why_it_failed(tmp_path / "job") == "the disk is full"
    with pytest.raises(KeyboardInterrupt):
        logged(["python", "-m", "http.server"], tmp_path / "job")
    assert asked == ["wait", "terminate", "wait"]
    assert why_it_failed(tmp_path / "job") == "see its log"


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
        yield SingleRun(tmp_path / "second", ("second",))
        raise KeyboardInterrupt

    begun.clear()
    ended.clear()
    with pytest.raises(KeyboardInterrupt):
        next(evopress_all(interrupted(), at_once=1))
    assert begun == ended and len(begun) < 2


def test_the_first_job_is_told_of_before_all_are_composed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiments.single_runs.evopress", lambda folder, *_, running: True)
    composed = (SingleRun(tmp_path / str(number), ()) for number in range(9))
    jobs = evopress_all(composed, at_once=2)
    ended = [next(jobs)]
    assert len(list(composed)) == 5
    assert all(well for _, well in [*ended, *jobs])
    every = evopress_all((SingleRun(tmp_path / str(number), ()) for number in range(9)), at_once=2)
    assert sorted(run.folder.name for run, _ in every) == [str(number) for number in range(9)]


def test_a_finished_run_of_other_settings_is_not_taken_for_the_job(tmp_path: Path) -> None:
    folder = tmp_path / "job"
    folder.mkdir()
    keep_overrides(folder, ["+method=quant", "bits=5", "tracker=none"])
    (folder / "finished.json").write_text("{}")
    assert evopress(folder, "+method=quant", "bits=5", "threads=1")
    assert not evopress(folder, "+method=quant", "bits=4")
    assert "of other settings (bits=5 there, 4 here): move it away" in why_it_failed(folder)


@pytest.mark.parametrize("done", [2, 3])
def test_a_finished_job_of_other_settings_leaves_its_sweep_out(
    done: int, ran: list[SingleRun], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before any job of it; what decides rounding or the machine alone may differ, and an axis need not have been typed."""
    for seed in range(done):
        write_job(tmp_path / "table3" / f"seed-{seed}", [f"seed={seed}"] if seed else [], seed=seed)
        keep_overrides(tmp_path / "table3" / f"seed-{seed}", ["+experiment=table3", *([f"seed={seed}"] if seed else [])])
    go = lambda *further: queue.go(["table3"], root=tmp_path, out=tmp_path / "out", at_once=1, further=further)  # noqa: E731
    assert go("threads=1", "search.generations=12") == 1 and not ran
    said = capsys.readouterr().out
    assert f"table3: left out: {tmp_path}/table3/seed-0 has a finished run of other settings" in said
    assert "(search.generations=not given there, 12 here)" in said
    assert queue.show(["table3"], tmp_path, 1, ["search.generations=12"]) == 1
    free = ("threads=2", "tracker=none", "model.device=cpu", "fitness.chunk_tokens=64")
    assert len(queue.missing("table3", tmp_path, free).jobs) == 3 - done


def test_the_page_says_how_many_jobs_there_are(tmp_path: Path) -> None:
    sweeps = sum(queue.missing(name, tmp_path).total for name in queue.SWEEPS)
    of_scripts = [queue.missing_of_script(name, tmp_path, 2, []) for name in queue.SCRIPTS]
    total = sum(each.total for each in of_scripts if each)
    text = (Path(queue.__file__).parent / "README.md").read_text(encoding="utf-8")
    of_paper = sum(queue.missing(name, tmp_path).total for name in queue.GROUPS["paper"] if name in queue.SWEEPS)
    assert f"on both forms of levels: {of_paper} jobs" in text and f"It is {sweeps + total} jobs" in text


def test_the_page_names_the_experiments_that_no_name_stands_for() -> None:
    page = Path(queue.__file__).with_name("README.md")
    _, _, after = page.read_text(encoding="utf-8").partition("`ARGS=all` ")
    left_out = {path.parent.name for path in page.parent.glob("*/README.md")} - set(queue.GROUPS["all"])
    assert left_out and set(re.findall(r"\]\((\w+)\)", after.partition("whose pages")[0])) == left_out


def test_a_folder_may_have_any_name_and_scripts_choose_plain_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr("experiments.single_runs.logged", lambda command, folder, running: asked.append(command[-1]) or True)
    assert evopress(tmp_path / "a, b=c", "bits=5") and evopress(tmp_path / "plain-1.5", "bits=5")
    assert asked == [f"hydra.run.dir='{tmp_path}/a, b=c'", f"hydra.run.dir={tmp_path}/plain-1.5"]
    folders = [run.folder for name in queue.SCRIPTS for run in runs_of(name)]
    assert len(folders) == len(set(folders)) > 500 and all(re.fullmatch(r"[\w./+-]+", str(folder)) for folder in folders)


def runs_of(name: str) -> list[SingleRun]:
    """Return what a script runs, as it is asked to by the queue."""
    return [run for module, asked in queue.with_jobs(name, Path("multirun"), 2, []) for run in module.asked_runs(asked)]


def test_a_script_without_what_it_needs_stops_no_other(
    ran: list[SingleRun], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def gone(_: Path) -> None:
        raise EvoPressError("the text of kind exams is not there")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("experiments.calibration.measure.write_texts", gone)
    monkeypatch.setattr(queue.claims, "write", lambda: None)
    monkeypatch.setattr(queue, "make", lambda *_, **__: True)
    assert (
        queue.go(["table3", "calibration"], root=tmp_path / "multirun", out=None, at_once=2, further=[]) == 2
    )  # one of table3 fails
    assert "calibration: left out: the text of kind exams is not there" in capsys.readouterr().out
    assert len(ran) == 3


def test_a_script_whose_jobs_failed_is_not_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It makes its table of those that there are, and ends well."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(queue, "logged", lambda command, folder: True)
    assert not queue.run_script("levels", tmp_path / "multirun", 2, [])
    for run in runs_of("levels"):
        write_job(run.folder, [])
    assert queue.run_script("levels", tmp_path / "multirun", 2, [])


def test_the_page_says_what_no_queue_runs() -> None:
    page = claims.README.read_text(encoding="utf-8")
    said = set(re.findall(r"\[(\w+)\]", page.partition("but for")[2].partition("whose pages")[0]))
    there = {path.parent.name for path in claims.README.parent.glob("*/README.md")}
    assert said == there - set(queue.NAMES) and len(said) > 1
