"""What decides a run's result, of whole settings and of the little that a config may hold."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from evopress.result_settings import result_settings
from evopress.search.guided_settings import GuidedStrategy
from evopress.settings import QuantSettings, RunSettings, SearchConfig

BEFORE: dict[str, Any] = {"method": {"name": "quant", "scale_dtype": "float16"}, "search": {"num_offspring": 16}}
"""Of an earlier version's config."""


@pytest.mark.parametrize(
    "now",
    [
        {"archive": True, "export": ["mlx"], "export_options": {}, "stages": ["search"], "refine": {"correction": 0.5}},
        {"method": {"name": "quant", "scale_dtype": "auto", "grid": "integers"}},
        {"search": {"num_offspring": 16, "strategy": {"name": "evolution"}, "paper": {"tokens": [64]}, "least": {}}},
        {"scale": {"name": "mini", "tokens": 0.5}, "evaluation": {"field": "text"}, "level_db": {"root": "x"}, "threads": 3},
    ],
)
def test_what_says_the_same_is_the_same(now: dict[str, Any]) -> None:
    found = result_settings(BEFORE | now)
    assert {key: value for key, value in found.items() if value} == BEFORE


@pytest.mark.parametrize(
    "now",
    [
        {"search": {"num_offspring": 8}},
        {"search": {"num_offspring": 16, "strategy": {"name": "guided"}}},
        {"method": {"name": "quant", "scale_dtype": "float32"}},
        {"scale": {"depth_generations": 2.0}},
    ],
)
def test_what_says_something_else_counts(now: dict[str, Any]) -> None:
    assert result_settings(BEFORE | now) != result_settings(BEFORE)


def test_no_group_need_be_there() -> None:
    assert result_settings({}) == {}
    run = RunSettings(method=QuantSettings(), bits=3.0, search=SearchConfig(strategy=GuidedStrategy()))
    assert {"tracker", "paths", "threads", "level_db", "stages"}.isdisjoint(result_settings(asdict(run)))
