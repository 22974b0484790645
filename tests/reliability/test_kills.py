"""A run killed at any moment of any stage, once or twice, and started again, ends as one that was never killed."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from dying import Death
from trials import CASES, SECOND, SHORT, Trials

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="forks the program and follows it through /proc")

MOMENTS = {
    "in a block of the database, then before its manifest": (
        Death("build_database", "block", nth=1),
        Death("build_database", "os.rename", "manifest"),
    ),
    "with half a line in the journal": (Death("build_database", "fsync", "journal", torn=True),),
    "in the baselines": (Death("find_baselines", "minibatch"),),
    "in the middle of a generation": (Death("search", "minibatch", nth=4),),
    "with half a record": (Death("search", "fsync", "metrics.jsonl", nth=1, torn=True),),
    "with a record whose state is not saved": (Death("search", "os.rename", "state.json", nth=2),),
    "before the genome has its name": (Death("search", "os.rename", "genome.json"),),
    "in the evaluation": (Death("evaluate", "block", nth=4),),
    "with everything done but the last file": (Death("", "os.rename", "finished.json"),),
    # Hydra writes its files in place: for a moment there are none.
    "in the search, then with settings that are half written": (
        Death("search", "minibatch", nth=4),
        Death("", "open to replace", "overrides.yaml", torn=True),
    ),
}


SHORT_FORM = [where for where, deaths in MOMENTS.items() if len(deaths) > 1 or deaths[0].torn or deaths[0].what == "os.rename"]


@pytest.mark.parametrize("where", [pytest.param(key, marks=() if key in SHORT_FORM else pytest.mark.slow) for key in MOMENTS])
def test_a_run_that_is_killed_goes_on_to_the_same_end(where: str, trials: Callable[..., Trials]) -> None:
    deaths = MOMENTS[where]
    killed = trials("quant", SHORT).run(*deaths, resume=len(deaths) > 1 or len(where) % 2 == 0, name=where)
    assert len(killed) == len(deaths) and all(death.of(event) for death, event in zip(deaths, killed, strict=True))


REFINING = {
    "in the first block's Hessians": (Death("refine", "block", nth=2),),
    "between a block's file and its line": (Death("refine", "fsync", "journal", nth=1, torn=True),),
    "with all blocks, twice, before the manifest": (Death("refine", "os.rename", "manifest"),) * 2,
    "before its result is told": (Death("refine", "os.rename", "result.json"),),
    "while what was refined is exported": (Death("export", "open to replace", "evopress.json"),),
}


@pytest.mark.parametrize("where", [pytest.param(key, marks=() if "manifest" in key else pytest.mark.slow) for key in REFINING])
def test_a_second_pass_that_is_killed_goes_on_to_the_same_end(where: str, trials: Callable[..., Trials]) -> None:
    deaths = REFINING[where]
    killed = trials("refined", SECOND).run(*deaths, resume=len(where) % 2 == 0, name=where)
    assert len(killed) == len(deaths) and all(death.of(event) for death, event in zip(deaths, killed, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("number", range(36))
@pytest.mark.parametrize("case", CASES)
def test_kills_at_random_moments(case: str, number: int, trials: Callable[..., Trials]) -> None:
    """A stage is drawn first, then what is done in it, then which time, so that what is rare is met, too; a third die twice."""
    chosen = trials(case)
    rng = np.random.default_rng([number, len(case)])
    deaths = []
    for _ in range(1 + (number % 3 == 0)):
        stages = sorted({event.stage for event in chosen.events})
        stage = stages[(number + len(deaths)) % len(stages)]
        kinds = sorted({event.what for event in chosen.events if event.stage == stage})
        what = kinds[rng.integers(len(kinds))]
        count = sum((event.stage, event.what) == (stage, what) for event in chosen.events)
        deaths.append(Death(stage, what, nth=int(rng.integers(count)), torn=bool(rng.integers(2))))
    assert chosen.run(*deaths, resume=bool(rng.integers(2)), name=f"{case} {number}")


@pytest.mark.slow
@pytest.mark.parametrize("number", range(24))
@pytest.mark.parametrize("case", ["quant", "drop", "refined"])
def test_a_disk_that_is_full_at_random_moments(case: str, number: int, trials: Callable[..., Trials]) -> None:
    """One sentence, nothing half done left behind, and the same end once there is room again."""
    chosen = trials(case)
    rng = np.random.default_rng([1, number, len(case)])
    at = [
        (e.stage, e.what) for e in chosen.events if e.stage and e.what in ("open to write", "open to replace", "os.mkdir", "fsync")
    ]
    kinds = sorted(set(at))
    stage, what = kinds[number % len(kinds)]
    death = Death(stage, what, nth=int(rng.integers(at.count((stage, what)))), torn=True, error=errno.ENOSPC)
    chosen.run(death, resume=bool(rng.integers(2)), name=f"full {case} {number}")  # a folder that is there needs no room


@pytest.mark.slow
@pytest.mark.parametrize("number", range(12))
def test_kills_at_random_times(number: int, trials: Callable[..., Trials]) -> None:
    chosen = trials("quant")
    after = float(np.random.default_rng(number).uniform(0.05, 3.0))
    chosen.run(Death(nth=10**9), resume=number % 2 == 0, name=f"time {number}", after=after)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(8))
def test_kills_while_an_empty_cache_is_filled(number: int, trials: Callable[..., Trials]) -> None:
    """The tiny model, its text and the level database are made; the cache is the trial's own."""
    cold = replace(trials("quant", SHORT), cache=trials("quant", SHORT).root / f"cache {number}")
    death = Death(nth=int(np.random.default_rng(number).integers(100)), torn=number % 2 == 0)
    assert cold.run(death, resume=False, name=f"empty {number}")
