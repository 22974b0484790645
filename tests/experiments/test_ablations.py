"""The sweeps of Tables 3 to 7 and 16: at the paper's scale the paper's numbers, at smaller ones rows that stay apart."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from evopress import config as configuration
from evopress.settings import RunSettings
from evopress.stages.checks import check_names, check_tokens, search_cost
from experiments import tables
from experiments.specs import SPECS, by_axis, by_first_stage, by_fitness, by_mutation, without_level
from experiments.sweeps import expected_jobs

ABLATIONS = ("table3", "table4", "table5", "table6", "table7", "table16", "figure3")
TABLE_4 = {
    "min_uniform_3": ("min_uniform", 3),
    "min_uniform_7": ("min_uniform", 7),
    "min_uniform_15": ("min_uniform", 15),
    "constant_1": ("constant", 1),
    "constant_3": ("constant", 3),
    "constant_7": ("constant", 7),
    "constant_15": ("constant", 15),
}
SUPER_FAST = (400, 16, [1, 1], [512, 8192])


@pytest.fixture(scope="module")
def searches() -> Iterator[Callable[..., dict[str, RunSettings]]]:
    """Return an experiment's settings at a scale by what was swept, of seed 0."""
    configuration.register()
    made: dict[tuple[str, str], dict[str, RunSettings]] = {}

    def of(experiment: str, scale: str) -> dict[str, RunSettings]:
        if (experiment, scale) not in made:
            made[experiment, scale] = {
                name: configuration.to_settings(
                    compose("config", [f"+experiment={experiment}", f"scale={scale}", *(f"{k}={v}" for k, v in job.items())])
                )
                for job in expected_jobs(experiment)
                if job["seed"] == "0" and (name := name_of(experiment, job)) is not None
            }
        return made[experiment, scale]

    with initialize_config_dir(version_base="1.3", config_dir=str(configuration.config_folder())):
        yield of


def name_of(experiment: str, job: dict[str, str]) -> str | None:
    """Return what the experiment's table calls the search of a job, where that is all that tells them apart."""
    if experiment in ("table4", "table5"):
        return SPECS[experiment].variant(job, "evopress")
    return " ".join(value for key, value in job.items() if key != "seed")


def numbers(run: RunSettings) -> tuple[object, ...]:
    search = run.search
    return search.generations, search.num_offspring, search.survivors, search.tokens


def test_table_4_at_the_papers_scale(searches: Callable[..., dict[str, RunSettings]]) -> None:
    runs = searches("table4", "paper")
    assert {name: (run.search.distribution, run.search.max_switches) for name, run in runs.items()} == TABLE_4
    for run in runs.values():
        assert (run.method.name, run.sparsity, int(run.sparsity * 32)) == ("drop", 0.375, 12)
        assert numbers(run) == (None, 32, [2, 1], [2048, 32768])


def test_table_5_at_the_papers_scale(searches: Callable[..., dict[str, RunSettings]]) -> None:
    runs = searches("table5", "paper")
    assert list(runs) == [f"{n}_tokens" for n in (1024, 512, 256, 128, 64)]
    for name, run in runs.items():
        assert numbers(run) == (400, 16, [1, 1], [int(name.partition("_")[0]), 8192])
    assert numbers(runs["512_tokens"]) == SUPER_FAST


def test_table_6_at_the_papers_scale(searches: Callable[..., dict[str, RunSettings]]) -> None:
    runs = searches("table6", "paper")
    assert list(runs) == ["64", "32", "16", "8", "4"]
    for name, run in runs.items():
        assert numbers(run) == (400, int(name), [1, 1], [512, 8192])


def test_the_other_tables_at_the_papers_scale(searches: Callable[..., dict[str, RunSettings]]) -> None:
    for name in ("table3", "table7", "table16"):
        for run in searches(name, "paper").values():
            assert numbers(run) == (150, 128, [16, 4, 1], [2048, 16384, 131072])
    assert [run.bits for run in searches("table3", "paper").values()] == [3.0]
    found = [(run.bits, run.fitness.name) for run in searches("table7", "paper").values()]
    assert found == [(bits, name) for bits in (3.0, 4.0) for name in ("perplexity", "kl")]
    assert [(run.bits, run.baselines.num_random) for run in searches("table16", "paper").values()] == [(2.25, 32), (2.5, 32)]
    assert [numbers(run) for run in searches("figure3", "paper").values()] == [SUPER_FAST] * 2


