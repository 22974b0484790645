"""What stops a run on purpose: signals, no memory, a full disk, another run in its folder. One sentence, and it goes on."""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dying import Death, Ending, run_child
from safetensors import SafetensorError
from trials import CASES, SHORT, Trials, left_behind, outcome

from evopress import endings, run_folder
from evopress.fitness.minibatch import MinibatchFitness
from evopress.models.blocks import BlockModel

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="forks the program and follows it through /proc")
RUN = (*CASES["quant"], SHORT, "hydra.run.dir=run", "level_db.root=levels")
SWEEP = (
    *("-m", *CASES["quant"], "seed=0,1", "stages=[database,search]", "level_db.root=levels"),
    *("hydra.sweep.dir=sweep", "hydra.sweep.subdir=${hydra.job.num}"),
)
TERM, INT = signal.SIGTERM, signal.SIGINT


def errors(ending: Ending) -> list[str]:
    assert "Traceback" not in ending.text, ending.text
    return [line.removeprefix("error: ") for line in ending.text.splitlines() if line.startswith("error: ")]


def state(cwd: Path) -> dict[str, Any]:
    return json.loads((cwd / "run" / "state.json").read_text(encoding="utf-8"))


# Signals


@pytest.mark.parametrize(
    ("death", "code"),
    [
        pytest.param(Death("build_database", "block", nth=1, number=TERM), 143, marks=pytest.mark.slow),
        (Death("build_database", "os.rename", "block-001", number=INT), 130),
        pytest.param(Death("search", "minibatch", nth=4, number=TERM), 143, marks=pytest.mark.slow),
        (Death("search", "os.rename", "state.json", nth=2, number=INT), 130),
    ],
    ids=lambda value: f"{value.stage} {value.what}" if isinstance(value, Death) else str(value),
)
def test_a_signal_ends_a_run_that_goes_on_to_the_same_end(death: Death, code: int, trials: Callable[..., Trials]) -> None:
    assert code == 128 + death.number
    assert trials("quant", SHORT).run(death, resume=death.stage == "search", name=f"signal {code} {death.what}")


def test_the_sentence_says_how_to_go_on(tmp_path: Path, shared_cache: Path) -> None:
    ending = run_child(RUN, cwd=tmp_path, cache=shared_cache, death=Death("search", "minibatch", nth=4, number=TERM))
    assert ending.code == 143
    assert errors(ending) == ["interrupted; resume with: python -m evopress resume=run"]
    assert state(tmp_path)["evolution"]["generation"] == 2  # at once, not at the end of the generation
    assert left_behind(tmp_path) == []


def test_a_signal_that_is_swallowed_ends_the_run_within_a_generation(tmp_path: Path, shared_cache: Path) -> None:
    """What is raised while a finaliser runs, Python reports and drops."""

    class Finalised:
        def __del__(self) -> None:
            os.kill(os.getpid(), TERM)
            for _ in range(1000):  # here it is raised
                pass

    def prepare() -> None:
        original, calls = MinibatchFitness.__call__, iter(range(100))

        def fitness(*args: Any, **options: Any) -> Any:
            if next(calls) == 4:
                Finalised()
            return original(*args, **options)

        MinibatchFitness.__call__ = fitness  # type: ignore[method-assign]

    ending = run_child(RUN, cwd=tmp_path, cache=shared_cache, prepare=prepare)
    assert ending.code == 143
    assert state(tmp_path)["evolution"]["generation"] == 3  # finished, and saved: not raised where the signal came


def test_a_second_signal_ends_the_process_at_once() -> None:
    child = os.fork()
    if child == 0:
        signal.signal(INT, signal.default_int_handler)  # whatever the tests were started to ignore
        signal.signal(TERM, signal.SIG_DFL)
        with endings.stopping_at_signals():
            try:
                os.kill(os.getpid(), INT)
            except endings.Stopped:
                os.kill(os.getpid(), TERM)
                time.sleep(60)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -TERM


def test_handlers_are_given_back_and_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(INT, signal.SIG_IGN)
    try:
        handler = signal.getsignal(TERM)
        with endings.stopping_at_signals():
            assert signal.getsignal(TERM) is not handler
            os.kill(os.getpid(), INT)  # nothing
        assert signal.getsignal(TERM) is handler and signal.getsignal(INT) is signal.SIG_IGN
    finally:
        signal.signal(INT, before)


