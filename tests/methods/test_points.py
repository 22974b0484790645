"""Several budgets: what each is, their order, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from evopress.errors import EvoPressError
from evopress.methods import make_method
from evopress.methods.method import Rest
from evopress.methods.points import grid, point_at, points_of
from evopress.settings import DropSettings, JointSettings, QuantSettings, RunSettings, SearchConfig, SparsitySettings
from evopress.units import Level, Space, Unit

QUANT, JOINT, PRUNED, DROP = QuantSettings(group_size=16), JointSettings(group_size=16), SparsitySettings(), DropSettings()

FIT = SearchConfig(exchange="fit")


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
        (QUANT, [9, 3], r"^budget 9 is above the highest level \(6 bits\) of .*: change it or add such a level"),
        (QUANT, [3, 2], r"^budget 2 is the lowest of .*: give bits between"),
        (DROP, [1.5, 2], r"^budget 1.5 is out of range: expected a share of blocks"),
        (JOINT, [2.5], "write 2.5bpw"),
        (PRUNED, ["60MB"], "method sparsity does not take size=60MB"),
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


@pytest.mark.parametrize(
    ("method", "target", "first", "last", "count"),
    [
        (QUANT, {}, "5.9375", "2.0625", 63),
        (JOINT, {"search": FIT}, "6.0625bpw", "2.25bpw", 62),
        (PRUNED, {"sparsity": 0.7}, "0.5", "0.75", 21),
    ],
)
def test_budgets_that_are_tried_lie_between_the_ends_of_the_space(
    method: Any, target: dict[str, Any], first: str, last: str, count: int
) -> None:
    run = RunSettings(method=method, max_kl=0.1, **target)
    make_method(run)
    levels = [(bits, bits * 100) for bits in (6, 5, 4, 3, 2)]
    if method is PRUNED:
        levels = [(round(100 * (1 - kept)), round(100 * kept)) for kept in (0.51, 0.4, 0.3, 0.24)]
    unit = Unit("blocks.0.q", 0, "q", 100, tuple(Level(f"{name}", cost, f"{name}", cost) for name, cost in levels))
    points = grid(run, Space(method.name, (unit,)), Rest(bits=32, weights=4))
    assert [points[0].name, points[-1].name, len(points)] == [first, last, count]
    assert not any(point.settings.max_kl for point in points)


@pytest.mark.parametrize(
    ("method", "asked", "sentence"),
    [
        (QUANT, {"max_kl": 0.1, "min_agreement": 0.9}, "both given"),
        (QUANT, {"max_kl": 0.0}, "max_kl=0.0 is out of range"),
        (QUANT, {"min_agreement": 1.5}, "min_agreement=1.5 is out of range"),
        (QUANT, {"max_kl": 0.1, "size": "60MB"}, r"choose among sizes, budgets=\[60MB\]"),
        (DROP, {"max_kl": 0.1, "sparsity": 0.25}, "needs budgets to choose among"),
    ],
)
def test_what_cannot_be_kept_is_one_sentence(method: Any, asked: dict[str, Any], sentence: str) -> None:
    with pytest.raises(EvoPressError, match=sentence):
        RunSettings(method=method, **asked)
