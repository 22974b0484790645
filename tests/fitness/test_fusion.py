"""Fused elementwise work: the same numbers up to rounding, and off with a sentence where nothing compiles."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from evopress.fitness import fusion
from evopress.fitness.measures import KLDivergence
from evopress.fitness.population import PopulationEvaluator, measure_sums


@pytest.fixture(scope="module")
def live(live_model: Any) -> Any:
    return live_model("llama", num_blocks=4)


@pytest.fixture(scope="module")
def ids(tokens: Any) -> Any:
    return tokens(3, 24, seed=7)


@pytest.fixture(scope="module")
def genomes(live: Any) -> Any:
    return [None, *((level,) * len(live.space) for level in (0, 1, 2))]


def test_without_a_compiler_it_is_left_off_with_the_reason(monkeypatch: Any, caplog: Any) -> None:
    def broken(function: Any, **kwargs: Any) -> Any:
        raise RuntimeError("\nNo working C++ compiler found\nlong story")

    monkeypatch.setattr(torch, "compile", broken)
    with caplog.at_level(logging.WARNING):
        assert not fusion.can_compile("cpu")
    assert caplog.messages == [
        "fitness.compile=true is left off: torch.compile does not work on cpu here (No working C++ compiler found)"
    ]


def test_fused_blocks_and_divergence_are_the_functions_that_are_compiled(
    monkeypatch: Any, live: Any, genomes: Any, ids: Any
) -> None:
    # What is compiled, run as it is: the same values, and every block and every chunk goes through it.
    compiled: list[Any] = []

    def eager(function: Any, **kwargs: Any) -> Any:
        compiled.append(function)
        return function

    monkeypatch.setattr(torch, "compile", eager)
    fusion.compiled.cache_clear()
    try:
        plain, count = measure_sums(PopulationEvaluator(live), genomes, ids, None, KLDivergence())
        fused, same = measure_sums(PopulationEvaluator(live, fused=True), genomes, ids, None, KLDivergence(fused=True))
    finally:
        fusion.compiled.cache_clear()
    assert same == count
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-4)
    assert len(compiled) == len(live.blocks.blocks) + 1


@pytest.mark.slow
def test_compiled_values_equal_eager_ones(live: Any, genomes: Any, ids: Any) -> None:
    if not fusion.can_compile("cpu"):
        pytest.skip("torch.compile does not work here: it needs a C++ compiler")
    plain, _ = measure_sums(PopulationEvaluator(live), genomes, ids, None, KLDivergence())
    fused, _ = measure_sums(PopulationEvaluator(live, fused=True), genomes, ids, None, KLDivergence(fused=True))
    torch.testing.assert_close(fused, plain, rtol=1e-3, atol=1e-3)
