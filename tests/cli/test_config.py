"""The config tree: every file composes, Table 8 is the paper's, and what is misspelt dies before anything runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, ListConfig, OmegaConf

from evopress import config as configuration
from evopress.errors import EvoPressError
from evopress.library.models import BUILTIN, SEPARATORS
from evopress.library.searches import exchange_of
from evopress.models.tiny import make_tiny
from evopress.settings import METHODS, QuantSettings, RunSettings, SearchConfig
from evopress.stages import checks
from experiments.sweeps import expected_jobs

CONF = configuration.config_folder()
NEEDING_MORE = ("hparams_search", "local")
"""Groups of a plugin that need not be installed, and of one machine."""
OPTIONS = sorted(
    (path.parent.name, path.stem) for path in CONF.glob("*/*.yaml") if path.parent.name not in ("hparams_search", "local")
)
EXPERIMENTS = [name for group, name in OPTIONS if group == "experiment"]
APPENDED = ("method", "debug", "experiment", "hparams_search")
"""Groups that are not in the defaults list."""

TABLE_8 = {
    # generations, offspring, survivors, tokens; None is k(n - k) / 1.5
    "depth_pruning": (None, 32, [2, 1], [2048, 32768]),
    "unstructured_sparsity": (400, 64, [8, 2, 1], [2048, 16384, 65536]),
    "quantization": (150, 128, [16, 4, 1], [2048, 16384, 131072]),
    "super_fast": (400, 16, [1, 1], [512, 8192]),
}
INITIAL = {"depth_pruning": (64, 2048), "quantization": (32, 16384)}
"""Candidates that the search may start from, and the tokens that choose among them."""
PAPER_MODELS = {
    "llama2_7b": "meta-llama/Llama-2-7b-hf",
    "llama3_8b": "meta-llama/Meta-Llama-3-8B",
    "llama31_8b": "meta-llama/Llama-3.1-8B",
    "mistral_7b_v03": "mistralai/Mistral-7B-v0.3",
    "phi3_medium_128k_instruct": "microsoft/Phi-3-medium-128k-instruct",
}


@pytest.fixture
def composed() -> Iterator[Callable[..., DictConfig]]:
    """Compose the config with overrides, as the command line does."""
    configuration.register()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        yield lambda *overrides: compose("config", overrides=list(overrides))


@pytest.mark.parametrize("method", METHODS)
def test_the_library_exchanges_what_a_methods_config_does(method: str, composed: Callable[..., DictConfig]) -> None:
    assert exchange_of(METHODS[method]()) == composed(f"+method={method}").search.exchange


@pytest.mark.parametrize("builtin", BUILTIN)
def test_the_library_separates_documents_as_a_models_config_does(builtin: str, composed: Callable[..., DictConfig]) -> None:
    config = composed(f"model={builtin}").model
    assert config.builtin == builtin and config.separator == SEPARATORS.get(builtin, "eos")


_made: dict[tuple[str, ...], RunSettings] = {}


@pytest.fixture
def settings(composed: Callable[..., DictConfig]) -> Callable[..., RunSettings]:
    """Compose a quantization run as plain settings; equal overrides are composed once."""

    def make(*overrides: str) -> RunSettings:
        if overrides not in _made:
            _made[overrides] = configuration.to_settings(composed("+method=quant", *overrides))
        return _made[overrides]

    return make


@pytest.mark.parametrize(("group", "option"), OPTIONS, ids=lambda value: value)
def test_every_option_composes(group: str, option: str, composed: Callable[..., DictConfig]) -> None:
    override = f"{'+' if group in APPENDED else ''}{group}={option}"
    config = composed(override) if group in ("method", "experiment") else composed("+method=quant", override)
    result = configuration.to_settings(config)
    assert isinstance(result, RunSettings)
    name = getattr(getattr(result, group, None), "name", None)
    if name is not None:
        # +method=gguf is quantization to other grids, +method=experts depth pruning of smaller things
        assert name == {"gguf": "quant", "experts": "drop"}.get(option, option)


def test_groups_are_those_that_are_documented() -> None:
    groups = {path.name for path in CONF.iterdir() if path.is_dir()}
    named = "model method level_db data fitness search scale evaluation tracker paths experiment debug hydra"
    expected = {*named.split(), *NEEDING_MORE}
    assert groups <= expected
    assert expected - {"experiment", "local"} <= groups


@pytest.mark.parametrize("row", TABLE_8)
def test_search_at_the_papers_scale_is_table_8(row: str, settings: Callable[..., RunSettings]) -> None:
    search = settings(f"search={row}", "scale=paper").search
    assert (search.generations, search.num_offspring, search.survivors, search.tokens) == TABLE_8[row]
    assert (search.max_switches, search.distribution) == (3, "min_uniform")  # section 3: min(U1, U2), U ~ uniform{1..3}
    if row == "quantization":
        assert search.exchange == "size"  # section 4.3
    if row in ("unstructured_sparsity", "super_fast"):
        assert search.exchange == "any"  # section 4.2: independently of their size
    if row in INITIAL:
        assert (search.initial_candidates, search.initial_tokens) == INITIAL[row]


AT_SCALE = {
    # generations, offspring, survivors, tokens, initial candidates and their tokens, baselines' tokens
    ("quant", "mini"): (36, 16, [2, 1, 1], [256, 1024, 4096], 32, 1024, 2048),
    ("quant", "small"): (100, 32, [4, 1, 1], [256, 2048, 16384], 32, 2048, 2048),
    ("quant", "paper"): (150, 128, [16, 4, 1], [2048, 16384, 131072], 32, 16384, 16384),
    ("sparsity", "mini"): (96, 8, [2, 1, 1], [256, 1024, 2048], 32, 2048, 4096),
    ("sparsity", "small"): (267, 16, [2, 1, 1], [256, 2048, 8192], 32, 2048, 16384),
    ("sparsity", "paper"): (400, 64, [8, 2, 1], [2048, 16384, 65536], 32, 2048, 131072),
    ("drop", "mini"): (None, 16, [2, 1], [256, 1024], 64, 512, 4096),
    ("drop", "small"): (None, 16, [2, 1], [256, 4096], 64, 512, 16384),
    ("drop", "paper"): (None, 32, [2, 1], [2048, 32768], 64, 2048, 131072),
    ("super_fast", "mini"): (96, 8, [1, 1], [256, 2048], 32, 2048, 2048),
    ("super_fast", "small"): (267, 8, [1, 1], [256, 2048], 32, 2048, 2048),
    ("super_fast", "paper"): (400, 16, [1, 1], [512, 8192], 32, 2048, 16384),
}
"""A method, or the row super_fast for quantization, and a scale: what earlier versions had there."""
TEXT_AT_SCALE = {
    "mini": (32768, 20480, 16384, 512),
    "small": (131072, 131072, 65536, 16384),
    "paper": (8388608, 524288, 524288, 131072),
}
"""Calibration, search and evaluation tokens, and those of the second pass."""


@pytest.mark.parametrize(("what", "scale"), AT_SCALE, ids=" ".join)
def test_every_scale_is_what_it_was(what: str, scale: str, composed: Callable[..., DictConfig]) -> None:
    """In the settings, and as numbers in what `--cfg job` and the run folder show."""
    typed = ["+method=quant", "search=super_fast"] if what == "super_fast" else [f"+method={what}"]
    config = composed(*typed, f"scale={scale}")
    shown = configuration.with_numbers(config)
    result = configuration.to_settings(config)
    search, baselines, data = result.search, result.baselines, result.data
    names = {"quant": "random_tokens", "sparsity": "owl_tokens", "drop": "importance_tokens", "super_fast": "random_tokens"}
    numbers = (search.generations, search.num_offspring, search.survivors, search.tokens)
    assert (*numbers, search.initial_candidates, search.initial_tokens, getattr(baselines, names[what])) == AT_SCALE[what, scale]
    text = (data.calibration_tokens, data.search_tokens, data.evaluation_tokens, result.refine.tokens)
    assert text == TEXT_AT_SCALE[scale]
    keys = ("generations", "num_offspring", "survivors", "tokens")
    assert tuple(OmegaConf.to_container(shown.search)[key] for key in keys) == numbers


def test_the_job_is_shown_with_its_numbers(evopress: Callable[..., Any], tmp_path: Path) -> None:
    for flags in (["--cfg", "job"], ["-c", "job"], ["--cfg=job"]):
        outcome = evopress("+method=quant", "scale=small", "search.num_offspring=7", *flags)
        config = OmegaConf.create(outcome.text)
        assert outcome.code == 0 and "${" not in outcome.text
        assert (config.search.num_offspring, config.search.survivors, config.data.search_tokens) == (7, [4, 1, 1], 131072)
    assert not list(tmp_path.iterdir())


def test_factors_and_the_papers_numbers_may_be_given(settings: Callable[..., RunSettings]) -> None:
    """A factor of the scale, or a number of the paper's; what is given plainly is never scaled."""
    assert settings("scale.tokens=0.5").search.tokens == [1024, 8192, 65536]
    assert settings("search.paper.tokens=[1024,8192]", "search.survivors=[1,1]", "search.least.tokens=[1.0]").search.tokens == [
        1024,
        256,
    ]
    assert settings("search.num_offspring=128", "search.tokens=[2048,16384,131072]").search.num_offspring == 128