def test_a_signal_stops_a_whole_sweep_which_goes_on_with_the_job(tmp_path: Path, shared_cache: Path) -> None:
    ending = run_child(SWEEP, cwd=tmp_path, cache=shared_cache, death=Death("search", "minibatch", nth=4, number=TERM))
    assert ending.code == 143
    (sentence,) = errors(ending)
    command = sentence.removeprefix("interrupted; resume with: python -m evopress ").removesuffix(
        " (jobs that are done are not run again)"
    )
    assert command.startswith("-m +method=quant") and command.endswith("hydra.sweep.dir=sweep")
    assert not (tmp_path / "sweep" / "1").exists()
    assert run_child(SWEEP, cwd=tmp_path, cache=shared_cache).code == 0
    assert all((tmp_path / "sweep" / job / "genome.json").exists() for job in "01")


# Memory


def need_too_much() -> Any:
    return torch.empty(2**60)


def ask_the_device() -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.1 GiB.")


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [
        (MinibatchFitness, "__call__", need_too_much),
        pytest.param(MinibatchFitness, "__call__", ask_the_device, marks=pytest.mark.slow),
        pytest.param(BlockModel, "run", lambda: bytearray(2**62), marks=pytest.mark.slow),
    ],
    ids=["torch", "cuda", "python"],
)
def test_no_memory_is_one_sentence_that_names_what_to_lower(
    owner: Any, name: str, call: Callable[[], Any], trials: Callable[..., Trials], tmp_path: Path, shared_cache: Path
) -> None:
    def prepare() -> None:
        original, calls = getattr(owner, name), iter(range(1000))
        setattr(owner, name, lambda *args, **options: call() if next(calls) == 4 else original(*args, **options))

    ending = run_child(RUN, cwd=tmp_path, cache=shared_cache, prepare=prepare)
    assert ending.code == 1, ending.text
    (sentence,) = errors(ending)
    assert sentence.startswith("out of memory (")
    for key in (
        "fitness.max_tokens_in_flight=4096",
        "fitness.chunk_tokens=256",
        "level_db.batch_tokens=4096",
        "data.calibration_tokens",
    ):
        assert key in sentence
    searched = owner is MinibatchFitness
    assert ("what the search has done is kept; resume with: python -m evopress resume=run" in ending.text) == searched
    assert left_behind(tmp_path) == []
    assert run_child(RUN, cwd=tmp_path, cache=shared_cache).code == 0
    assert outcome(tmp_path) == trials("quant", SHORT).expected


def test_what_is_a_bug_is_still_shown_as_one(tmp_path: Path, shared_cache: Path) -> None:
    def prepare() -> None:
        MinibatchFitness.__call__ = lambda *args, **options: torch.zeros(2) + torch.zeros(3)  # type: ignore[assignment]

    ending = run_child(RUN, cwd=tmp_path, cache=shared_cache, prepare=prepare)
    assert ending.code == 1
    assert "Traceback" in ending.text and "size of tensor" in ending.text


# The disk


@pytest.mark.parametrize(
    "death",
    [
        Death("search", "fsync", "metrics.jsonl", nth=2, torn=True, error=errno.ENOSPC),
        pytest.param(Death("search", "open to replace", "state.json", nth=2, error=errno.EDQUOT), marks=pytest.mark.slow),
        pytest.param(Death("evaluate", "fsync", "result.json", error=errno.ENOSPC), marks=pytest.mark.slow),
    ],
    ids=lambda death: death.name,
)
def test_a_full_disk_is_one_sentence_and_the_run_goes_on(death: Death, trials: Callable[..., Trials]) -> None:
    assert trials("quant", SHORT).run(death, resume=True, name=f"full {death.name}")