@pytest.mark.parametrize("name", ["table5", "table6", "figure3"])
def test_sparsity_is_exchanged_between_all_units(name: str, searches: Callable[..., dict[str, RunSettings]]) -> None:
    """Section 4.2: the steps are the same number of weights everywhere; `search=super_fast` alone does not say so."""
    for run in searches(name, "mini").values():
        assert (run.method.name, run.sparsity, run.search.exchange) == ("sparsity", 0.7, "any")


@pytest.mark.parametrize("scale", ["mini", "small"])
@pytest.mark.parametrize("name", ABLATIONS)
def test_smaller_scales_keep_the_rows_apart(name: str, scale: str, searches: Callable[..., dict[str, RunSettings]]) -> None:
    runs, paper = searches(name, scale), searches(name, "paper")
    for key, run in runs.items():
        check_names(run)
        check_tokens(run)
        if run.search.generations is not None:
            assert search_cost(run.search) < search_cost(paper[key].search)
    told = {repr((run.search, run.fitness, run.bits)) for run in runs.values()}
    assert len(told) == len(runs)
    if name in ("table5", "table6"):
        for key, run in runs.items():
            assert run.search.tokens == [n // 8 for n in paper[key].search.tokens]  # an eighth, so proportions are the paper's
            assert run.search.num_offspring == paper[key].search.num_offspring


def test_a_table_is_about_an_hour_at_mini(searches: Callable[..., dict[str, RunSettings]]) -> None:
    """Two cores evaluate about 2000 candidate tokens a second; a sparsity or whole-bit target needs no initial candidates."""
    for name in ABLATIONS:
        total = 0
        for run in searches(name, "mini").values():
            generations = run.search.generations or 34  # 11 of SmolLM2's 30 blocks: 11 * 19 / 1.5 * 0.24
            settings = replace(run.search, generations=generations)
            start = settings.initial_candidates * settings.initial_tokens
            needed = run.method.name == "drop" or (run.bits is not None and run.bits % 1)
            total += 3 * (search_cost(settings) - (0 if needed else start))
        assert total / 2000 < 3600, name


@pytest.mark.parametrize("name", [name for name in ABLATIONS if name != "figure3"])
def test_the_papers_rows_are_named_as_ours(name: str) -> None:
    """Else the two would not stand side by side."""
    spec = SPECS[name]
    rows = {
        "table3": ("dense", "uniform_3", "dp", "evopress"),
        "table7": ("uniform_3", "evopress"),
        "table16": ("best_of_32", "evopress"),
    }
    ours = {spec.variant(job, row) for job in expected_jobs(name) for row in rows.get(name, ("evopress",))} - {None}
    path = Path(tables.__file__).parent / name / "paper.csv"
    with path.open(encoding="utf-8", newline="") as file:
        assert {row["method"] for row in csv.DictReader(file)} == ours


def test_variants() -> None:
    axes = {
        "fitness.name": "perplexity",
        "search.distribution": "constant",
        "search.max_switches": "3",
        "search.paper.tokens": "[64,8192]",
    }
    assert [by_mutation(axes, row) for row in ("dense", "uniform", "evopress")] == ["dense", None, "constant_3"]
    assert by_mutation({"search.distribution": "min_uniform", "search.max_switches": "1"}, "dense") is None  # it is the constant 1
    assert [by_first_stage(axes, row) for row in ("dense", "uniform", "evopress")] == ["dense", None, "64_tokens"]
    assert by_axis("search.max_switches", "{}!")(axes, "evopress") == "3!"
    assert [by_fitness(axes, row) for row in ("dense", "uniform_4", "evopress")] == ["dense", "uniform", "EvoPress (PPL)"]
    assert by_fitness({"fitness.name": "topk_kl"}, "evopress") == "EvoPress (topk_kl)"
    assert [without_level({}, row) for row in ("uniform_3", "dp")] == ["uniform", "dp"]