def test_table_8_is_complete() -> None:
    assert {option for group, option in OPTIONS if group == "search"} == set(TABLE_8)


def test_the_papers_text_is_8_million_tokens(settings: Callable[..., RunSettings]) -> None:
    data = settings("scale=paper").data
    assert data.calibration_tokens == 8 * 2**20
    assert data.search_tokens >= max(tokens for row in TABLE_8.values() for tokens in row[3])


@pytest.mark.parametrize("scale", ["mini", "small"])
@pytest.mark.parametrize("row", TABLE_8)
def test_smaller_scales_keep_the_shape(row: str, scale: str, settings: Callable[..., RunSettings]) -> None:
    result, paper = settings(f"search={row}", f"scale={scale}"), settings(f"search={row}", "scale=paper")
    search = result.search
    assert len(search.survivors) == len(paper.search.survivors)
    for small, large in [
        (search.num_offspring, paper.search.num_offspring),
        *zip(search.survivors, paper.search.survivors, strict=True),
        *zip(search.tokens, paper.search.tokens, strict=True),
        (search.initial_tokens, paper.search.initial_tokens),
    ]:
        assert 1 <= small <= large
    assert search.survivors == sorted(search.survivors, reverse=True)
    assert search.survivors[-1] == 1
    assert search.tokens == sorted(search.tokens)
    assert max(search.tokens) <= result.data.search_tokens
    if paper.search.generations is None:
        assert search.generations is None
        search = dataclasses.replace(search, generations=10)
    else:
        assert search.generations is not None
        assert 1 <= search.generations < paper.search.generations
        assert cost(search) < cost(paper.search)
    checks.searching(search)
    checks.check_tokens(result)


