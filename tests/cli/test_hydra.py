"""What Hydra's users expect beside groups: settings of one machine, callbacks at the end of a sweep, a sweeper that tunes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf

from evopress import config as configuration
from evopress.reporting import jobs


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
    assert config.search.strategy.name == "evolution", "the one that has the settings of its space"


@pytest.mark.parametrize(
    ("argument", "extra"),
    [("+hparams_search=optuna", "optuna"), ("hydra/launcher=slurm", "slurm"), ("hydra/launcher=cluster", "ray")],
)
def test_a_plugin_that_is_missing_is_named(argument: str, extra: str, evopress: Callable[..., Any]) -> None:
    outcome = evopress("-m", "+method=quant", argument)
    if outcome.code == 0 or "needs a plugin" not in outcome.text:
        pytest.skip("it is installed")
    assert f"pip install -e '.[{extra}]'" in outcome.errors[0]


@pytest.mark.parametrize(
    ("given", "mode"),
    [
        (["+method=quant", "bits=2.5", "seed=3"], RunMode.RUN),
        (["+method=quant", "bits=2.5", "seed=0,1"], RunMode.MULTIRUN),
        (["+experiment=table4"], RunMode.MULTIRUN),  # by itself
    ],
)
def test_a_run_gets_the_config_that_its_mode_was_read_from(
    given: list[str], mode: RunMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hydra composes it anew; ours is the same to the last key, and composed once."""
    configuration.register()
    path = create_config_search_path(str(configuration.config_folder()))
    composed: list[str] = []
    own = ConfigLoaderImpl._compose_config_from_defaults_list
    monkeypatch.setattr(
        ConfigLoaderImpl, "_compose_config_from_defaults_list", lambda self, **given: composed.append("") or own(self, **given)
    )

    def run_config(loader: ConfigLoaderImpl) -> str:
        hydra = Hydra("evopress", loader)
        said = hydra.get_mode("config", given)
        assert said == (mode if "table4" in given[0] else None)
        overrides = given if said else [*given, f"hydra.mode={mode.name}"]
        return OmegaConf.to_yaml(hydra.compose_config("config", overrides, run_mode=mode))

    with monkeypatch.context() as patch:
        patch.setattr(Hydra, "__init__", lambda self, _, loader: setattr(self, "config_loader", loader))
        ours = run_config(configuration.ConfigLoader(path))
        assert len(composed) == 1
        assert ours == run_config(ConfigLoaderImpl(path))


def test_what_the_second_composition_would_refuse_is_refused() -> None:
    configuration.register()
    loader = configuration.ConfigLoader(create_config_search_path(str(configuration.config_folder())))
    for overrides, said in ((["+method=quant", "seed=1,2"], "Ambiguous value"), (["+method=quant", "bit=1"], "bit")):
        with suppress(HydraException):
            loader.load_configuration("config", overrides, RunMode.MULTIRUN, validate_sweep_overrides=False)
        with pytest.raises(HydraException, match=said):
            loader.load_configuration("config", [*overrides, "hydra.mode=RUN"], RunMode.RUN)


def test_listing_groups_copies_no_schemas() -> None:
    """Or `--help` takes five seconds."""
    source = configuration.StructuredConfigSource("schema", "structured://")
    assert copy.deepcopy(source) is source


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("-m", "+method=quant", "bits=2,3", "--cfg", "job"), "-m and --cfg cannot be combined: give one of them"),
        (("--cfg", "job", "--info"), "--cfg and --info cannot be combined: give one of them"),
        (("--resolve", "+method=quant"), "The --resolve flag can only be used in conjunction with --cfg or --help"),
        (
            ("-m", "+method=quant", "bits=2.5,"),
            "bits=2.5, ends with a comma: leave it out, bits=2.5, or give another value after it",
        ),
        (("-m", "+method=glob(zz*)", "bits=3"), "this sweep has no job: what it sweeps over, such as a glob(...), matches nothing"),
    ],
)
def test_what_hydra_has_no_good_words_for(arguments: tuple[str, ...], sentence: str, evopress: Callable[..., Any]) -> None:
    outcome = evopress(*arguments)
    assert (outcome.code, outcome.errors) == (1, [f"error: {sentence}"]), outcome.text


def test_a_config_of_ones_own_that_is_no_yaml_is_one_sentence(evopress: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "mine" / "local").mkdir(parents=True)
    (tmp_path / "mine" / "local" / "default.yaml").write_text("threads: [1\n")
    outcome = evopress("--config-dir", "mine", "+method=quant", "+debug=tiny")
    assert outcome.code == 1 and len(outcome.errors) == 1 and "default.yaml, line 2, is no YAML (expected" in outcome.errors[0]


def test_jobs_are_in_the_order_of_their_numbers() -> None:
    names = ["seed-2", "seed-10", "bits=2.25", "bits=2.5", "bits=2.75", "bits=10"]
    assert sorted(names, key=jobs._natural) == [*names[2:], *names[:2]]
