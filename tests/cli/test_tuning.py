"""A sweeper that goes by what its jobs return, such as Optuna's, with a stand-in that need not be installed."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from in_process import Outcome
from omegaconf import DictConfig

from evopress import config as configuration


class InTurn(Sweeper):
    """Runs the values of the one swept argument in turn and keeps what each returns, or raises."""

    returned: ClassVar[list[Any]] = []

    __module__ = "hydra_plugins.in_turn"  # where Hydra asks that plugins be

    def __init__(self, **_: Any) -> None: ...

    def setup(self, *, hydra_context: Any, task_function: Any, config: DictConfig) -> None:
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        (swept,) = (each for each in OverridesParser.create().parse_overrides(arguments) if each.is_sweep_override())
        others = [argument for argument in arguments if argument != swept.input_line]
        for index, value in enumerate(swept.sweep_string_iterator()):
            (job,) = self.launcher.launch([[*others, f"{swept.key_or_group}={value}"]], initial_job_idx=index)
            try:
                self.returned.append(float(job.return_value))
            except Exception as error:
                self.returned.append(error)


@pytest.fixture
def tuned(evopress: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Outcome, list[Any]]]:
    """Run a tiny sweep by the stand-in; return what it says and what its jobs returned."""
    pytest.importorskip("hydra_plugins")
    Plugins.instance().register(InTurn)
    monkeypatch.setitem(sys.modules, "hydra_plugins.in_turn", sys.modules[__name__])
    configuration.register()
    store = ConfigStore.instance()
    monkeypatch.setattr(store, "repo", {**store.repo, "hydra": {**store.repo["hydra"]}})
    store.repo["hydra"]["sweeper"] = {**store.repo["hydra"]["sweeper"]}
    store.store(group="hydra/sweeper", name="in_turn", node={"_target_": "hydra_plugins.in_turn.InTurn"})

    def run(*arguments: str) -> tuple[Outcome, list[Any]]:
        monkeypatch.setattr(InTurn, "returned", [])
        typed = ("-m", "hydra/sweeper=in_turn", "+method=quant", "search/strategy=evolution", "stages=[database,search]")
        outcome = evopress(*typed, "+debug=tiny", "hydra.sweep.dir=sweep", *arguments)
        return outcome, InTurn.returned

    return run


def test_a_trial_that_fails_raises_and_the_others_go_on(tuned: Callable[..., Any]) -> None:
    outcome, returned = tuned("bits=3.5", "search.tokens=[32]", "search.survivors=[9],[1]")
    assert outcome.code == 1 and len(returned) == 2, outcome.text
    assert type(returned[0]).__name__ == "JobFailedError" and math.isfinite(returned[1])
    assert "Traceback" not in outcome.text


def test_trials_return_the_fitness_on_one_text(tuned: Callable[..., Any], tmp_path: Path) -> None:
    """So that the same genome has the same one, whatever the last generation drew; a trial that is done is not measured again."""
    space = ("bits=3.5", "search.starts=[]", "search.max_switches=1", "search.num_offspring=1", "search.survivors=[1]")
    outcome, returned = tuned(*space, "search.tokens=[32],[64]")
    assert outcome.code == 0, outcome.text
    genomes = [path.read_text(encoding="utf-8") for path in sorted(tmp_path.glob("sweep/*/genome.txt"))]
    last = [json.loads(path.read_text().splitlines()[-1])["fitness"] for path in sorted(tmp_path.glob("sweep/*/metrics.jsonl"))]
    assert len(returned) == 2 and (returned[0] == returned[1]) == (genomes[0] == genomes[1]) and last[0] != last[1]
    again, same = tuned(*space, "search.tokens=[32],[64]")
    assert same == returned and again.text.count("finished before") == 2


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (("budgets=[2.5,3]",), "budgets=[...] has a genome for each budget"),
        (("max_kl=0.05",), "a run with a limit, such as max_kl=, returns no fitness"),
        (("bits=3.5", "dry_run=true"), "dry_run=true searches nothing"),
        (("bits=3.5", "stages=[database]"), "the stages have no search"),
    ],
)
def test_what_returns_no_number_is_refused_before_the_first_job(
    given: tuple[str, ...], told: str, tuned: Callable[..., Any], tmp_path: Path
) -> None:
    outcome, returned = tuned(*given, "seed=0,1")
    assert outcome.code == 1 and not returned
    assert len(outcome.errors) == 1 and told in outcome.errors[0] and "Traceback" not in outcome.text
    assert not (tmp_path / "sweep").exists()