def cost(config: SearchConfig) -> int:
    return checks.search_cost(config)


def test_scales_are_ordered_by_cost(settings: Callable[..., RunSettings]) -> None:
    mini, small, paper = (cost(settings(f"scale={scale}").search) for scale in ("mini", "small", "paper"))
    assert mini < small < paper
    # DESIGN section 1: the quantization row is 177 million tokens.
    generation = 128 * 2048 + 16 * 16384 + (4 + 1) * 131072
    assert paper == 150 * generation + 32 * 16384
    assert round(150 * generation / 1e6) == 177


@pytest.mark.parametrize(("name", "own"), [("guided", 1), ("evolution", 0)])
def test_a_cost_counts_the_genomes_that_are_given_to_start_from(settings: Callable[..., RunSettings], name: str, own: int) -> None:
    search = settings("+method=quant", "bits=2.5", f"search/strategy={name}").search
    tokens = search.strategy.screen_tokens if own else search.initial_tokens
    numbers = checks.searching(search)
    assert checks.search_cost(numbers, starts=2) - checks.search_cost(numbers) == tokens * (2 + own)


@pytest.mark.parametrize("scale", ["mini", "small", "paper"])
def test_explicit_values_win_over_the_scale(scale: str, settings: Callable[..., RunSettings]) -> None:
    result = settings(f"scale={scale}", "search.generations=7", "search.tokens=[64,96,128]", "data.calibration_tokens=4096")
    assert (result.search.generations, result.search.tokens, result.data.calibration_tokens) == (7, [64, 96, 128], 4096)
    assert result.search.num_offspring == settings(f"scale={scale}").search.num_offspring


