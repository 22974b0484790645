"""Sizes and limits as the settings give them."""

import math
import re
from typing import Any

import pytest

from evopress.currencies import CURRENCIES
from evopress.errors import EvoPressError
from evopress.methods import Rest, make_method
from evopress.methods.targets import further_limits, parsed_size, size_budget
from evopress.models.blocks import BlockShape
from evopress.settings import JointSettings, QuantSettings, RunSettings, SearchConfig, SparsitySettings
from evopress.units import Budget, Level, Space, Unit

SPACE = Space("quant", (Unit("a", 0, "q_proj", 1000, (Level("8 bits", 8000, "8", 8500, "quant"),)),), CURRENCIES["bytes"])


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ("1500", None),
        ("1500B", 1500 * 8),
        ("1.5kB", 1500 * 8),
        (" 1.5 KB ", 1500 * 8),
        ("2KiB", 2048 * 8),
        ("4bpw", 4 * 1200),  # of all weights: the units' 1,000 and 200 others
        ("3.999bpw", 4798),  # rounded down
    ],
)
def test_sizes_are_bits_of_the_whole_model_less_what_is_no_unit(size: str, expected: int | None) -> None:
    rest = Rest(bits=3200, weights=200)
    if expected is None:
        with pytest.raises(EvoPressError, match="is no size: give one such as 60MB"):
            size_budget(size, SPACE, rest)
        return
    assert size_budget(size, SPACE, rest).total == expected - 3200


@pytest.mark.parametrize("size", ["", "MB", "-3MB", "0MB", "nanMB", "3XB", "3 MB GB", "1e400MB", "inf"])
def test_what_is_no_size_is_refused(size: str) -> None:
    with pytest.raises(EvoPressError, match="is no size"):
        parsed_size(size)


@pytest.mark.parametrize("bits", [2.05, 2.3, 4.1, 4.35, 4.6, 4.85])
def test_bits_that_no_float_holds_are_those_that_were_typed(bits: float) -> None:
    """Of SmolLM2's weights, 2.3 times their number in floats is one bit short."""
    weights = 106_168_320
    levels = tuple(Level(f"{n} bits", n * weights, str(n), n * weights, "quant") for n in (8, 2))
    space = Space("quant", (Unit("a", 0, "q_proj", weights, levels),))
    method = make_method(RunSettings(method=QuantSettings(), search=SearchConfig(), bits=bits))
    assert method.budget(space).total == round(bits * 100) * weights // 100


def test_sizes_that_no_float_holds_are_those_that_were_typed() -> None:
    assert math.floor(1.001 * 10**6) == 1_000_999
    assert size_budget("1.001MB", SPACE, Rest()).total == 8 * 1_001_000


def test_a_size_that_limits_a_kind_has_nothing_of_the_rest_in_it() -> None:
    rest = Rest(bits=9_000_000, weights=10**6)
    (limit,) = further_limits([{"currency": "bytes", "total": "1.3kB", "kind": "q_proj"}], SPACE, rest)
    assert limit.total == 8 * 1300
    (limit,) = further_limits([{"currency": "bytes", "total": "2.5bpw", "kind": "q_proj"}], SPACE, rest)
    assert limit.total == 2500
    with pytest.raises(EvoPressError, match=r"^limits: total=1\.3kB is too small"):
        further_limits([{"currency": "bytes", "total": "1.3kB"}], SPACE, rest)


@pytest.mark.parametrize(
    ("sparsity", "words"),
    [
        (0.9, r"target 0\.9 sparsity is above what the 1 units can reach \(most 0\.75; first: a, most .*lower the target"),
        (0.5, r"0\.5 sparsity is below the least compressed level \(0\.6\): set method\.centre \(0\.5 here, .*or raise the target"),
    ],
)
def test_a_sparsity_out_of_reach_is_told_in_sparsities(sparsity: float, words: str) -> None:
    levels = tuple(Level(f"{1 - kept / 1000:.0%}", kept, str(kept), 16 * kept, "sparsity") for kept in (400, 250))
    space = Space("sparsity", (Unit("a", 0, "q_proj", 1000, levels),), CURRENCIES["weights"])
    method = make_method(RunSettings(method=SparsitySettings(), search=SearchConfig(), sparsity=sparsity))
    with pytest.raises(EvoPressError, match=words):
        method.budget(space).check(space)


def test_a_width_that_its_scales_make_larger_than_another_is_refused() -> None:
    levels = tuple(Level(f"{bits} bits", 1000 * bits, str(bits), stored, "quant") for bits, stored in ((3, 3250), (2, 4250)))
    unit = Unit("a", 0, "q_proj", 1000, levels)
    Budget(2500, 2.5, "bits per weight").check(Space("quant", (unit,), CURRENCIES["bits"]))
    with pytest.raises(
        EvoPressError, match=r"^a takes 4\.25 bits per weight as stored at 2 bits, .* and 3\.25 at 3 bits: leave 2 bits"
    ):
        Budget(3500, 3.5, "bits per weight").check(Space("quant", (unit,), CURRENCIES["bytes"]))


