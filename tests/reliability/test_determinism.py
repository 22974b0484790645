"""What a search finds depends on its seed and settings alone: not on what else is measured, drawn or on the clock."""

from __future__ import annotations

import datetime
import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dying import run_child
from trials import CASES, SHORT, Trials, records_of

from evopress.stages import one_budget
from evopress.workspace import Workspace

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="forks the program and follows it through /proc")
RUN = (*CASES["quant"], "hydra.run.dir=run", "level_db.root=levels")
SEARCHED = {"initial", "mutation", "minibatch"}
"""Generators of the search; those of the other stages have names of their own."""


def searched(cwd: Path) -> tuple[list[dict[str, Any]], bytes]:
    """Return what a search did and found; what was measured on the way is left out."""
    records = [{key: value for key, value in record.items() if key != "held_out"} for record in records_of(cwd / "run")]
    return records, (cwd / "run" / "genome.json").read_bytes()


def expected(trials: Trials) -> tuple[list[dict[str, Any]], bytes]:
    records = [{key: value for key, value in record.items() if key != "held_out"} for record in trials.expected["metrics.jsonl"]]
    return records, trials.expected["genome.json"]


OTHERS = (
    "evaluation.every=1 evaluation.every_tokens=64 data.evaluation_tokens=512",
    "baselines.num_random=7 baselines.random_tokens=64 baselines.names=[best_of_random,dp]",
    "level_db.cache_bytes=0",
)


@pytest.mark.parametrize(
    "change",
    [
        " ".join(OTHERS),
        *(pytest.param(change, marks=pytest.mark.slow) for change in (*OTHERS, "tracker=wandb tracker.mode=offline")),
    ],
)
def test_what_else_is_done_never_changes_a_search(
    change: str, trials: Callable[..., Trials], tmp_path: Path, shared_cache: Path
) -> None:
    def prepare() -> None:
        random.seed(99)  # nobody's, and so nobody's to draw from
        np.random.seed(99)
        torch.manual_seed(99)

    ending = run_child((*RUN, SHORT, *change.split()), cwd=tmp_path, cache=shared_cache, prepare=prepare)
    assert ending.code == 0, ending.text
    assert searched(tmp_path) == expected(trials("quant", SHORT))


def test_every_stage_draws_from_its_own_generators_and_the_checkpoint_has_those_of_the_search(
    tmp_path: Path, shared_cache: Path
) -> None:
    def states(workspace: Workspace) -> dict[str, Any]:
        return {name: generator.bit_generator.state for name, generator in workspace.rng.items()}

    def prepare() -> None:
        drawn: dict[str, Any] = {}
        stages = ("build_database", "find_baselines", "search", "evaluate")

        def watch(name: str) -> None:
            original = getattr(one_budget, name)

            def watched(workspace: Workspace, *args: Any, **options: Any) -> None:
                if not drawn:
                    seeds = np.random.SeedSequence(0).spawn(len(workspace.rng))
                    fresh = dict(
                        zip(workspace.rng, (np.random.default_rng(seed).bit_generator.state for seed in seeds), strict=True)
                    )
                    drawn["before all stages"] = [key for key, value in states(workspace).items() if value != fresh[key]]
                before = states(workspace)
                original(workspace, *args, **options)
                drawn[name] = [key for key, value in states(workspace).items() if value != before[key]]
                if name == "search":
                    drawn["states"] = {key: value for key, value in states(workspace).items() if key in SEARCHED}
                (tmp_path / "drawn.json").write_text(json.dumps(drawn))

            setattr(one_budget, name, watched)

        for stage in stages:
            watch(stage)

    ending = run_child((*RUN, SHORT), cwd=tmp_path, cache=shared_cache, prepare=prepare)
    assert ending.code == 0, ending.text
    drawn = json.loads((tmp_path / "drawn.json").read_text())
    kept = drawn.pop("states")
    assert {name: set(of) for name, of in drawn.items()} == {
        "before all stages": set(),
        "build_database": set(),
        "find_baselines": {"random", "random_minibatch"},
        "search": SEARCHED,
        "evaluate": set(),
    }
    state = json.loads((tmp_path / "run" / "state.json").read_text())
    saved = {"minibatch": state["rng_minibatch"], **{name: state["evolution"][f"rng_{name}"] for name in ("initial", "mutation")}}
    assert saved == kept


