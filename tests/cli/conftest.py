"""Run the program inside this process, on the tiny model."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from in_process import Outcome, invoke

TINY = ("+method=quant", "bits=3.5", "+debug=tiny", "search/strategy=evolution")
SPARSE = ("+method=sparsity", "sparsity=0.5", "+debug=tiny", "search/strategy=evolution")


@pytest.fixture(autouse=True)
def quick(sketched: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw the figures of shared runs alone, which are made before this; wait for no disk (`tests/reliability` asks about that)."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for all runs: the tiny model, tokens and level databases."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def invoked(cache: Path) -> Callable[..., Outcome]:
    """Run the quantization of the tiny model with further arguments, in a folder that is given: for runs that many tests read."""
    return lambda *arguments, cwd: invoke(*TINY, *arguments, cache=cache, cwd=cwd)


@pytest.fixture
def evopress(cache: Path, tmp_path: Path) -> Callable[..., Outcome]:
    """Run the program with exactly these arguments, in an empty folder."""
    return lambda *arguments: invoke(*arguments, cache=cache, cwd=tmp_path)


@pytest.fixture
def evopress_in(cache: Path) -> Callable[..., Outcome]:
    """Run the program in a folder, with exactly these arguments."""
    return lambda cwd, *arguments: invoke(*arguments, cache=cache, cwd=cwd)


@pytest.fixture
def tiny(evopress: Callable[..., Outcome], tmp_path: Path) -> Callable[..., Outcome]:
    """Run the quantization of the tiny model in `tmp_path/run` (or another folder), with further arguments."""

    def run(*arguments: str, folder: Path = tmp_path / "run") -> Outcome:
        return evopress(*TINY, f"hydra.run.dir={folder}", *arguments)

    return run


@dataclass(frozen=True)
class Finished:
    """A whole run, done once; tests read it and change nothing."""

    folder: Path
    outcome: Outcome


@pytest.fixture(scope="session")
def finished(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The tiny run with all its stages, seed 0."""
    cwd = tmp_path_factory.mktemp("finished")
    outcome = invoke(*TINY, "hydra.run.dir=run", cache=cache, cwd=cwd)
    assert outcome.code == 0, outcome.text
    return Finished(cwd / "run", outcome)


@pytest.fixture
def sparse(evopress: Callable[..., Outcome], tmp_path: Path) -> Callable[..., Outcome]:
    """Prune the tiny model by half in `tmp_path/run`, with further arguments."""
    return lambda *arguments: evopress(*SPARSE, f"hydra.run.dir={tmp_path / 'run'}", *arguments)


@pytest.fixture(scope="session")
def finished_sparse(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The tiny sparsity run with all its stages, seed 0."""
    cwd = tmp_path_factory.mktemp("finished_sparse")
    outcome = invoke(*SPARSE, "hydra.run.dir=run", cache=cache, cwd=cwd)
    assert outcome.code == 0, outcome.text
    return Finished(cwd / "run", outcome)


@pytest.fixture(scope="session")
def plain(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the folder of a method's tiny run up to its evaluation, made once; tests read it and change nothing."""
    made: dict[str, Path] = {}

    def of(method: str) -> Path:
        if method not in made:
            cwd = tmp_path_factory.mktemp(f"plain_{method}")
            arguments = {"quant": TINY, "sparsity": SPARSE}[method]
            outcome = invoke(*arguments, "hydra.run.dir=run", "stages=[database,baselines,search,evaluate]", cache=cache, cwd=cwd)
            assert outcome.code == 0, outcome.text
            made[method] = cwd / "run"
        return made[method]

    return of
