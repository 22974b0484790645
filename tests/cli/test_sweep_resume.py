"""The same sweep again: finished jobs are left alone, killed ones go on, changed ones run."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evopress import run_folder
from evopress.finished import FINISHED
from evopress.fitness.minibatch import MinibatchFitness
from evopress.models.tiny import make_tiny
from evopress.reporting.jobs import FAILED

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


def test_a_stage_that_is_killed_later_leaves_the_others_done(
    sweep: Path, evopress: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = sweep / "seed-0"
    with monkeypatch.context() as patch:
        patch.setattr("evopress.stages.one_budget.export", killed)
        assert evopress(f"resume={folder}", "stages=[export]").code == 130
    assert json.loads((folder / FINISHED).read_text())["stages"] == ["database", "search", "evaluate"]
    assert evopress(f"resume={folder}", "stages=[export]").code == 0
    assert json.loads((folder / FINISHED).read_text())["stages"] == ["database", "search", "evaluate", "export"]
    assert skipped(evopress(*SWEEP, *FEW)) == ["sweep/seed-0", "sweep/seed-1"]


def test_finished_jobs_whose_folders_are_taken_are_finished(sweep: Path, evopress: Callable[..., Any]) -> None:
    with run_folder.held(sweep / "seed-0"):
        outcome = evopress(*SWEEP, *FEW)
    assert outcome.code == 0 and skipped(outcome) == ["sweep/seed-0", "sweep/seed-1"], outcome.text


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
        patch.setattr(MinibatchFitness, "__call__", lambda *a, **k: (killed if next(calls) == 0 else original)(*a, **k))
        assert evopress(*SWEEP, *FEW).code == 130  # in the first screen
    assert (sweep / "seed-1" / "state.json").exists() and not (sweep / "seed-1" / FINISHED).exists()
    outcome = evopress(*SWEEP, *FEW)
    assert outcome.code == 0, outcome.text
    assert skipped(outcome) == ["sweep/seed-0"]
    assert "resuming at generation" in outcome.text
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
        patch.setattr("evopress.stages.one_budget.evaluate", killed)
        assert evopress(*SWEEP, *FEW, "evaluation.every=3").code == 130
    assert not (sweep / "seed-0" / FINISHED).exists()
    outcome = evopress(*SWEEP, *FEW)
    assert skipped(outcome) == ["sweep/seed-1"]


def test_a_run_of_its_own_is_always_run(sweep: Path, evopress: Callable[..., Any]) -> None:
    outcome = evopress(*SWEEP[1:4], *FEW, "seed=0", "hydra.run.dir=sweep/seed-0", "evaluation.every=2")
    assert outcome.code == 0, outcome.text
    assert SKIPPED not in outcome.text


# The same folder given again with other settings

NUMBERED = (*SWEEP[:4], "seed=0,1", "hydra.sweep.dir=sweep")
JOB = "baselines.names=,bits={bits},debug=tiny,method=quant,seed={seed}"


def every_byte(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def named(sweep: Path, evopress: Callable[..., Any], tmp_path: Path) -> Path:
    """The finished sweep with folders that Hydra was not told to name."""
    for seed in (0, 1):
        (sweep / f"seed-{seed}").rename(sweep / JOB.format(bits="3.5", seed=seed))
    return sweep


@pytest.mark.parametrize(
    ("axis", "fresh"),
    [
        ("seed=2,0,1", [JOB.format(bits="3.5", seed=2)]),
        ("bits=3.5,3", [JOB.format(bits="3", seed=seed) for seed in (0, 1)]),
        (
            "search.num_offspring=5",
            [JOB.format(bits="3.5", seed=seed).replace("seed", "search.num_offspring=5,seed") for seed in (0, 1)],
        ),
    ],
)
def test_other_settings_go_to_other_folders(axis: str, fresh: list[str], named: Path, evopress: Callable[..., Any]) -> None:
    before = every_byte(named)
    key = axis.partition("=")[0]
    outcome = evopress(*(part for part in NUMBERED if not part.startswith(f"{key}=")), axis, *FEW)
    assert outcome.code == 0, outcome.text
    assert sorted(path.name for path in named.iterdir() if path.is_dir() and f"{path.name}/result.json" not in before) == fresh
    changed = {name.rpartition("/")[2] for name, content in before.items() if (named / name).read_bytes() != content}
    assert changed <= {"evopress.log", "multirun.yaml", "jobs.csv"}  # the log says that the job was finished before
    for job in fresh:
        listed = json.loads((named / job / ".hydra" / "overrides.json").read_text(encoding="utf-8"))["overrides"]
        assert [part for part in job.split(",") if part.removeprefix("+") not in {each.lstrip("+") for each in listed}] in (
            [],
            ["baselines.names="],
        )


def test_a_job_that_is_refused_leaves_its_folder_as_it_was(sweep: Path, evopress: Callable[..., Any]) -> None:
    """Folders that are numbered by hand: job 1 is another now, job 0 as it was."""
    for seed in (0, 1):
        (sweep / f"seed-{seed}").rename(sweep / str(seed))
    before = every_byte(sweep)
    outcome = evopress(*NUMBERED, *FEW, "seed=0,2,1", "hydra.sweep.subdir=${hydra.job.num}")
    assert outcome.code == 1
    assert [("seed 1 there, 2 here" in error) for error in outcome.errors] == [True]
    after = every_byte(sweep)
    assert {name for name in before if before[name] != after[name]} <= {"0/evopress.log", "multirun.yaml", "jobs.csv"}
    assert all(name.startswith(("2/", f"{FAILED}/")) for name in after.keys() - before.keys())  # what was said lies beside the jobs


def test_a_sweep_that_an_earlier_version_numbered_goes_on_in_its_folders(sweep: Path, evopress: Callable[..., Any]) -> None:
    for seed in (0, 1):
        (sweep / f"seed-{seed}").rename(sweep / str(seed))
    (sweep / "0" / ".hydra" / "overrides.json").unlink()  # our first version left Hydra's own form alone
    outcome = evopress(*NUMBERED[:4], "seed=2,1,0", "hydra.sweep.dir=sweep", *FEW)
    assert outcome.code == 0, outcome.text
    assert skipped(outcome) == ["sweep/1", "sweep/0"]
    assert sorted(path.name for path in sweep.iterdir() if path.is_dir()) == ["0", "1", JOB.format(bits="3.5", seed=2)]


def test_a_sweep_that_an_earlier_version_began_goes_on_with_its_defaults(
    evopress: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Quantization was searched by evolution: jobs that it finished are, those that were killed go on, numbered ones too."""
    command = (*NUMBERED[:4], "seed=0,1", "hydra.sweep.dir=sweep", *FEW)
    begun = (*command, "search/strategy=evolution", "hydra.sweep.subdir=${hydra.job.num}")
    original, calls = MinibatchFitness.__call__, itertools.count()
    assert evopress(*begun[:4], "seed=0", *begun[5:]).code == 0
    with monkeypatch.context() as patch:
        patch.setattr(MinibatchFitness, "__call__", lambda *a, **k: (killed if next(calls) == 6 else original)(*a, **k))
        assert evopress(*begun).code == 130
    for seed in (0, 1):
        hydra = tmp_path / "sweep" / str(seed) / ".hydra"
        kept = [each for each in run_folder.kept_overrides(hydra.parent) if "search/strategy" not in each]
        run_folder.keep_overrides(hydra.parent, kept)
        (hydra / "overrides.yaml").write_text("".join(f"- {each}\n" for each in kept), encoding="utf-8")
    outcome = evopress(*command)
    assert outcome.code == 0, outcome.text
    assert skipped(outcome) == ["sweep/0"]
    assert "resuming at generation" in outcome.text and "defaults, search/strategy=evolution" in outcome.text
    again = evopress(*command)
    assert again.code == 0 and skipped(again) == ["sweep/0", "sweep/1"], again.text
    assert "strategy" not in (tmp_path / "sweep" / "jobs.csv").read_text(encoding="utf-8"), "nobody has typed it"
    more = evopress(*command[:4], "seed=0,1,2,3", *command[5:], "stages=[database]")
    assert more.code == 0 and more.text.count("had other defaults than those that begin now") == 1, more.text
    assert "other defaults" not in outcome.text + again.text
    asked = evopress(*command, "search/strategy=guided")
    assert asked.code == 0 and skipped(asked) == [], "another job, which is typed"