def test_a_runs_own_numbers_can_be_put_at_the_papers_scale(composed: Callable[..., DictConfig]) -> None:
    config = composed("+method=quant", "search.generations=7")
    before = OmegaConf.to_yaml(config)
    paper = configuration.at_paper_scale(config)
    assert paper is not None
    assert paper.scale.name == "paper"
    assert paper.search.generations == 7
    assert (paper.search.num_offspring, paper.search.survivors, paper.search.tokens) == TABLE_8["quantization"][1:]
    assert OmegaConf.to_yaml(config) == before


def test_fewer_offspring_than_the_paper_has_survivors_are_no_error(composed: Callable[..., DictConfig]) -> None:
    config = composed("+method=quant", "search.num_offspring=8")
    assert configuration.to_settings(config).search.num_offspring == 8
    assert configuration.at_paper_scale(config) is None


def test_method_is_chosen_by_name_alone(composed: Callable[..., DictConfig]) -> None:
    config = composed("+method=quant", "bits=2.5")
    assert config.bits == 2.5
    result = configuration.to_settings(config)
    assert isinstance(result.method, QuantSettings)
    assert result.bits == 2.5
    assert result.search.initial_candidates == 32  # search: quantization
    assert result.method.levels == [6, 5, 4, 3, 2]
    assert result.baselines.names == ["uniform", "best_of_random", "dp"]


def test_no_method_says_so(composed: Callable[..., DictConfig]) -> None:
    with pytest.raises(EvoPressError, match=r"no method was chosen: add one of .*\+method=quant"):
        configuration.to_settings(composed())


def test_method_selects_its_search_and_the_command_line_wins(settings: Callable[..., RunSettings]) -> None:
    assert settings("search=super_fast", "scale=paper").search.tokens == [512, 8192]


def test_settings_that_fit_a_model_come_with_it(settings: Callable[..., RunSettings]) -> None:
    default = settings()
    assert (default.model.name, default.model.builtin, default.model.path) == ("smollm2_135m", "smollm2_135m", None)
    assert 576 % default.method.group_size == 0
    assert 1536 % default.method.group_size == 0
    assert settings("model.group_size=32").method.group_size == 32
    assert settings("method.group_size=null").method.group_size is None


@pytest.mark.parametrize("name", PAPER_MODELS)
def test_the_papers_models(name: str, settings: Callable[..., RunSettings]) -> None:
    result = settings(f"model={name}", "data=fineweb_edu", "scale=paper")
    assert result.model.path == PAPER_MODELS[name]
    assert result.model.name == name
    assert result.model.builtin is None
    assert result.method.group_size == 128
    assert not result.model.trust_remote_code
    assert result.data.source == "fineweb_edu"
    checks.check_tokens(result)


def test_the_separator_of_the_default_model_stays_with_it(settings: Callable[..., RunSettings]) -> None:
    assert settings().model.separator == "<|endoftext|>"
    assert settings("model.path=DIR").model.separator == "eos"
    assert settings("model.path=DIR", "model.separator=null").model.separator is None
    assert settings("model.path=DIR", "model.separator='<end>'").model.separator == "<end>"


@pytest.mark.parametrize(("given", "rule"), [("auto", "auto"), ("true", "true"), ("False", "false")])
def test_the_rule_for_bos_is_a_word(given: str, rule: str, settings: Callable[..., RunSettings]) -> None:
    assert settings(f"model.bos={given}").model.bos == rule


def test_any_path_of_ones_own(settings: Callable[..., RunSettings]) -> None:
    for model in ("local", "hub", "smollm2_135m"):
        assert settings(f"model={model}", "model.path=some/where").model.path == "some/where"


