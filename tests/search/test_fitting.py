"""Modules beside weights and several limits: what lies in a dropped module is free, and no limit is ever exceeded."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evopress.baselines.dynamic_programming import dynamic_programming
from evopress.currencies import CURRENCIES, own_currency
from evopress.errors import EvoPressError
from evopress.search.constraint import Spending
from evopress.search.initial import random_mix, uniform_genome
from evopress.search.mutation import LevelSwitch, offspring
from evopress.units import Budget, Level, Limit, Space, Unit

MODULES, BYTES, BITS = CURRENCIES["modules"], CURRENCIES["bytes"], CURRENCIES["bits"]


def joint_space(num_blocks: int, sizes: tuple[int, ...] = (4, 8)) -> Space:
    """Two weights per block, one in its attention and one in its MLP, and a head; the modules come last, as in a run's space."""

    def weight(name: str, block: int, kind: str, size: int) -> Unit:
        levels = tuple(Level(f"{b} bits", b * size, str(b), b * size + size // 2, "quant") for b in (8, 4, 3, 2))
        return Unit(name, block, kind, size, levels)

    keep, drop = Level("keep", 1, "keep", 0, "drop"), Level("drop", 0, "drop", 0, "drop")
    weights = [
        weight(f"{i}.{kind}", i, kind, sizes[place])
        for i in range(num_blocks)
        for place, kind in enumerate(("o_proj", "down_proj"))
    ]
    modules = [Unit(f"{i}.{kind}", i, kind, 0, (keep, drop)) for i in range(num_blocks) for kind in ("attention", "mlp")]
    units = (*weights, weight("head", num_blocks, "head", 6), *modules)
    first = len(weights) + 1
    inside = (*(first + i for i in range(len(weights))), None, *(None for _ in modules))
    return Space("joint", units, BYTES, inside)


def literal_cost(space: Space, genome, price) -> int:
    """Add up unit by unit, asking of each whether its module is there."""
    gone = {unit.name for unit, level in zip(space.units, genome, strict=True) if unit.levels[level].key == "drop"}
    total = 0
    for unit, level in zip(space.units, genome, strict=True):
        module = {"o_proj": "attention", "down_proj": "mlp"}.get(unit.kind)
        if f"{unit.block}.{module}" not in gone:
            total += price(unit.levels[level])
    return total


def test_what_lies_in_a_dropped_module_is_free():
    space = joint_space(2)
    rng = np.random.default_rng(0)
    for _ in range(50):
        genome = tuple(int(rng.integers(len(unit.levels))) for unit in space.units)
        assert space.cost(genome) == space.stored_bits(genome) == literal_cost(space, genome, lambda level: level.stored_bits)
        of_codes = literal_cost(space, genome, lambda level: level.cost if level.source == "quant" else 0)
        assert space.cost_in(BITS, genome) == of_codes
        kept = sum(unit.levels[level].key == "keep" for unit, level in zip(space.units, genome, strict=True))
        assert space.cost_in(MODULES, genome) == kept
    everything_gone = (*(0 for _ in range(5)), 1, 1, 1, 1)
    assert space.cost(everything_gone) == space.units[4].levels[0].stored_bits  # the head alone


@settings(max_examples=60, deadline=None)
@given(share=st.floats(0.05, 1.0), kept=st.integers(0, 8), seed=st.integers(0, 99))
def test_mixes_and_offspring_keep_every_limit(share: float, kept: int, seed: int) -> None:
    space = joint_space(4)
    budget = Budget(int(share * space.greatest_cost), 1.0, "MB", limits=(Limit(kept, MODULES), Limit(3, MODULES, "mlp")))
    rng = np.random.default_rng(seed)
    least = space.units[8].levels[-1].stored_bits  # the head at two bits, which cannot be dropped
    if budget.total < least:
        with pytest.raises(EvoPressError, match="no genome found meets target"):
            random_mix(space, budget, rng)
        return
    genome = random_mix(space, budget, rng)
    mutation = LevelSwitch(space, budget, exchange="fit")
    for _ in range(5):
        assert budget.met_by(space, genome)
        assert literal_cost(space, genome, lambda level: level.stored_bits) <= budget.total
        labels = [unit.levels[level].label for unit, level in zip(space.units, genome, strict=True)]
        mlps = [label for unit, label in zip(space.units, labels, strict=True) if unit.kind == "mlp"]
        assert labels.count("keep") <= kept and mlps.count("keep") <= 3
        try:
            genome = offspring(mutation, genome, 1, rng)[0]
        except EvoPressError:
            return  # a corner of the space


def test_every_genome_within_a_limit_is_within_reach():
    space = joint_space(1, sizes=(2, 2))
    budget = Budget(2 * space.least_cost + 30, 1.0, "MB")
    genomes = itertools.product(*(range(len(unit.levels)) for unit in space.units))
    within = {genome for genome in genomes if space.cost(genome) <= budget.total}
    rng, mutation = np.random.default_rng(0), LevelSwitch(space, budget, exchange="fit")
    genome, seen = random_mix(space, budget, rng), set()
    for _ in range(3000):
        genome = mutation(genome, rng)
        seen.add(genome)
    assert seen <= within
    dropped = {genome[-2:] for genome in within}
    assert {genome[-2:] for genome in seen} == dropped and len(dropped) == 4  # every choice of modules


def test_spending_is_what_counting_anew_finds():
    space = joint_space(3)
    budget = Budget(60, 1.0, "MB", limits=(Limit(4, MODULES), Limit(40, BITS)))
    rng = np.random.default_rng(3)
    spending = Spending(space, budget, list(random_mix(space, Budget(200, 1.0, "MB"), rng)))
    for _ in range(300):
        unit, by = int(rng.integers(len(space))), int(rng.choice([-1, 1]))
        if not spending.can_move(unit, by):
            continue
        before = [space.cost(spending.levels), *(limit.spent(space, spending.levels) for limit in budget.limits)]
        added = spending.step(unit, by)
        spending.move(unit, by)
        after = [space.cost(spending.levels), *(limit.spent(space, spending.levels) for limit in budget.limits)]
        assert [a - b for a, b in zip(after, before, strict=True)] == [added.get(i, 0) for i in range(3)]
        totals = [budget.total, *(limit.total for limit in budget.limits)]
        assert spending.exceeded == [i for i, (spent, total) in enumerate(zip(after, totals, strict=True)) if spent > total]


def test_a_step_counts_for_the_limits_of_its_own_group_alone():
    keep, drop = Level("keep", 1, "keep", 8, "drop"), Level("drop", 0, "drop", 0, "drop")
    bits = (Level("4 bits", 4, "4", 4, "quant"), Level("2 bits", 2, "2", 2, "quant"))
    experts = tuple(Unit(f"{i // 4}.experts.{i % 4}", i // 4, "expert", 1, (keep, drop)) for i in range(12))
    weights = tuple(Unit(f"{unit.name}.up", unit.block, "experts.up", 1, bits) for unit in experts)
    space = Space("joint", (*weights, *experts), CURRENCIES["bits"], (*range(12, 24), *(None,) * 12))
    floors = tuple(
        Limit(-2, replace(CURRENCIES["experts"], price=lambda unit, level: -level.cost), f"{i}.experts") for i in range(3)
    )
    spending = Spending(space, Budget(100, 1.0, ""), [0] * 24)
    assert spending.step(0, 1) == {0: -2}
    spending = Spending(space, Budget(100, 1.0, "", floors), [0] * 24)
    assert spending.step(0, 1) == {0: -2}
    assert spending.step(12, 1) == {0: -8 - 4, 1: 1} and spending.step(23, 1) == {0: -8 - 4, 3: 1}
    spending.move(12, 1)
    spending.move(13, 1)
    assert not spending.fits(spending.step(14, 1)) and spending.fits(spending.step(16, 1))


def test_a_mix_compresses_what_eases_a_limit_and_nothing_else():
    levels = tuple(Level(f"{b} bits", b, str(b), b, "quant") for b in (6, 5, 4, 3, 2))
    space = Space("quant", tuple(Unit(f"{i}.{kind}", i, kind, 1, levels) for i in range(10) for kind in ("up", "down")))
    budget = Budget(80, 4.0, "", (Limit(30, BITS, "down"),))
    for seed in range(10):
        mix = random_mix(space, budget, np.random.default_rng(seed))
        assert budget.met_by(space, mix)
        assert max(mix[::2]) <= 2, "no up below the four bits that the budget has for all"


@pytest.mark.parametrize("exchange", ["size", "name", "any", "none"])
def test_exchanges_that_count_one_additive_cost_are_refused(exchange: str):
    space = joint_space(2)
    with pytest.raises(EvoPressError, match=f"search.exchange={exchange} .*use search.exchange=fit"):
        LevelSwitch(space, Budget(100, 1.0, "MB"), exchange=exchange)


def test_dynamic_programming_keeps_all_modules():
    space = joint_space(2)
    errors = [[index / 10 for index in range(len(unit.levels))] for unit in space.units]
    budget = Budget(space.greatest_cost // 2, 1.0, "MB")
    genome = dynamic_programming(space, budget, errors)
    assert genome[-4:] == (0, 0, 0, 0) and budget.met_by(space, genome)
    weights = [range(len(unit.levels)) for unit in space.units[:5]]
    best = min(
        (g for g in itertools.product(*weights) if space.cost((*g, 0, 0, 0, 0)) <= budget.total),
        key=lambda g: sum(errors[i][level] for i, level in enumerate(g)),
    )
    assert sum(errors[i][genome[i]] for i in range(5)) == pytest.approx(sum(errors[i][level] for i, level in enumerate(best)))


def test_what_is_gone_from_the_start_costs_nothing_and_stays_gone():
    space = joint_space(3)
    units = tuple(replace(u, levels=u.levels[1:]) if u.name in ("0.mlp", "2.attention") else u for u in space.units)
    space = replace(space, units=units)
    errors = [[index / 10 for index in range(len(unit.levels))] for unit in space.units]
    budget = Budget(space.cost((0,) * len(space)) * 2 // 3, 1.0, "MB")
    genome, rng = dynamic_programming(space, budget, errors), np.random.default_rng(0)
    assert budget.met_by(space, genome) and genome[1] == genome[4] == 0  # 0.down_proj and 2.o_proj, whose level does not matter
    assert space.cost(genome) > budget.total - 8  # what they do not spend, others do
    for found in (random_mix(space, budget, rng), LevelSwitch(space, budget, exchange="fit")(genome, rng)):
        assert budget.met_by(space, found)
        assert [found[i] for i, unit in enumerate(space.units) if len(unit.levels) == 1] == [0, 0]


def test_a_joint_space_has_no_uniform_genome():
    space = joint_space(2)
    assert uniform_genome(space, Budget(space.least_cost, 1.0, "MB")) is None


def test_a_space_without_a_currency_counts_what_its_source_does():
    units = (Unit("a", 0, "q", 10, (Level("70%", 3, "0", 58, "sparsity"), Level("80%", 2, "1", 42, "sparsity"))),)
    space = Space("sparsity", units)
    assert space.prices == ((3, 2),) and space.words.measure == "sparsity" == own_currency("sparsity").measure
    assert space.priced(BYTES).prices == ((58, 42),)
    assert space.prices_in(CURRENCIES["weights"]) == ((3, 2),)
    assert space.words.measured(3, 10) == pytest.approx(0.7)