def test_what_an_experiment_chooses_is_no_default_of_an_earlier_version(evopress: Callable[..., Any]) -> None:
    others = ("+debug=tiny", "seed=0", "hydra.sweep.dir=sweep", "hydra.sweep.subdir=${hydra.job.num}-${search.strategy.name}", *FEW)
    assert evopress("-m", "+experiment=demo_evolution", "bits=3.5", *others, "search.starts=[]").code == 0
    outcome = evopress("-m", "+method=quant", "bits=3.5", *others)
    assert outcome.code == 0 and "other defaults" not in outcome.text, outcome.text


# Model and text that change in place

PLACED = ("-m", "+method=quant", "bits=3.5", "+debug=tiny", "seed=0", "hydra.sweep.dir=sweep", "hydra.sweep.subdir=job", *FEW)
PLACED = (*PLACED, "model.path=model", "data=text", "data.calibration=[a.txt]", "data.search=[b.txt]", "data.evaluation=[c.txt]")


@pytest.fixture
def placed(kept: Path, evopress: Callable[..., Any], tmp_path: Path) -> Path:
    """A finished sweep of one job on a model and texts that lie beside it."""
    if not (kept / "placed").exists():
        make_tiny(tmp_path / "model", seed=0)
        for index, name in enumerate("abc"):
            words = "".join(f"{(i * (index + 3)) % 97} fox{index} {i}. " for i in range(1000))
            (tmp_path / f"{name}.txt").write_text(words, encoding="utf-8")
        outcome = evopress(*PLACED)
        assert outcome.code == 0, outcome.text
        shutil.copytree(tmp_path, kept / "placed")
    else:
        shutil.copytree(kept / "placed", tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.mark.parametrize("said", [True, False], ids=["now", "by a first version"])
def test_what_is_the_same_by_content_is_not_run_again(said: bool, placed: Path, evopress: Callable[..., Any]) -> None:
    """Copies have other times and inodes; a first version did not say the contents, its level database does."""
    path = placed / "sweep" / "job" / FINISHED
    document = json.loads(path.read_text(encoding="utf-8"))
    assert set(document["contents"]) == {"model", "calibration text", "search text", "held-out text text"}
    if not said:
        del document["contents"]
        path.write_text(json.dumps(document), encoding="utf-8")
    shutil.move(placed / "model", placed / "other")
    shutil.copytree(placed / "other", placed / "model")
    outcome = evopress(*PLACED)
    assert outcome.code == 0 and skipped(outcome) == ["sweep/job"], outcome.text


@pytest.mark.parametrize(
    ("changed", "said", "refused"),
    [
        ("model", True, True),
        ("model", False, True),
        ("a.txt", True, True),
        ("a.txt", False, True),
        ("b.txt", True, True),
        ("c.txt", True, False),
    ],
)
def test_what_changed_in_place_is_not_taken_for_done(
    changed: str, said: bool, refused: bool, placed: Path, evopress: Callable[..., Any]
) -> None:
    """What the search stands on is refused, and nothing of the job changes; what it was measured on is measured again."""
    job = placed / "sweep" / "job"
    if not said:
        document = json.loads((job / FINISHED).read_text(encoding="utf-8"))
        del document["contents"]
        (job / FINISHED).write_text(json.dumps(document), encoding="utf-8")
    if changed == "model":
        shutil.rmtree(placed / "model")
        make_tiny(placed / "model", seed=1)
    else:
        text = (placed / changed).read_text(encoding="utf-8")
        (placed / changed).write_text(text[::-1], encoding="utf-8")
    before = every_byte(job)
    outcome = evopress(*PLACED)
    assert skipped(outcome) == []
    assert "was finished with another model or text" in outcome.text
    if refused:
        assert outcome.code == 1
        (sentence,) = outcome.errors
        assert "level database" in sentence or "search text" in sentence
        assert every_byte(job) == before
        return
    assert outcome.code == 0, outcome.text
    was, now = (json.loads(content["result.json"])["rows"][-1]["kl"] for content in (before, every_byte(job)))
    assert was != now
    assert skipped(evopress(*PLACED)) == ["sweep/job"]


SETTINGS = st.dictionaries(
    st.sampled_from(["+method", "bits", "search.tokens", "model.path", "+a/b", "stages", "tracker"]),
    st.one_of(st.text(max_size=40), st.sampled_from(["[64,128]", "64+128", "3.5", "/a/b", "a,b", "x" * 300, "[]", "[3.5]", ""])),
    max_size=5,
)


@given(SETTINGS, SETTINGS)
@settings(max_examples=300, deadline=None)
def test_folders_are_named_by_their_settings(one: dict[str, str], other: dict[str, str]) -> None:
    def named(values: dict[str, str]) -> str:
        return run_folder.job_folder([f"{key}={value}" for key, value in values.items()], Path("nowhere"))

    def decisive(values: dict[str, str]) -> dict[str, str]:
        return {key: value for key, value in values.items() if key not in ("stages", "tracker")}

    for values in (one, other):
        name = named(values)
        assert re.fullmatch(r"[\w.,=+-]+", name) and name not in (".", "..") and len(name.encode()) <= 120
        assert name == named(dict(reversed(values.items())))
    assert (named(one) == named(other)) == (decisive(one) == decisive(other))


def test_a_sweep_ends_with_a_table_of_its_jobs(evopress: Callable[..., Any], tmp_path: Path) -> None:
    """A refused job is in it with its sentence, which is kept beside the folders of the jobs."""
    outcome = evopress("-m", "+method=quant", "+debug=tiny", "bits=9,3.5", "hydra.sweep.dir=sweep", *FEW)
    assert outcome.code == 1
    table = outcome.text.split("the jobs in sweep:\n")[1].splitlines()
    assert table[0].split() == ["bits", "held-out", "KL"]  # folders that are named by their settings are not named again
    (done,), (refused,) = ([line.split() for line in table if line.startswith(f"{bits} ")] for bits in ("3.5", "9"))
    assert refused[1] == "failed:" and "bits=9 is above the highest level" in " ".join(refused)
    kl = next(row["kl"] for path in (tmp_path / "sweep").rglob("result.json") for row in json.loads(path.read_text())["rows"][1:])
    assert done[-1] == "finished" and float(done[-2]) == pytest.approx(kl, rel=1e-3)
    assert not [path for path in (tmp_path / "sweep").rglob("*failed*") if path.parent != tmp_path / "sweep"]
    again = evopress("-m", "+method=quant", "+debug=tiny", "bits=3.5", "hydra.sweep.dir=sweep", *FEW)
    assert again.code == 0 and "bits=9 is above" not in again.text, again.text
