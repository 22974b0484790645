"""Depth pruning as a method: what a unit is, how many go, what may be excluded, and what is refused."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from evopress.errors import EvoPressError
from evopress.levels.modules import ATTENTION, MLP, dropped_modules
from evopress.methods import make_method
from evopress.models.blocks import BlockShape, ExpertShape
from evopress.search.initial import random_mix
from evopress.search.mutation import LevelSwitch, offspring
from evopress.search.neighbour import genomes_from_neighbour
from evopress.search.strategies import settings_class
from evopress.search.strategy import Neighbour, Problem
from evopress.settings import DropSettings, RunSettings, ScaleSettings, SearchConfig


def method_of(sparsity: float | None = 0.25, *, exchange: str = "name", generations: float = 1.0, **method: Any) -> Any:
    return make_method(
        RunSettings(
            method=DropSettings(**method),
            sparsity=sparsity,
            search=SearchConfig(exchange=exchange),
            scale=ScaleSettings(name="paper", depth_generations=generations),
        )
    )


def blocks_of(count: int) -> list[BlockShape]:
    return [BlockShape(f"model.layers.{i}", attention=100 + i, mlp=300, size=410 + i) for i in range(count)]


def space_of(method: Any, count: int = 30) -> Any:
    return method.space(blocks_of(count), dtype_bits=16)


@hypothesis_settings(max_examples=80, deadline=None)
@given(
    count=st.integers(2, 40),
    share=st.floats(0.0, 1.0),
    granularity=st.sampled_from(["module", "block", "pair"]),
    seed=st.integers(0, 99),
)
def test_every_genome_drops_what_the_target_says(count: int, share: float, granularity: str, seed: int) -> None:
    """Whatever is drawn or mutated: int(sparsity x blocks) attention modules and as many MLPs."""
    wanted = min(max(int(share * count), 1), count - 1)
    if granularity == "pair":
        count, wanted = 2 * count, 2 * wanted
    method = method_of(wanted / count, granularity=granularity)
    space = space_of(method, count)
    budget = method.budget(space)
    rng = np.random.default_rng(seed)
    genome = random_mix(space, budget, rng)
    for child in (genome, *offspring(LevelSwitch(space, budget, exchange="name"), genome, 4, rng)):
        kinds = Counter(kind for _, kind in dropped_modules(space, child))
        assert kinds == {ATTENTION: wanted, MLP: wanted}
        assert budget.met_by(space, child) and space.cost(child) == budget.total
        assert method.costs(space, child) == {"sparsity": wanted / count, "modules_dropped": 2 * wanted}


def experts_of(count: int, blocks: int = 3, chosen: int = 2) -> list[BlockShape]:
    names = [f"model.layers.{i}" for i in range(blocks)]
    return [BlockShape(name, experts=ExpertShape(f"{name}.mlp.experts", count, chosen, 50)) for name in names]


@hypothesis_settings(max_examples=40, deadline=None)
@given(count=st.integers(3, 9), dropped=st.integers(1, 7), balanced=st.booleans(), seed=st.integers(0, 99))
def test_every_genome_keeps_as_many_experts_of_a_block_as_a_token_is_sent_to(
    count: int, dropped: int, balanced: bool, seed: int
) -> None:
    dropped, exchange = min(dropped, count - 2), "name" if balanced else "fit"
    method = method_of(dropped / count, granularity="expert", balanced=balanced, exchange=exchange)
    space = method.space(experts_of(count), dtype_bits=16).priced(method.currency)
    budget, rng = method.budget(space), np.random.default_rng(seed)
    genome = random_mix(space, budget, rng)
    children = (genome,)
    if 3 * (count - dropped) > 3 * 2 or balanced:  # else there is nothing to trade
        children += tuple(offspring(LevelSwitch(space, budget, exchange=exchange), genome, 4, rng))
    for child in children:
        kept = [count - sum(child[i * count : (i + 1) * count]) for i in range(3)]
        assert sum(kept) == 3 * (count - dropped) and min(kept) >= 2 and budget.met_by(space, child)
        assert len(set(kept)) == 1 or not balanced
        assert method.costs(space, child) == {"sparsity": pytest.approx(dropped / count), "experts_dropped": 3 * dropped}
    if dropped > 1:  # what a run of several budgets begins from
        beside = method_of(1 / count, granularity="expert", balanced=balanced, exchange=exchange).budget(space)
        problem = Problem(space, budget, [], rng, rng, neighbour=Neighbour(random_mix(space, beside, rng)))
        starts = genomes_from_neighbour(problem)
        assert all(budget.met_by(space, start) and space.cost(start) == budget.total for start in starts)
        assert starts
    too_few = tuple(int(i < count - 1) for i in range(count)) + (0,) * (2 * count)
    assert not budget.met_by(space, too_few)


def test_one_layer_of_experts_has_the_total_alone() -> None:
    """Exchanges by name keep it; a floor beside it would ask for others."""
    method = method_of(0.5, granularity="expert")
    budget = method.budget(method.space(experts_of(8, blocks=1), dtype_bits=16).priced(method.currency))
    assert budget.total == 4 and not budget.limits


def test_the_target_is_rounded_down_but_not_below_a_whole_number() -> None:
    assert [method_of(s).num_dropped(30) for s in (0.125, 0.25, 0.375, 0.5)] == [3, 7, 11, 15]
    assert method_of(0.7).num_dropped(10) == 7 and method_of(0.29).num_dropped(100) == 29  # 0.29 x 100 is 28.999999999999996


def test_units_carry_names_sizes_and_the_bits_that_keeping_them_takes() -> None:
    module = space_of(method_of(), 4)
    assert [unit.name for unit in module.units[:3]] == [
        "model.layers.0.attention",
        "model.layers.0.mlp",
        "model.layers.1.attention",
    ]
    assert [unit.size for unit in module.units[:3]] == [100, 300, 101]
    assert [level.label for level in module.units[0].levels] == ["keep", "drop"]
    assert module.stored_bits((1, 0) * 4) == 16 * 4 * 300
    pair = space_of(method_of(0.5, granularity="pair"), 4)
    assert [(unit.name, unit.block, unit.size) for unit in pair.units] == [
        ("model.layers.0-1", 0, 821),
        ("model.layers.2-3", 2, 825),
    ]


@pytest.mark.parametrize(
    ("sparsity", "granularity", "expected"),
    [(0.25, "module", 7 * 23 / 1.5), (0.5, "block", 15 * 15 / 1.5), (0.4, "pair", 6 * 9 / 1.5)],
)
def test_generations_follow_theorem_1(sparsity: float, granularity: str, expected: float) -> None:
    method = method_of(sparsity, granularity=granularity)
    assert method.generations(space_of(method)) == math.ceil(expected)
    half = method_of(sparsity, granularity=granularity, generations=0.5)
    assert half.generations(space_of(half)) == math.ceil(expected / 2)


def test_generations_are_those_of_the_kind_that_has_most_units() -> None:
    blocks = [BlockShape(f"{i}", kinds=("attention", "mlp") if i % 3 == 0 else ("mlp",)) for i in range(24)]
    method = method_of(0.25)
    assert method.generations(method.space(blocks, dtype_bits=16)) == math.ceil(6 * 18 / 1.5)


def test_excluded_units_have_nothing_but_the_level_that_keeps_them() -> None:
    method = method_of(exclude=[0, "29", "model.layers.1.attention", "*.2?.mlp"])
    space = space_of(method)
    stuck = {unit.name.removeprefix("model.layers.") for unit in space.units if len(unit.levels) == 1}
    expected = {"0.attention", "0.mlp", "29.attention", "1.attention"} | {f"{i}.mlp" for i in range(20, 30)}
    assert stuck == expected
    rng, budget = np.random.default_rng(0), method.budget(space)
    for _ in range(20):
        genome = random_mix(space, budget, rng)
        assert all(level == 0 for unit, level in zip(space.units, genome, strict=True) if len(unit.levels) == 1)
        assert len(dropped_modules(space, genome)) == 14
    assert method_of(exclude=[3]).recipe() != method_of().recipe()
    pair = space_of(method_of(0.4, granularity="pair", exclude=[3]))
    assert [unit.name for unit in pair.units if len(unit.levels) == 1] == ["model.layers.2-3"]


def test_an_unbalanced_search_trades_attention_for_mlp_modules() -> None:
    method = method_of(balanced=False, exchange="any")
    space = space_of(method)
    budget = method.budget(space)
    assert budget.limits == () and budget.total == 60 - 14
    rng = np.random.default_rng(0)
    genome = random_mix(space, budget, rng)
    counts = set()
    for _ in range(50):
        (genome,) = offspring(LevelSwitch(space, budget, exchange="any"), genome, 1, rng)
        kinds = Counter(kind for _, kind in dropped_modules(space, genome))
        assert kinds.total() == 14
        counts.add(kinds[ATTENTION])
    assert len(counts) > 2


REFUSED = {
    "no target": ({"sparsity": None}, ["sparsity=0.25"]),
    "nothing": ({"sparsity": 0.0}, ["sparsity=0 ", "(0, 1)"]),
    "everything": ({"sparsity": 1.0}, ["sparsity=1 ", "(0, 1)"]),
    "not a number": ({"sparsity": math.nan}, ["sparsity=nan"]),
    "less than a block": ({"sparsity": 0.03}, ["drops 0 of 30 blocks", "0.0334"]),
    "an odd number in pairs": ({"sparsity": 0.25, "granularity": "pair"}, ["7 of 30 blocks", "two at a time", "block"]),
    "unknown granularity": ({"granularity": "head"}, ["method.granularity=head", "module, block, pair, expert"]),
    "too few experts": (
        {"sparsity": 0.8, "granularity": "expert"},
        ["drops 6 of 8 experts", "is sent to 3", "1 to 5", "below 0.75"],
    ),
    "no expert": ({"sparsity": 0.1, "granularity": "expert"}, ["drops 0 of 8 experts", "at least 0.125"]),
    "experts of any block": ({"exchange": "any", "granularity": "expert"}, ["search.exchange=any", "search.exchange=name"]),
    "experts of unequal blocks": ({"balanced": False, "granularity": "expert"}, ["search.exchange=name", "search.exchange=fit"]),
    "an exchange of kinds": ({"exchange": "any"}, ["search.exchange=any", "search.exchange=name", "method.balanced=false"]),
    "no exchange of kinds": ({"balanced": False}, ["method.balanced=false", "search.exchange=any"]),
    "too few are left": ({"exclude": list(range(25))}, ["leaves 5 attention units", "drops 7", "exclude fewer"]),
    "too few of one kind": ({"exclude": ["*.mlp"]}, ["leaves 0 mlp units"]),
    "too few blocks": ({"exclude": list(range(25)), "granularity": "block"}, ["leaves 5 block units", "drops 7"]),
    "one genome": (
        {"exclude": list(range(23))},
        ["method.exclude leaves 7 attention units and 7 mlp units to drop", "drops all of them", "search.generations=0"],
    ),
    "one genome of blocks": (
        {"exclude": list(range(23)), "granularity": "block"},
        ["leaves 7 block units to drop, and sparsity=0.25"],
    ),
    "a name that does not exist": ({"exclude": ["model.layers.3.moe"]}, ["'model.layers.3.moe'", "model.layers.0.attention"]),
    "a block that does not exist": ({"exclude": [30]}, ["30", "from 0 to 29"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused(case: str) -> None:
    arguments, parts = REFUSED[case]
    blocks = experts_of(8, 30, 3) if arguments.get("granularity") == "expert" else blocks_of(30)
    with pytest.raises(EvoPressError) as caught:
        method_of(**arguments).space(blocks, dtype_bits=16)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "changed",
    [
        {"stages": ["database", "evaluate"]},
        {"search": SearchConfig(exchange="name", generations=0)},
        {"search": SearchConfig(exchange="name", strategy=settings_class("guided", key="search/strategy")())},
        {"method": DropSettings(exclude=[*range(22), "*.22.mlp"])},
    ],
)
def test_one_genome_is_enough_where_no_offspring_are_drawn(changed: dict[str, Any]) -> None:
    """And where one kind of modules has another genome, evolution has, too."""
    run = RunSettings(method=DropSettings(exclude=list(range(23))), sparsity=0.25, search=SearchConfig(exchange="name"))
    assert len(space_of(make_method(replace(run, **changed)))) == 60


def test_pairs_need_an_even_number_of_blocks() -> None:
    with pytest.raises(EvoPressError, match="the model has 7 blocks, an odd number"):
        space_of(method_of(0.5, granularity="pair"), 7)


def test_blocks_of_one_module_each_drop_a_share_of_each_kind_or_are_refused() -> None:
    """A twelfth of twelve blocks is one; of six modules of a kind it is none."""
    blocks = [BlockShape(f"model.layers.{i}", kinds=("attention",) if i % 2 else ("mlp",)) for i in range(12)]
    with pytest.raises(
        EvoPressError, match=r"drops none of 6 mlp units and none of 6 attention units: give a share of at least 0\.1667"
    ):
        method_of(sparsity=0.1).space(blocks, dtype_bits=16)
    method = method_of(sparsity=0.1667)
    space = method.space(blocks, dtype_bits=16)
    assert len(space) - method.budget(space).total == 2