def test_text_files_share_by_default(settings: Callable[..., RunSettings]) -> None:
    data = settings("data=text", "data.calibration=[a.jsonl]", "data.evaluation=[b.txt]").data
    assert (data.calibration, data.search, data.evaluation) == (["a.jsonl"], ["a.jsonl"], ["b.txt"])


def test_named_evaluation_files(settings: Callable[..., RunSettings]) -> None:
    evaluation = settings("+evaluation.files.wiki=/some/wiki.txt", "evaluation.wikitext=[wiki]").evaluation
    assert evaluation.files == {"wiki": "/some/wiki.txt"}


def test_settings_are_plain_dataclasses(settings: Callable[..., RunSettings]) -> None:
    def check(value: Any, where: str) -> None:
        assert not isinstance(value, DictConfig | ListConfig), where
        if dataclasses.is_dataclass(value):
            for field in dataclasses.fields(value):
                check(getattr(value, field.name), f"{where}.{field.name}")
        elif isinstance(value, dict):
            for key, item in value.items():
                check(item, f"{where}.{key}")
        elif isinstance(value, list):
            for item in value:
                check(item, where)
        else:
            assert value is None or type(value) in (str, int, float, bool), f"{where} is a {type(value)}"
            assert value != "???", where

    result = settings("+debug=tiny", "+evaluation.files.a=b.txt")
    check(result, "run")
    assert configuration.to_settings(OmegaConf.merge(OmegaConf.structured(RunSettings), dataclasses.asdict(result))).seed == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ("+method=quant", "bitz=3"),
        ("+method=quant", "search.generation=3"),
        ("+method=quant", "method.level=[3,2]"),
        ("+method=quant", "bits=few"),
        ("+method=quant", "search.generations=many"),
        ("+method=quant", "search.survivors=3"),
        ("+method=quant", "search.survivors=[4,x]"),
        ("+method=quant", "model=llama4"),
        ("+method=quant", "search=quantisation"),
        ("+method=prune",),
        ("+method=quant", "bits=[2"),
    ],
    ids=" ".join,
)
def test_what_is_misspelt_dies_at_composition(
    arguments: tuple[str, ...], evopress: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evopress.launching.job._run", lambda *_: pytest.fail("a config that is wrong reached the task"))
    outcome = evopress(*arguments, "hydra.run.dir=run")
    assert outcome.code == 1, outcome.text
    assert "Traceback" not in outcome.text
    assert outcome.text.strip()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_runs_under_debug_tiny(name: str, evopress: Callable[..., Any], tmp_path: Path) -> None:
    first = [f"{key}={value}" for key, value in expected_jobs(name)[0].items()]
    if "/method: drop" in (CONF / "experiment" / f"{name}.yaml").read_text(encoding="utf-8"):
        folder = make_tiny(tmp_path / "four", num_blocks=4)  # two blocks are too few for pairs, and for most shares
        first = [*first, "sparsity=0.5", f"model.path={folder}", "model.separator=null"]
    outcome = evopress(
        *(f"+experiment={name}", "+debug=tiny", "data=python_docs", "evaluation=default"),
        *("search.generations=1", "hydra.mode=RUN", "hydra.run.dir=run", *first),
    )
    assert outcome.code == 0, outcome.text


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_job_of_every_experiment_composes(name: str, composed: Callable[..., DictConfig]) -> None:
    jobs = expected_jobs(name)
    assert len({tuple(job.items()) for job in jobs}) == len(jobs)
    for job in {tuple(item for item in job.items() if item[0] != "seed"): job for job in jobs}.values():  # of all seeds, the last
        result = configuration.to_settings(composed(f"+experiment={name}", *(f"{key}={value}" for key, value in job.items())))
        checks.check_names(result)
        checks.check_tokens(result)
        if result.search.generations is not None:
            checks.searching(result.search)
        assert all(str(getattr(result, key, value)) == value for key, value in job.items())
    text = (CONF / "experiment" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    assert text[0] == "# @package _global_"
    assert f"python -m evopress +experiment={name}" in text[1]


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name.startswith(("table", "figure"))])
def test_experiments_of_the_paper_at_its_scale_have_no_second_pass(name: str, composed: Callable[..., DictConfig]) -> None:
    """It has none; with the paper's texts and tasks they have what its tables have."""
    given = ("model=llama3_8b", "data=fineweb_edu", "scale=paper", "evaluation=paper")
    result = configuration.to_settings(composed(f"+experiment={name}", *given))
    assert "refine" not in result.stages
    assert result.evaluation.data == ["wikitext2", "c4", "fineweb_edu"] and len(result.evaluation.tasks) == 5


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if len(expected_jobs(name)) > 1])
def test_sweeps_lie_in_a_folder_of_their_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs of one sweep in folders that say what they are; under debug=tiny they lie apart from results."""
    configuration.register()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        for debug in ([], ["+debug=tiny"]):
            folders = set()
            for job in expected_jobs(name):
                overrides = [f"+experiment={name}", *debug, *(f"{key}={value}" for key, value in job.items())]
                config = compose("config", overrides=overrides, return_hydra_config=True)
                monkeypatch.setattr(HydraConfig.instance(), "cfg", config)  # for names of chosen options in the folder's
                folders.add(config.hydra.sweep.subdir)
            assert config.hydra.mode.name == "MULTIRUN"
            assert config.hydra.sweep.dir.startswith("multirun/debug/" if debug else f"multirun/{name}")
            assert len(folders) == len(expected_jobs(name))


def test_an_experiment_is_a_sweep_and_its_jobs_can_be_resumed(evopress: Callable[..., Any], tmp_path: Path) -> None:
    tiny = ("+debug=tiny", "stages=[database]")
    outcome = evopress("+experiment=table14_15_sparsity", *tiny, "hydra.sweeper.params.seed=7")
    assert outcome.code == 0, outcome.text
    (sweep,) = (tmp_path / "multirun" / "debug").iterdir()
    jobs = {"sparsity-0.5_seed-7", "sparsity-0.6_seed-7"}
    assert {path.name for path in sweep.iterdir() if path.is_dir()} == jobs
    outcome = evopress(f"resume={sweep / 'sparsity-0.6_seed-7'}", "stages=[database,search]")
    assert outcome.code == 0, outcome.text
    assert (sweep / "sparsity-0.6_seed-7" / "genome.json").exists()
    assert not (sweep / "sparsity-0.5_seed-7" / "genome.json").exists()  # one job, not the sweep again
    assert {path.name for path in sweep.iterdir() if path.is_dir()} == jobs


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("+search.offspring=3", "search.offspring is no setting: remove it, or did you mean search.num_offspring?"),
        ("+bit=3", "bit is no setting: remove it, or did you mean bits?"),
        (
            "++method.group_sise=8",
            "method.group_sise is no setting: remove it, or did you mean method.group_size or method.group_sizes?",
        ),
    ],
)
def test_a_plus_lets_no_misspelt_key_through(override: str, sentence: str, settings: Callable[..., RunSettings]) -> None:
    with pytest.raises(EvoPressError) as caught:
        settings(override)
    assert str(caught.value) == sentence


def test_experiments_of_ones_own_lie_in_any_folder(evopress: Callable[..., Any], tmp_path: Path) -> None:
    """A named delta over the config, found by `--config-dir`; what is on the command line still wins, and debug=tiny fits it."""
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "my_table.yaml").write_text(
        "# @package _global_\n"
        "defaults:\n  - override /method: quant\n  - override /model: llama3_8b\n  - override /search: super_fast\n"
        "bits: 2.25\nseed: 5\nsearch:\n  exchange: name\n",
        encoding="utf-8",
    )
    outcome = evopress(
        *("--config-dir", "mine", "+method=quant", "+experiment=my_table", "+debug=tiny", "seed=6"),
        *("stages=[database]", "hydra.run.dir=run"),
    )
    assert outcome.code == 0, outcome.text
    config = OmegaConf.load(tmp_path / "run" / ".hydra" / "config.yaml")
    assert (config.bits, config.seed, config.search.exchange, config.model.name) == (2.25, 6, "name", "tiny")