def test_a_full_disk_says_so_where_nobody_expects_it(tmp_path: Path) -> None:
    told = endings.of_the_disk(OSError(errno.ENOSPC, "No space left on device", "figures/lineage.png"), tmp_path)
    assert "the disk is full while writing figures/lineage.png" in str(told)
    assert str(tmp_path) in str(endings.of_the_disk(OSError(errno.ENOSPC, "No space left on device"), tmp_path))
    limited = SafetensorError("Error while serializing: I/O error: File too large (os error 27)")
    assert "cannot be written (" in str(endings.of_the_disk(limited, tmp_path)), "ulimit -f"
    assert endings.of_the_disk(OSError(errno.ENOENT, "No such file"), tmp_path) is None
    assert endings.of_the_disk(ValueError(), tmp_path) is None
    weights = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert f"the disk is full while writing {tmp_path}" in str(endings.of_the_disk(weights, tmp_path))
    assert endings.of_the_disk(SafetensorError("Error while deserializing header"), tmp_path) is None


# Two runs in one folder


def test_a_second_run_in_a_folder_is_refused_and_changes_nothing(tmp_path: Path, shared_cache: Path) -> None:
    few = (*CASES["quant"], "stages=[database]", "level_db.root=levels", "hydra.run.dir=run")
    assert run_child(few, cwd=tmp_path, cache=shared_cache).code == 0
    folder = tmp_path / "run"
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in (".lock", "evopress.log")]
    before = {path: path.read_bytes() for path in files}
    with run_folder.held(folder):
        for arguments in ((*few, "seed=1"), ("resume=run", "seed=1")):
            ending = run_child(arguments, cwd=tmp_path, cache=shared_cache)
            assert ending.code == 1
            (sentence,) = errors(ending)
            assert sentence.startswith(f"another run is at work in {folder}: ")
            assert {path: path.read_bytes() for path in files} == before
    assert (
        run_child(("resume=run", "stages=[database]"), cwd=tmp_path, cache=shared_cache).code == 0
    )  # and the file that is left means nothing


def test_a_job_of_a_sweep_whose_folder_is_taken_is_refused_and_the_others_run(tmp_path: Path, shared_cache: Path) -> None:
    (tmp_path / "sweep" / "0").mkdir(parents=True)
    with run_folder.held(tmp_path / "sweep" / "0"):
        ending = run_child(SWEEP, cwd=tmp_path, cache=shared_cache)
    assert ending.code == 1
    (sentence,) = errors(ending)
    assert sentence.startswith(f"another run is at work in {tmp_path / 'sweep' / '0'}: ")
    assert (tmp_path / "sweep" / "jobs.csv").read_text().splitlines()[1].endswith(",at work elsewhere")
    assert (tmp_path / "sweep" / "1" / "genome.json").exists() and not (tmp_path / "sweep" / "0" / "metrics.jsonl").exists()


def test_a_run_leaves_what_one_inside_its_folder_is_writing(tmp_path: Path) -> None:
    with run_folder.held(tmp_path):
        inner = tmp_path / "inner"
        (inner / "figures").mkdir(parents=True)
        (tmp_path / "exports").mkdir()
    with run_folder.held(inner):
        files = [inner / ".checkpoint.tmp", inner / "figures" / ".front.png.tmp"]
        for path in (*files, tmp_path / "exports" / ".mlx.tmp"):
            path.write_text("half")
        with run_folder.held(tmp_path):
            assert all(path.exists() for path in files) and not list((tmp_path / "exports").iterdir())


def test_a_folder_is_free_again_and_tidy_after_its_run(tmp_path: Path) -> None:
    (tmp_path / ".checkpoint.tmp").mkdir()
    (tmp_path / ".checkpoint.tmp" / "model.safetensors").write_text("half")
    (tmp_path / ".state.json.1.tmp").write_text("half")
    with run_folder.held(tmp_path):
        assert sorted(path.name for path in tmp_path.iterdir()) == [run_folder.LOCK]
        (tmp_path / "evopress.log").write_text("")
        (tmp_path / "environment.json").write_text("{}")  # of a run that has just begun
        with pytest.raises(run_folder.EvoPressError, match="another run is at work"), run_folder.held(tmp_path):
            pass
        assert sorted(path.name for path in tmp_path.iterdir()) == [run_folder.LOCK, "environment.json", "evopress.log"]
    with run_folder.held(tmp_path):
        pass