def test_a_size_below_what_is_no_unit_is_refused() -> None:
    with pytest.raises(EvoPressError, match=r"size=1kB is too small: uncompressed parameters .* take 0\.002 MB"):
        size_budget("1kB", SPACE, Rest(bits=16_000, weights=1000))


def test_limits_are_read() -> None:
    asked = [
        {"currency": "modules", "total": 52},
        {"currency": "bytes", "total": "2kB"},
        {"currency": "bytes", "total": 2000},
        {"currency": "bits", "total": 7.0, "kind": "q_proj"},
    ]
    limits = further_limits(asked, SPACE, Rest(bits=800))
    assert [limit.total for limit in limits] == [52, 16_000 - 800, 16_000, 7]
    assert [str(limit) for limit in limits[::3]] == ["52 modules", "7 bits of q_proj"]


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        ("60MB", "expected {currency: bytes, total: 60MB}"),
        ({"currency": "bytes"}, "expected {currency: bytes, total: 60MB}"),
        ({"currency": "bytes", "total": 1, "of": 2}, "expected {currency: bytes, total: 60MB}"),
        (
            {"currency": "euro", "total": 1},
            "the currency 'euro', which is unknown: choose one of bits, bytes, read, weights, modules",
        ),
        ({"currency": "bits", "total": "60MB"}, "expected a number, sizes are of the currency bytes"),
        ({"currency": "bytes", "total": "60"}, "is no size"),
        ({"currency": "bytes", "total": -1}, "expected a number of at least 0"),
        ({"currency": "bytes", "total": True}, "expected a number of at least 0"),
        ({"currency": "bytes", "total": float("nan")}, "expected a number of at least 0"),
        ({"currency": "bytes", "total": 1, "kind": "v_proj"}, "the kind 'v_proj', which no unit is of: choose one of q_proj"),
    ],
)
def test_what_is_no_limit_is_refused(limit: Any, expected: str) -> None:
    with pytest.raises(EvoPressError) as refused:
        further_limits([limit], SPACE, Rest())
    assert expected in str(refused.value)


def run(method: Any, **settings: Any) -> RunSettings:
    return RunSettings(method=method, search=SearchConfig(exchange=settings.pop("exchange", "fit")), **settings)


def test_the_size_takes_the_place_of_the_bits() -> None:
    method = make_method(run(QuantSettings(), bits=3.0, size="2kB"))
    assert method.currency is CURRENCIES["bytes"]
    assert method.budget(SPACE, Rest(bits=1000)).total == 15_000
    assert make_method(run(QuantSettings(), bits=3.0)).currency is None


def test_modules_can_be_gone_from_the_start() -> None:
    blocks = [BlockShape(f"m.{i}", attention=3, mlp=4, size=7) for i in range(3)]
    modules = make_method(run(JointSettings(dropped=["m.1.mlp", 2], exclude=[0]), size="1kB")).modules
    space = modules.space(blocks, dtype_bits=16)
    levels = {unit.name: [level.key for level in unit.levels] for unit in space.units}
    assert levels["m.1.mlp"] == levels["m.2.attention"] == levels["m.2.mlp"] == ["drop"]
    assert levels["m.0.mlp"] == ["keep"] and levels["m.1.attention"] == ["keep", "drop"]
    assert modules.recipe() != make_method(run(JointSettings(exclude=[0]), size="1kB")).modules.recipe()
    for dropped, expected in ((["m.9.*"], "method.dropped has 'm.9.*'"), ([0], "method.exclude keeps m.0.attention")):
        with pytest.raises(EvoPressError, match=re.escape(expected)):
            make_method(run(JointSettings(dropped=dropped, exclude=[0]), size="1kB")).modules.space(blocks, dtype_bits=16)


@pytest.mark.parametrize(
    ("method", "settings", "expected"),
    [
        (JointSettings(), {}, "method joint needs a target: give size=60MB"),
        (JointSettings(), {"bits": 2.5}, "method joint does not take bits=2.5: give size=2.5bpw"),
        (JointSettings(), {"sparsity": 0.5, "size": "1MB"}, "method joint does not take sparsity=0.5"),
        (JointSettings(), {"size": "lots"}, "size=lots is no size"),
        (JointSettings(), {"size": "1MB", "exchange": "any"}, "search.exchange=any cannot trade modules for levels"),
        (JointSettings(), {"size": "1MB", "limits": [3]}, "limits has 3: expected {currency: bytes"),
        (SparsitySettings(), {"sparsity": 0.5, "size": "1MB"}, "method sparsity does not take size=1MB"),
        (QuantSettings(), {}, "give bits=2.5, the average number of bits per weight, or size=60MB of the whole model"),
    ],
)
def test_targets_that_do_not_fit_the_method_are_refused(method: Any, settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(EvoPressError) as refused:
        make_method(run(method, **settings))
    assert expected in str(refused.value)
