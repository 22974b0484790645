"""Sparsity as a method: exact budgets on any mix of sizes, the pruner that is named, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from evopress.baselines.uniform import uniform_genomes
from evopress.compress.magnitude import Magnitude
from evopress.compress.sparse import derive_step, kept_at
from evopress.compress.sparsegpt import SparseGPT
from evopress.compress.wanda import Wanda
from evopress.errors import EvoPressError
from evopress.levels.tied import tied
from evopress.methods import make_method
from evopress.search.initial import uniform_genome
from evopress.settings import RunSettings, SearchConfig, SparsitySettings
from evopress.units import Space, Unit


def method_of(sparsity: float | None = 0.7, *, search: SearchConfig | None = None, **method: Any) -> Any:
    return make_method(RunSettings(method=SparsitySettings(**method), sparsity=sparsity, search=search or SearchConfig()))


def space_of(method: Any, sizes: tuple[int, ...]) -> Space:
    compressor = method.compressor(sizes, dtype_bits=16)
    return Space("sparsity", tuple(Unit(f"u{i}", i, "w", size, compressor.levels((1, size))) for i, size in enumerate(sizes)))


@hypothesis_settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(40, 4000), min_size=1, max_size=8),
    sparsity=st.floats(0.05, 0.95),
    num_levels=st.integers(1, 9),
)
def test_the_target_is_a_level_of_every_unit_whatever_the_rounding(sizes: list[int], sparsity: float, num_levels: int) -> None:
    """Shares such as 0.7 round up in one unit and down in another, so that their labels differ: 70.0% here, 69.9% there."""
    method = method_of(sparsity, num_levels=num_levels)
    space = space_of(method, tuple(sizes))
    budget = method.budget(space)
    assert budget.total == sum(kept_at(size, sparsity) for size in sizes)
    genome = uniform_genome(space, budget)
    assert genome is not None
    assert [unit.levels[level].cost for unit, level in zip(space.units, genome, strict=True)] == [
        kept_at(size, sparsity) for size in sizes
    ]
    assert uniform_genomes(space, method.uniform_name)["uniform"] == genome
    assert method.costs(space, genome) == {"sparsity": 1 - budget.total / sum(sizes), "weights_kept": budget.total}


def test_the_target_is_a_level_of_experts_that_have_one_together() -> None:
    method = method_of(experts="layer")
    levels = method.compressor((101,), dtype_bits=16).levels((1, 101))
    each = tuple(Unit(f"block.experts.{i}.down_proj", 0, "experts.down_proj", 101, levels) for i in range(5))
    space = tied(Space("sparsity", each), None, experts=method.experts_together)
    assert [(unit.name, unit.size) for unit in space.units] == [("block.experts.down_proj", 505)]
    assert kept_at(505, 0.7) != 5 * kept_at(101, 0.7) == method.budget(space).total
    assert uniform_genome(space, method.budget(space)) is not None


def test_the_compressor_is_the_one_that_is_named() -> None:
    sizes = (1000, 2000, 3000)
    step = derive_step(sizes, 0.7, 8)
    ladder: dict[str, Any] = {"sparsity": 0.7, "step": step, "num_levels": 8, "dtype_bits": 16}
    assert method_of().compressor(sizes, dtype_bits=16) == SparseGPT(**ladder, recipe="best")
    assert method_of(recipe="paper").compressor(sizes, dtype_bits=16) == SparseGPT(**ladder)
    assert method_of(compressor="wanda").compressor(sizes, dtype_bits=16) == Wanda(**ladder)
    assert method_of(compressor="magnitude").compressor(sizes, dtype_bits=16) == Magnitude(**ladder)
    own = method_of(step=50, num_levels=3, damping=0.05, block_size=64).compressor(sizes, dtype_bits=32)
    assert own == SparseGPT(sparsity=0.7, step=50, num_levels=3, dtype_bits=32, damping=0.05, block_size=64, recipe="best")
    assert method_of().propagate is None


def test_names_and_costs() -> None:
    method = method_of(0.5)
    space = space_of(method, (1000, 1000))
    names = list(uniform_genomes(space, method.uniform_name))
    assert names[8] == "uniform"
    assert len(names) == 17 and all(name.startswith("uniform_") and name.endswith("%") for name in (*names[:8], *names[9:]))
    assert method.dense_costs(16) == {"sparsity": 0.0}
    assert method.costs(space, (0,) * 2)["sparsity"] == pytest.approx(0.5 - 8 * derive_step((1000,), 0.5, 8) / 1000)


def test_a_level_beside_the_centre_is_another_sparsity_in_units_of_another_size() -> None:
    method = method_of(0.6, centre=0.5, step=200)
    space = space_of(method, (1000, 3000))
    assert list(uniform_genomes(space, method.uniform_name)) == ["uniform_50.0%"]
    sparser = tuple(next(i for i, level in enumerate(unit.levels) if level.key == "1") for unit in space.units)
    assert space.cost(sparser) == method.budget(space).total, "70% and 56.7%, as many weights as 60% of each"
    assert uniform_genome(space, method.budget(space)) is None
    equal = space_of(method, (1000, 1000))
    assert list(uniform_genomes(equal, method.uniform_name)) == [f"uniform_{share}.0%" for share in (10, 30, 50, 70, 90)]


def test_any_bound_fits_the_target() -> None:
    assert method_of(search=SearchConfig(max_level=1, max_total_deviation=4)).target_is_level


@pytest.mark.parametrize(
    ("sparsity", "changes", "sentence"),
    [
        (None, {}, "method sparsity needs a target: give sparsity=0.7"),
        *((value, {}, f"sparsity={value:g} must lie between 0 and 1") for value in (0.0, 1.0, 1.5, -0.1, math.nan)),
        (0.7, {"step": 0}, r"method\.step=0 must be at least 1"),
        (0.7, {"num_levels": 0}, r"method\.num_levels=0 must be at least 1"),
        (0.7, {"damping": 0.0}, "damping"),
        (0.7, {"block_size": 0}, "block_size"),
    ],
)
def test_settings_out_of_range_are_refused_from_settings_alone(
    sparsity: float | None, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(EvoPressError, match=sentence):
        method_of(sparsity, **changes)


def test_what_does_not_fit_the_model_is_refused_by_its_sizes() -> None:
    with pytest.raises(EvoPressError, match=r"method\.step=700 weights leaves nothing to exchange: .* choose at most 600"):
        method_of(step=700).compressor((1000, 2000), dtype_bits=16)
    with pytest.raises(EvoPressError, match=r"sparsity=0\.9999 must leave the largest unit \(2000 weights\) a weight to keep"):
        method_of(0.9999).compressor((1000, 2000), dtype_bits=16)


def test_an_unknown_compressor_or_recipe_is_refused() -> None:
    with pytest.raises(EvoPressError, match=r"method\.recipe=worst is unknown: choose one of paper, best"):
        SparsitySettings(recipe="worst")
    with pytest.raises(EvoPressError, match=r"method\.compressor=random is unknown: choose one of sparsegpt, wanda, magnitude"):
        method_of(compressor="random").check(searching=True)
