"""What Hydra's users expect beside groups: settings of one machine, callbacks at the end of a sweep, a sweeper that tunes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from evopress import config as configuration


@pytest.fixture
def composed() -> Iterator[Callable[..., Any]]:
    """Compose the config with Hydra's own part."""
    configuration.register()
    with initialize_config_dir(version_base="1.3", config_dir=str(configuration.config_folder())):
        yield lambda *overrides: compose("config", overrides=list(overrides), return_hydra_config=True)


def test_settings_of_this_machine(evopress: Callable[..., Any], tmp_path: Path) -> None:
    """They lie in `local/default.yaml`; methods, experiments and the command line come after them."""
    (tmp_path / "mine" / "local").mkdir(parents=True)
    (tmp_path / "mine" / "local" / "default.yaml").write_text("# @package _global_\nseed: 7\nthreads: 3\nbits: 5.0\n")
    outcome = evopress("--config-dir", "mine", "+method=quant", "threads=2", "--cfg", "job")
    config = OmegaConf.create(outcome.text)
    assert (config.seed, config.threads, config.bits) == (7, 2, 3.0)


@pytest.mark.parametrize(("option", "names"), [("jobs", ["jobs"]), ("page", ["jobs", "page"])])
def test_callbacks_are_a_group(option: str, names: list[str], composed: Callable[..., Any]) -> None:
    assert list(composed("+method=quant").hydra.callbacks) == ["jobs"]
    assert list(composed("+method=quant", f"hydra/callbacks={option}").hydra.callbacks) == names


def test_the_sweeper_that_tunes(composed: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the plugin, which need not be installed; its jobs measure nothing on held-out text."""
    store = ConfigStore.instance()
    node = {"_target_": "a.sweeper", "direction": "maximize", "n_trials": 1, "n_jobs": 2, "sampler": {"seed": None}, "params": {}}
    monkeypatch.setattr(store, "repo", {**store.repo, "hydra": {**store.repo["hydra"]}})
    store.repo["hydra"]["sweeper"] = {**store.repo["hydra"]["sweeper"]}
    store.store(group="hydra/sweeper", name="optuna", node=node)
    config = composed("+method=quant", "+hparams_search=optuna", "seed=4")
    sweeper = config.hydra.sweeper
    assert (sweeper.direction, sweeper.sampler.seed, config.hydra.mode.name) == ("minimize", 4, "MULTIRUN")
    assert set(sweeper.params) == {"search.max_switches", "search.distribution"}
    assert set(config.stages) == {"database", "search"}


@pytest.mark.parametrize(
    ("argument", "extra"),
    [("+hparams_search=optuna", "optuna"), ("hydra/launcher=slurm", "slurm"), ("hydra/launcher=cluster", "ray")],
)
def test_a_plugin_that_is_missing_is_named(argument: str, extra: str, evopress: Callable[..., Any]) -> None:
    outcome = evopress("-m", "+method=quant", argument)
    if outcome.code == 0 or "needs a plugin" not in outcome.text:
        pytest.skip("it is installed")
    assert f"pip install 'evopress[{extra}]'" in outcome.errors[0]
