"""Runs of earlier versions: what they had no setting for stays out of their digest, and their defaults are theirs."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from evopress.earlier_versions import as_written_now, defaults_of, without_later
from evopress.search.guided_settings import GuidedStrategy
from evopress.settings import QuantSettings, RunSettings, SearchConfig

PAPER = {"recipe": "paper"}


def values(**method: object) -> dict[str, object]:
    return asdict(RunSettings(method=QuantSettings(**method), bits=3.0))  # type: ignore[arg-type]


def test_what_earlier_versions_did_is_left_out() -> None:
    kept = without_later(values(**PAPER))
    assert set(kept["method"]) == {"name", "levels", "group_size", "damping", "block_size", "scale_dtype", "propagate_bits"}
    assert "bos" not in kept["model"]


def test_settings_that_the_guided_search_had_not_count_where_they_ask_for_something_else() -> None:
    def strategy(**changed: object) -> dict[str, object]:
        run = RunSettings(method=QuantSettings(), bits=3.0, search=SearchConfig(strategy=GuidedStrategy(**changed)))  # type: ignore[arg-type]
        return without_later(asdict(run))["search"]["strategy"]

    first = {"rounds", "attribution_tokens", "attribution_sequences", "screen_tokens", "changes", "averaged", "generations_after"}
    assert set(strategy()) == {"name", *first}
    assert strategy(approach=3) == {**strategy(), "approach": 3}


@pytest.mark.parametrize(
    "changed",
    [
        {"recipe": "best"},
        {"symmetric": True},
        {"zeros": "codes"},
        {"scale_dtype": "float32"},
        {"group_sizes": {2: 32}},
        {"tolerance": 0.1},
        {"include": ["blocks", "head"]},
    ],
)
def test_what_they_did_not_do_counts(changed: dict[str, object]) -> None:
    assert without_later(values(**{**PAPER, **changed}))["method"] != without_later(values(**PAPER))["method"]


def test_the_defaults_of_an_earlier_run_are_its_own() -> None:
    config = {
        "model": {"dtype": "bfloat16"},
        "data": {"calibration_tokens": 16384},
        "method": {"name": "quant"},
    }
    assert defaults_of(config) == {
        "model.dtype": "bfloat16",
        "data.calibration_tokens": 16384,
        "method.recipe": "paper",
        "search/strategy": "evolution",
    }
    assert "method.recipe" not in defaults_of(config | {"method": {"name": "drop"}})
    assert defaults_of(config | {"method": {"name": "sparsity"}})["method.recipe"] == "paper"
    now = {"model": {"dtype": "auto", "bos": "auto"}}
    assert defaults_of(config | now) == {"search/strategy": "evolution"}, "it was every method's, and is not any more"
    assert defaults_of(config | now | {"search": {"strategy": {"name": "guided"}}}) == {}
    assert defaults_of({"method": {"name": "drop"}} | now) == {}
    assert defaults_of({}) == {}
    assert defaults_of(now | {"refine": {"tokens": 64}}) == {"refine.correction": 0.0}
    assert defaults_of(now | {"refine": {"tokens": 64, "correction": 0.5}}) == {}
    assert defaults_of(config | {"scale": {"name": "small"}})["scale.refine"] is False, "it is not refined unless asked now"


def test_tables_4_to_6_measured_their_searches_on_all_held_out_text() -> None:
    config = {"model": {"bos": "auto"}, "refine": {"correction": 0.5}, "evaluation": {"every_tokens": None}}
    assert defaults_of(config, ["+experiment=table5", "seed=1"]) == {"evaluation.every_tokens": None}
    assert defaults_of(config, ["+experiment=table3"]) == {}
    assert defaults_of({**config, "evaluation": {"every_tokens": 4096}}, ["+experiment=table5"]) == {}


def test_super_fast_exchanged_within_a_size() -> None:
    config = {"model": {"bos": "auto"}, "search": {"exchange": "size"}}
    assert defaults_of(config, ["+method=drop", "search=super_fast"]) == {"search.exchange": "size"}
    assert defaults_of(config, ["search=fast"]) == {}
    assert defaults_of({**config, "search": {"exchange": "any"}}, ["search=super_fast"]) == {}


def test_options_that_only_named_values_are_written_as_values() -> None:
    typed = ["search/mutation=constant_15", "+search/first_stage=64_tokens", "seed=1", "search=super_fast"]
    assert as_written_now(typed) == [
        *("search.distribution=constant", "search.max_switches=15"),
        *("search.paper.tokens=[64,8192]", "search.least.tokens=[0.125,0.125]"),
        *("seed=1", "search=super_fast"),
    ]
