"""What the reliability tests share; `dying` runs the program and kills it, `tally` counts."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evopress.models.tiny import make_tiny

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def not_drawn(sketched: None) -> None:
    """Draw the figures of shared runs alone, which are made before this."""


@pytest.fixture(scope="session")
def warm() -> None:
    """Import what a run imports, once, before anything is forked."""
    for name in ("pandas", "scipy.optimize", "matplotlib.backends.backend_agg", "matplotlib.backends.backend_svg"):
        importlib.import_module(name)


@pytest.fixture(scope="session")
def shared_cache(warm: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the tiny model and its tokens; level databases lie in the trials' own folders."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def trials(shared_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Return the trials of a case: a clean run in a folder of its own, with a cache that has model and tokens, lists the events."""
    from dying import run_child
    from trials import CASES, Trials, outcome

    root = tmp_path_factory.mktemp("trials")
    made: dict[tuple[str, ...], Trials] = {}

    def prepared(case: str, *further: str) -> Trials:
        key = (case, *further)
        if key not in made:
            if case == "drop" and not (root / "six").exists():
                make_tiny(root / "six", num_blocks=6)
            arguments = (*CASES[case], *further, "hydra.run.dir=run", "level_db.root=levels")
            endings = []
            for name in ("cold", "clean"):  # the first one may fill the cache
                endings.append(run_child(arguments, cwd=root / f"{name} {len(made)}", cache=shared_cache))
                assert endings[-1].code == 0, endings[-1].text
            first, second = (outcome(root / f"{name} {len(made)}") for name in ("cold", "clean"))
            assert first == second, "a run that nobody killed does not repeat itself"
            made[key] = Trials(root, shared_cache, arguments, endings[1].events, second)
        return made[key]

    return prepared