def test_a_clock_that_goes_backwards_is_not_believed(trials: Callable[..., Trials], tmp_path: Path, shared_cache: Path) -> None:
    def prepare() -> None:
        start, calls = time.time(), iter(range(10**9))

        class Backwards(datetime.datetime):
            @classmethod
            def now(cls, tz: datetime.tzinfo | None = None) -> Backwards:
                return cls.fromtimestamp(time.time(), tz)

        time.time = lambda: start - 3600.0 * next(calls)
        datetime.datetime = Backwards  # type: ignore[misc]

    ending = run_child((*RUN, SHORT), cwd=tmp_path, cache=shared_cache, prepare=prepare)
    assert ending.code == 0, ending.text
    assert not re.search(r"-\d+(\.\d+)? (s|min|h)\b", ending.text), ending.text
    assert "s left" in ending.text
    assert searched(tmp_path) == expected(trials("quant", SHORT))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    seconds = [json.loads(line)["seconds"] for line in lines]
    assert seconds[0] >= 0 and seconds == sorted(seconds)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["database"]["seconds"] >= 0 and result["search"]["seconds"] == seconds[-1]


def test_a_search_goes_on_with_its_own_seed_and_fitness_alone(tmp_path: Path, shared_cache: Path) -> None:
    short = (*RUN, "stages=[database,search]", "search.generations=1", "evaluation.every=0")
    assert run_child(short, cwd=tmp_path, cache=shared_cache).code == 0
    before = searched(tmp_path)
    for change, part in (
        ("seed=1", "seed 0 there, 1 here"),
        ("fitness=perplexity", "fitness 'kl' there, 'perplexity' here"),
        ("data.search_tokens=1024", "search text"),
    ):
        ending = run_child((*short, "search.generations=2", change), cwd=tmp_path, cache=shared_cache)
        assert ending.code == 1 and part in ending.text and "Traceback" not in ending.text, ending.text
        assert searched(tmp_path) == before
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    ending = run_child(("resume=run", "stages=[search]"), cwd=tmp_path, cache=shared_cache)
    assert ending.code == 1 and "metrics.jsonl has 0 records of the 2 generations" in ending.text, ending.text


def test_baselines_of_other_settings_are_found_again(tmp_path: Path, shared_cache: Path) -> None:
    def names() -> list[str]:
        return list(json.loads((tmp_path / "run" / "baselines.json").read_text())["genomes"])

    few = (*RUN, "stages=[database,baselines]")
    assert run_child((*few, "baselines.names=[uniform]"), cwd=tmp_path, cache=shared_cache).code == 0
    assert names() == ["uniform_4", "uniform_3"]
    assert run_child((*few, "baselines.names=[uniform,dp]"), cwd=tmp_path, cache=shared_cache).code == 0
    assert names() == ["uniform_4", "uniform_3", "dp"]
    ending = run_child((*few, "baselines.names=[uniform,dp]"), cwd=tmp_path, cache=shared_cache)
    assert "baselines: already found" in ending.text


@pytest.mark.slow
@pytest.mark.parametrize("case", ["quant", "sparsity"])
def test_the_order_of_sets_does_not_matter(case: str, trials: Callable[..., Trials], tmp_path: Path, shared_cache: Path) -> None:
    """Other processes hash strings otherwise."""
    chosen = trials(case, SHORT)
    for seed in ("1", "2"):
        cwd = tmp_path / seed
        cwd.mkdir()
        environment = os.environ | {"PYTHONHASHSEED": seed, "EVOPRESS_CACHE": str(shared_cache), "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        command = [sys.executable, "-m", "evopress", *chosen.arguments]
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        assert searched(cwd) == expected(chosen)
