"""What people type: `~` in paths, `--help`, `--version`, and the options that are offered."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from omegaconf import OmegaConf

from evopress import __main__ as main
from evopress import command_line
from evopress import config as configuration
from evopress.models.tiny import ensure_tiny


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        ("model.path=~/models/a", "model.path='~/models/a'"),
        ("+evaluation.files.wiki=~/a.txt", "+evaluation.files.wiki='~/a.txt'"),
        ("data.calibration=[~/a.jsonl,b.txt,~/c d.txt]", "data.calibration=['~/a.jsonl',b.txt,'~/c d.txt']"),
        ("model.path=~/a,~/b", "model.path='~/a','~/b'"),
        ("model.path=~me/a", "model.path='~me/a'"),
        ("model.path='~/a'", "model.path='~/a'"),
        ('data.calibration=["~/a.txt"]', 'data.calibration=["~/a.txt"]'),
        ("hydra.run.dir=~/run", "hydra.run.dir=HOME/run"),
        ("hydra.sweep.dir='~/a b'", "hydra.sweep.dir='HOME/a b'"),
        ("model.path=/a/~b", "model.path=/a/~b"),
        ("~search.tokens", "~search.tokens"),
        ("resume=~/run", "resume='~/run'"),
        ("bits=2.5", "bits=2.5"),
    ],
)
def test_a_tilde_is_what_a_shell_would_make_of_it(typed: str, read: str, home: Path) -> None:
    assert command_line.prepared([typed]) == [read.replace("HOME", str(home))]


def test_paths_with_a_tilde_are_found(evopress: Callable[..., Any], home: Path, tmp_path: Path) -> None:
    ensure_tiny(home / "models")
    (home / "text.txt").write_text("The quick brown fox jumps over the lazy dog.\n\n" * 400, encoding="utf-8")
    (folder,) = (home / "models").rglob("config.json")
    model = folder.parent.relative_to(home).as_posix()
    files = ("data=text", "data.calibration=[~/text.txt]", "data.search=[~/text.txt]", "data.evaluation=[~/text.txt]")
    outcome = evopress(
        *("+method=quant", "bits=3.5", "+debug=tiny", f"model.path=~/{model}", *files, "dry_run=true"),
        *("hydra.run.dir=~/run", "paths.cache=~/cache", "level_db.root=~/levels"),
    )
    assert outcome.code == 0, outcome.text
    assert (home / "run" / ".hydra" / "config.yaml").is_file() and (home / "levels").is_dir()
    assert not (tmp_path / "~").exists()
    again = evopress("resume=~/run", "dry_run=true")
    assert again.code == 0, again.text


def test_version_is_ours(evopress: Callable[..., Any]) -> None:
    outcome = evopress("--version")
    assert outcome.code == 0
    assert re.fullmatch(r"evopress \S.*\n", outcome.text)


def test_help_explains_every_group_and_only_keys_that_exist(evopress: Callable[..., Any]) -> None:
    outcome = evopress("--help")
    assert outcome.code == 0, outcome.text
    groups, keys = outcome.text.split("Groups (", 1)[1].split("Main keys", 1)
    for group in configuration.options():
        if "/" not in group:
            assert re.search(rf"^  {group} +\w", groups, re.MULTILINE), group
        assert re.search(rf"^ *{group}: \w", groups, re.MULTILINE), group
    assert "base_" not in outcome.text and "powered by Hydra" not in outcome.text
    configuration.register()
    with initialize_config_dir(version_base="1.3", config_dir=str(configuration.config_folder())):
        config = compose("config", overrides=["+method=quant", "bits=2.5"], return_hydra_config=True)
    named = re.findall(r"^  (\S+)  +\w", keys, re.MULTILINE) + re.findall(r"(?:^|; )([a-z_]+\.[a-z_]+):", keys)
    assert len(named) > 25
    for key in named:
        node = config
        for part in key.split("."):
            assert part in node, key
            node = OmegaConf.to_container(node[part]) if OmegaConf.is_config(node[part]) else node[part]


@pytest.mark.parametrize("group", ["model", "search", "method", "data"])
def test_schemas_are_not_offered_as_options(group: str) -> None:
    configuration.register()
    loader = ConfigLoaderImpl(create_config_search_path(str(configuration.config_folder())))
    offered = loader.get_group_options(group)
    assert offered == sorted(configuration.options()[group])
    assert not [name for name in offered if name.startswith("base_")]


@pytest.mark.parametrize(
    ("typed", "whole"),
    [
        ("search.tokens.0=64", "search.tokens"),
        ("stages.0=search", "stages"),
        ("export.formats=[gguf]", "export"),
        ("~export.formats", "export"),
        ("+baselines.names.first=dp", "baselines.names"),
        ("method.levels.a=1", "method.levels"),
        ("data.calibration.0.name=x", "data.calibration"),
    ],
)
def test_a_part_of_what_is_set_as_a_whole_is_refused(evopress: Callable[..., Any], tmp_path: Path, typed: str, whole: str) -> None:
    outcome = evopress("+method=quant", typed)
    sentence = f"{typed} sets a part of {whole}, which is set as a whole: write {whole}=..."
    assert (outcome.code, outcome.errors) == (1, [f"error: {sentence}"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("typed", ["baselines.options.owl.tokens=3", "method.group_sizes={2:32}", "search.strategy.rounds=2"])
def test_a_part_of_what_has_keys_is_set(evopress: Callable[..., Any], typed: str) -> None:
    assert evopress("+method=quant", "bits=3", typed, "--cfg", "job").code == 0


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (["method=quant", "bits=3"], ["+method=quant", "bits=3"]),
        (["+method=quant", "debug=tiny"], ["+method=quant", "+debug=tiny"]),
        (["-m", "method=quant,drop"], ["-m", "+method=quant,drop"]),
        (
            ["debug=tiny", "+method=sparsity", "seed=1"],
            ["+method=sparsity", "+debug=tiny", "seed=1"],
        ),  # it makes smaller what that has
        (
            ["+experiment=table3", "-m", "+debug=tiny", "+method=quant", "+hparams_search=optuna", "seed=1"],
            ["+method=quant", "+experiment=table3", "-m", "+debug=tiny", "+hparams_search=optuna", "seed=1"],
        ),  # it changes what its method chooses
        (["+experiment=table4", "method=quant"], ["+experiment=table4", "method=quant"]),  # in the place of the experiment's
        (["method=", "method.levels=[3,2]", "hydra.run.dir=a=b"], ["method=", "method.levels=[3,2]", "hydra.run.dir=a=b"]),
    ],
)
def test_a_plus_may_be_left_out(typed: list[str], meant: list[str]) -> None:
    assert command_line.with_plus(typed) == meant


def test_a_method_without_its_plus(evopress: Callable[..., Any]) -> None:
    with_it, without = (evopress(f"{plus}method=sparsity", "sparsity=0.6", "--cfg", "job") for plus in ("+", ""))
    assert (without.code, without.text) == (0, with_it.text)


def test_what_holds_keys_of_ones_own_needs_no_plus() -> None:
    given = ["method.group_sizes={2: 32}", "export_options.gguf.exact=true", "+baselines.options.owl.tokens=4", "method.levels=[3]"]
    assert command_line.prepared(given) == [f"++{given[0]}", f"++{given[1]}", *given[2:]]
    assert command_line.prepared(["evaluation.files.code=a.txt"]) == ["++evaluation.files.code=a.txt"]


def test_flags_may_stand_between_settings() -> None:
    given = ["+method=quant", "--cfg", "job", "bits=3", "-m", "--info", "seed=1", "-cd", "conf"]
    assert command_line.flags_first(given) == [
        "--cfg",
        "job",
        "-m",
        "--info=all",
        "-cd",
        "conf",
        "+method=quant",
        "bits=3",
        "seed=1",
    ]
    assert command_line.flags_first(["bits=3", "--pack", "search", "--cfg=job", "-m"]) == [
        "--pack",
        "search",
        "--cfg=job",
        "-m",
        "bits=3",
    ]
    assert command_line.flags_first(["bits=3", "--info"]) == ["--info=all", "bits=3"]
    assert command_line.flags_first(["--info", "plugins", "bits=3"]) == ["--info", "plugins", "bits=3"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["-m", "hydra.launcher.n_jobs=0"], "hydra.launcher.n_jobs=0 is no number of jobs: give one, or -1"),
        (["-m", "resume=run"], "resume=run resumes a single run: leave -m out"),
        (["resume=run", "--multirun"], "resume=run resumes a single run: leave -m out"),
        (["resume="], "resume= names no folder: give that of a run"),
    ],
)
def test_what_is_refused_in_one_sentence(arguments: list[str], sentence: str) -> None:
    told = command_line.refused(arguments, {})
    assert told is not None and told.startswith(sentence)


def test_a_sampler_that_draws_nothing_is_refused_where_a_seed_is_given() -> None:
    text = "In 'hparams_search/optuna': ConfigKeyError raised while composing config:\nKey 'seed' not in 'SamplerConfig'"
    sentence = command_line.told(ValueError(text), {})
    assert sentence.startswith("hydra/sweeper/sampler=grid ") and "choose another one, such as tpe" in sentence


def test_a_misspelt_setting_of_method_joint_alone_is_recognized() -> None:
    error = ValueError("Could not override 'method.droped'.")
    assert command_line.told(error, {}).startswith("method.droped is no setting: did you mean method.dropped or ")


def test_numbers_of_evolution_are_said_to_mean_nothing_to_guided_rounds() -> None:
    (sentence,) = command_line.unused(["search.num_offspring=64", "bits=3"], strategy="guided")
    assert "search.num_offspring=64 has no effect with search/strategy=guided unless" in sentence
    assert not list(command_line.unused(["search.num_offspring=64", "search.strategy.generations_after=2"], strategy="guided"))
    assert not list(command_line.unused(["search.num_offspring=64"], strategy="evolution"))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["search.strategy=evolution"], "search.strategy=evolution names a config group: write search/strategy=evolution"),
        (["-m", "archive=true,false"], "archive=true,false cannot be swept over: archive is not part of a job's folder name"),
        (["-m", "export=[mlx],[dequantized]"], "export=[mlx],[dequantized] cannot be swept over"),
        (["-m", "export=[mlx,gguf]", "bits=2,3"], None),
        (["archive=false"], None),
    ],
)
def test_groups_are_no_keys_and_jobs_have_a_folder_each(arguments: list[str], sentence: str | None) -> None:
    told = command_line.refused(arguments, configuration.options(), is_sweep=configuration.is_sweep)
    assert told is None if sentence is None else told is not None and told.startswith(sentence)


def test_who_has_read_enough_of_the_help_is_told_nothing(cache: Path) -> None:
    """As `python -m evopress --help | head -1` does."""
    command = f"{sys.executable} -m evopress --help | head -1"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=120, env={**os.environ, "EVOPRESS_CACHE": str(cache)}
    )
    assert done.stdout.startswith("EvoPress") and done.stderr == ""


def test_another_s_broken_pipe_is_no_end_of_reading(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def entry() -> None:
        raise BrokenPipeError("a worker's")

    monkeypatch.setattr(main, "silenced_without_reader", lambda: False)
    with pytest.raises(SystemExit):
        main._compose_and_run(entry)
    assert "a worker's" in capsys.readouterr().err
