"""Several budgets: what each is, their order, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from evopress.errors import EvoPressError
from evopress.methods import make_method
from evopress.methods.points import point_at, points_of
from evopress.settings import DropSettings, JointSettings, QuantSettings, RunSettings, SparsitySettings

QUANT, JOINT, PRUNED, DROP = QuantSettings(group_size=16), JointSettings(group_size=16), SparsitySettings(), DropSettings()


@pytest.mark.parametrize(
    ("method", "budgets", "names"),
    [
        (QUANT, [2.5, 4, 3], ["4", "3", "2.5"]),
        (QUANT, ["40MB", "0.1GB", "39 MiB"], ["0.1GB", "39MiB", "40MB"]),
        (JOINT, ["2.5bpw", "3bpw"], ["3bpw", "2.5bpw"]),
        (PRUNED, [0.7, 0.5], ["0.5", "0.7"]),
        (DROP, [0.25, "0.125"], ["0.125", "0.25"]),
    ],
)
def test_points_are_runs_of_one_budget_from_the_least_compressed_on(method: Any, budgets: list[Any], names: list[str]) -> None:
    run = RunSettings(method=method, budgets=budgets, seed=3)
    points = points_of(run)
    assert [point.name for point in points] == names
    for point in points:
        given = [point.settings.bits, point.settings.sparsity, point.settings.size]
        assert sum(value is not None for value in given) == 1 and point.settings.seed == 3 and not point.settings.budgets
        assert point_at(run, point.name) == point


def test_the_default_target_of_a_method_gives_way() -> None:
    run = RunSettings(method=QUANT, bits=3.0, budgets=[2.5])
    assert run.bits is None and points_of(run)[0].settings == RunSettings(method=QUANT, bits=2.5)


@pytest.mark.parametrize(
    ("method", "budgets", "sentence"),
    [
        (QUANT, [2.5, 2.5], "has one twice"),
        (QUANT, [2.5, "60MB"], "mixes"),
        (QUANT, ["2.5bpw", "60MB"], "mixes"),
        (QUANT, ["many"], "'many', which is no budget: give numbers"),
        (QUANT, [float("nan")], "out of range"),
        (QUANT, [9], "bits=9 is above the highest level"),
        (JOINT, [2.5], "write 2.5bpw"),
        (PRUNED, ["60MB"], "size=60MB means nothing to method sparsity"),
    ],
)
def test_what_is_no_budget_is_one_sentence(method: Any, budgets: list[Any], sentence: str) -> None:
    with pytest.raises(EvoPressError, match=sentence):
        make_method(RunSettings(method=method, budgets=budgets))


@pytest.mark.parametrize("other", [{"size": "60MB"}, {"genome": "dp"}])
def test_one_genome_or_size_and_several_budgets_are_refused(other: dict[str, Any]) -> None:
    with pytest.raises(EvoPressError, match="both given"):
        RunSettings(method=QUANT, budgets=[2.5], **other)


def test_sparsities_share_the_levels_around_the_middle_one() -> None:
    run = RunSettings(method=PRUNED, budgets=[0.5, 0.6, 0.7])
    methods = [make_method(point.settings) for point in points_of(run)]
    ladders = [method.weights.compressor([1000, 4000], dtype_bits=16).settings() for method in methods]
    alone = make_method(RunSettings(method=PRUNED, sparsity=0.6))
    assert ladders == [alone.weights.compressor([1000, 4000], dtype_bits=16).settings()] * 3
    assert [method.target_is_level for method in methods] == [False, True, False]
    centred = RunSettings(method=replace(PRUNED, centre=0.7), budgets=[0.5, 0.6])
    assert {point.settings.method.centre for point in points_of(centred)} == {0.7}
