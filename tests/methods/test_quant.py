"""Quantization as a method: what its target means and what is refused before any model work."""

from __future__ import annotations

from typing import Any

import pytest

from evopress.compress.gptq import GPTQ
from evopress.errors import EvoPressError
from evopress.methods import make_method
from evopress.settings import QuantSettings, RunSettings, SearchConfig
from evopress.units import Level, Space, Unit


def settings(
    bits: float | None = 2.5, *, search: SearchConfig | None = None, stages: list[str] | None = None, **method: Any
) -> Any:
    run = RunSettings(method=QuantSettings(**method), bits=bits, search=search or SearchConfig())
    run.stages = run.stages if stages is None else stages
    return run


def space(*sizes: int) -> Space:
    def levels(size: int) -> tuple[Level, ...]:
        return tuple(Level(f"{bits} bits", bits * size, str(bits), bits * size + size) for bits in (4, 3, 2))

    return Space("quant", tuple(Unit(f"u{i}", i, "w", size, levels(size)) for i, size in enumerate(sizes)))


def test_the_budget_is_the_floor_of_bits_times_weights() -> None:
    budget = make_method(settings(2.5)).budget(space(7, 8))
    assert (budget.total, budget.target, budget.measure) == (37, 2.5, "bits per weight")  # 37.5


def test_the_compressor_has_the_methods_settings() -> None:
    method = make_method(settings(levels=[4, 3, 2], group_size=32, damping=0.02, block_size=64, propagate_bits=3))
    compressor = method.compressor((100, 200), dtype_bits=16)
    assert compressor == GPTQ(bits=(4, 3, 2), group_size=32, damping=0.02, block_size=64, recipe="best")
    assert method.propagate == "3"
    assert make_method(settings(propagate_bits=None)).propagate is None


def test_the_papers_recipe_is_one_setting_away() -> None:
    method = make_method(settings(levels=[4, 3, 2], group_size=32, recipe="paper"))
    assert method.compressor((100, 200), dtype_bits=16).settings() == GPTQ(bits=(4, 3, 2), group_size=32).settings()


def test_the_weight_as_it_is_may_be_the_first_level() -> None:
    method = make_method(settings(9.5, levels=["dense", 8, 3], group_sizes={3: 32}, symmetric=True, propagate_bits=8))
    compressor = method.compressor((100,), dtype_bits=16)
    assert compressor == GPTQ(bits=(8, 3), dense_bits=16, group_sizes={3: 32}, symmetric=True, recipe="best")
    assert [level.cost for level in compressor.levels((2, 128))] == [16 * 256, 8 * 256, 3 * 256]


@pytest.mark.parametrize(
    ("method", "sentence"),
    [
        ({"levels": [4, "dense"]}, "dense comes first"),
        ({"levels": ["thick", 2]}, "method.levels has 'thick'"),
        ({"levels": [4.5, 2]}, "method.levels has 4.5"),
        ({"levels": [4, 3, 2], "group_sizes": {6: 32}}, "group_sizes has 6: 32"),
        ({"recipe": "worst"}, "recipe=worst"),
    ],
)
def test_levels_that_cannot_be_are_refused(method: dict[str, Any], sentence: str) -> None:
    with pytest.raises(EvoPressError, match=sentence):
        make_method(settings(2.5, **({"levels": [4, 3, 2], "propagate_bits": None} | method)))


def test_costs_are_told_with_and_without_metadata() -> None:
    method = make_method(settings(3.0))
    assert method.costs(space(10, 30), (0, 2)) == {"bits_per_weight": 2.5, "bits_per_weight_with_metadata": 3.5}
    assert method.dense_costs(16) == {"bits_per_weight": 16.0, "bits_per_weight_with_metadata": 16.0}
    assert method.uniform_name(Level("3 bits", 30, "3", 30)) == "uniform_3"


@pytest.mark.parametrize(
    ("bits", "sentence"),
    [
        (None, "method quant needs a target: give bits=2.5"),
        (1.9, r"bits=1.9 is below the lowest level \(2 bits\)"),
        (6.1, r"bits=6.1 is above the highest level \(6 bits\)"),
        (float("nan"), "bits=nan"),
        (2.0, "nothing to search"),
        (6.0, "nothing to search"),
    ],
)
def test_targets_that_no_search_can_meet(bits: float | None, sentence: str) -> None:
    with pytest.raises(EvoPressError, match=sentence):
        make_method(settings(bits))


def test_the_lowest_level_is_a_target_where_nothing_is_searched() -> None:
    assert make_method(settings(2.0, stages=["database", "evaluate"])).budget(space(5)).total == 10


@pytest.mark.parametrize("bound", [{"max_level": 1}, {"max_total_deviation": 4}])
def test_bounds_count_from_a_target_that_is_a_level(bound: dict[str, int]) -> None:
    search = SearchConfig(**bound)
    with pytest.raises(EvoPressError, match=r"search\.max_.*between two levels"):
        make_method(settings(2.5, search=search))
    assert make_method(settings(3.0, search=search)).target_is_level
    assert not make_method(settings(2.5, search=search, stages=["database"])).target_is_level
    types = {"grid": "gguf", "levels": ["Q8_0", "Q4_K", "Q2_K"], "propagate_bits": None}
    assert make_method(settings(4.5, search=search, **types)).target_is_level


def test_another_schema_is_no_method() -> None:
    with pytest.raises(EvoPressError, match="is unknown"):
        make_method(RunSettings(method="distillation"))
