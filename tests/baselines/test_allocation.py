"""Allocators from outside the paper: their numbers against slow, obvious ones, and what they make of them."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import toy_search
from gradients_literal import first_order_plainly, fisher_plainly, kl_alone_plainly

from evopress.baselines.allocation import SEQUENCES, key_of, levels_of_weights, measured_alone
from evopress.baselines.baseline import remembered
from evopress.baselines.dynamic_programming import dynamic_programming
from evopress.baselines.first_order import FirstOrder
from evopress.baselines.fisher import Fisher
from evopress.baselines.linear_model import LinearModel, coefficient
from evopress.baselines.one_at_a_time import OneAtATime
from evopress.data.minibatch import draw_equal
from evopress.data.tokens import tokens_digest
from evopress.errors import EvoPressError
from evopress.evaluation.heldout import measure_held_out
from evopress.fitness.gradients import gradient_scores
from evopress.fitness.minibatch import base_states
from evopress.fitness.population import PopulationEvaluator
from evopress.levels.live import LiveModel
from evopress.levels.noise import NoisyLevels
from evopress.search.program import best_in
from evopress.units import Budget


class OfModel:
    """A problem of a tiny model: what `stages/baselines.py` answers, with nothing around it."""

    batch_tokens = 64

    def __init__(self, live, search_tokens, share=0.5):
        self.live, self.blocks, self.levels, self.space = live, live.blocks, live.levels, live.space
        self.search_tokens, self.rng = search_tokens, np.random.default_rng(0)
        total = round(self.space.least_cost + share * (self.space.greatest_cost - self.space.least_cost))
        self.budget = Budget(total, target=3.0, measure="bits")
        self.files, self.tokens, self.seconds = {}, 0, 0.0

    def spend(self, *, tokens, seconds=0.0):
        self.tokens, self.seconds = self.tokens + tokens, self.seconds + seconds

    def kept(self, name, about):
        return self.files.setdefault((name, str(about)), {})

    def measure(self, genomes, tokens, *, what, levels=None):
        self.spend(tokens=len(genomes) * tokens.numel())
        live = self.live if levels is None else LiveModel(self.blocks, levels)
        return measure_held_out(PopulationEvaluator(live), genomes, tokens)

    def gradient_scores(self, genome, errors_of, minibatch, score):
        self.spend(tokens=3 * minibatch.num_tokens)
        (ids,) = minibatch.tensors(self.search_tokens)
        base = base_states(PopulationEvaluator(self.live), ids, batch_tokens=4096)
        return gradient_scores(self.live, genome, errors_of, ids, base, score)

    def values(self, allocator):
        """Return the allocator's numbers, and the text that it looked at."""
        minibatch = draw_equal(
            *self.search_tokens.shape, tokens=allocator.tokens, sequences=SEQUENCES, rng=np.random.default_rng(0)
        )
        (ids,) = minibatch.tensors(self.search_tokens)
        return np.array(allocator.values(self, minibatch, ids, {})), ids


@pytest.fixture(scope="module")
def problem(live_model, tokens):
    return lambda **more: OfModel(live_model("llama", num_blocks=2), tokens(12, 16, seed=3), **more)


def test_first_order_sums_batches_of_eight_sequences(problem) -> None:
    here = problem()
    values, ids = here.values(FirstOrder(tokens=10 * 16))
    assert len(ids) == 10
    expected = np.add(*(first_order_plainly(here.live, (1,) * len(here.space), batch) for batch in (ids[:8], ids[8:])))
    assert values.shape == (14, 3) and values[:, 1] == pytest.approx(expected, rel=5e-4)


def test_fisher_scores_all_levels_at_once(problem) -> None:
    here = problem()
    values, ids = here.values(Fisher(tokens=8 * 16))
    expected = np.array(fisher_plainly(here.live, (2,) * len(here.space), ids)) / (ids.shape[1] - 1)
    assert values.shape == (14, 3) and values[:, 2] == pytest.approx(expected, rel=5e-4)
    assert here.tokens == 3 * 8 * 16


def test_one_at_a_time_measures_every_weight_alone(problem) -> None:
    here = problem()
    values, ids = here.values(OneAtATime(tokens=8 * 8))
    assert values.shape == (14, 3) and here.tokens == 14 * 3 * ids.numel()
    for unit, level in ((0, 2), (6, 1), (13, 2)):
        weight = here.levels.read(unit, level).decode()
        assert values[unit, level] == pytest.approx(kl_alone_plainly(here.live, unit, weight, ids), rel=1e-3, abs=1e-7)


def test_the_linear_model_is_fitted_to_noise_and_counts_errors_of_weights(problem) -> None:
    here, allocator = problem(), LinearModel(tokens=8 * 8, sizes=[0.02, 0.1])
    values, ids = here.values(allocator)
    noise = NoisyLevels(here.space, here.blocks, allocator.sizes, seed=int(tokens_digest(ids)[:8], 16))
    dense = [slot.weight for part in here.blocks.parts for slot in here.blocks.slots(part).values()]
    for unit in (0, 13):
        error = [float((here.levels.read(unit, level).decode() - dense[unit]).square().sum()) for level in range(3)]
        assert values[unit] / values[unit, 0] == pytest.approx(np.array(error) / error[0], rel=1e-4)
        for level, size in enumerate(allocator.sizes):
            Q = noise.read(unit, level).decode()
            assert float((Q - dense[unit]).square().sum() / dense[unit].square().sum()) == pytest.approx(size, rel=0.2)
        kls = [kl_alone_plainly(here.live, unit, noise.read(unit, level).decode(), ids) for level in (0, 1)]
        alpha = values[unit, 0] / error[0] * float(dense[unit].square().sum())
        assert alpha == pytest.approx(coefficient(allocator.sizes, kls), rel=1e-3)
    assert coefficient([0.1, 0.2], [0.05, 0.1]) == pytest.approx(0.5)
    assert coefficient([0.1, 0.2, 0.4], [0.03, 0.09, None]) == pytest.approx((0.1 * 0.03 + 0.2 * 0.09) / (0.01 + 0.04))
    assert coefficient([0.1], [None]) is None
    assert coefficient([0.1, 0.2], [0.05, math.inf]) == coefficient([0.1, 0.2], [0.05, None]), "fresh, and read back"


@pytest.mark.parametrize("allocator", [FirstOrder(64), Fisher(64), LinearModel(64), OneAtATime(64)], ids=lambda each: each.name)
def test_what_is_kept_serves_other_budgets_and_is_counted_again(problem, allocator) -> None:
    here, less = problem(), problem(share=0.2)
    ((name, genome),) = allocator.find(here).items()
    assert name == allocator.name and here.space.cost(genome) <= here.budget.total
    less.files, less.measure, less.gradient_scores = here.files, None, None
    (cheaper,) = allocator.find(less).values()
    assert less.space.cost(cheaper) <= less.budget.total < less.space.cost(genome)
    assert less.tokens == here.tokens > 0 and less.seconds > 0
    other = problem()
    other.files, other.rng = here.files, np.random.default_rng(1)
    allocator.find(other)
    assert len(here.files) == 2, "other text has numbers of its own"


def test_the_genome_is_the_integer_programs(problem) -> None:
    here, allocator = problem(), OneAtATime(64)
    (genome,) = allocator.find(here).values()
    values, _ = problem().values(allocator)
    assert genome == best_in(here.space, here.budget, values.tolist())
    assert genome == dynamic_programming(here.space, here.budget, values.tolist())


class Toy:
    """A problem whose genomes' numbers tell their levels, one that keeps what it measured."""

    def __init__(self, space):
        self.space, self.tokens, self.asked = space, 0, 0

    def spend(self, *, tokens, seconds=0.0):
        self.tokens += tokens

    def measure(self, genomes, tokens, *, what, levels=None):
        self.asked += len(genomes)
        named = [
            [unit.levels[level].key if level >= 0 else "9" for unit, level in zip(self.space.units, g, strict=True)]
            for g in genomes
        ]
        return [SimpleNamespace(kl=float(int("".join(keys).replace("keep", "1").replace("drop", "2")))) for keys in named]


@pytest.mark.parametrize("first", range(4))
def test_what_is_kept_of_single_changes_serves_runs_whose_other_modules_stay_and_no_others(first) -> None:
    joint_space = toy_search.joint_space()
    keep, drop = joint_space.units[0].levels
    spaces = [joint_space, *(with_levels(joint_space, *levels) for levels in (((keep,), None), (None, (keep,)), ((drop,), None)))]
    kept = {"0": [0.0] * 20, "schema": 1}  # of a version that did not know the genomes
    for space in (spaces[first], *spaces):
        here = Toy(space)
        there = "2" if space.units[0].levels == (drop,) else "1"
        values = measured_alone(here, None, kept)
        assert values[:2] == [[], []] and [len(of_unit) for of_unit in values[2:]] == [3] * 5
        assert values[3] == [float(f"{there}19{bits}999") for bits in (4, 3, 2)]
    assert len([key for key in kept if key.startswith("genomes") and "took" not in key]) == 2
    assert sum(levels_of_weights(joint_space)) == 15
    assert key_of(spaces[0], [(0,) * 7]) == key_of(spaces[1], [(0,) * 7]) != key_of(spaces[3], [(0,) * 7])


def with_levels(space, *levels):
    """Return a space in which the first modules have other levels."""
    units = [unit if other is None else replace(unit, levels=other) for unit, other in zip(space.units, levels, strict=False)]
    return replace(space, units=(*units, *space.units[len(units) :]))


def test_levels_that_are_not_finite_are_not_chosen_and_a_unit_without_any_is_an_error(problem, monkeypatch) -> None:
    here, allocator = problem(), OneAtATime(64)
    values = [[1.0, math.inf, None] for _ in range(14)]
    monkeypatch.setattr(OneAtATime, "values", lambda *given: values)
    assert allocator.find(here) == {}  # all at the first level take more than there is
    here.budget = Budget(here.space.greatest_cost, target=4.0, measure="bits")
    assert allocator.find(here) == {"one_at_a_time": (0,) * 14}
    values[3] = [math.nan, None, None]
    with pytest.raises(EvoPressError, match=r"found no finite number for any level of model\.layers\.0\.self_attn\.o_proj"):
        allocator.find(here)


def test_noise_is_the_same_when_it_is_read_again_and_another_for_another_unit_or_seed(problem) -> None:
    here = problem()
    one, other = (NoisyLevels(here.space, here.blocks, [0.1], seed=seed) for seed in (1, 2))
    read = one.read(0, 0).decode()
    assert torch.equal(read, one.read(0, 0).decode())
    dense = next(iter(here.blocks.slots(0).values())).weight
    assert not torch.equal(read, other.read(0, 0).decode()) and not torch.equal(read, dense)


def test_remembered_numbers_of_earlier_versions_have_no_price() -> None:
    kept = {"scores": [1.0]}
    assert remembered(None, kept, "scores", measure=None) == [1.0]  # type: ignore[arg-type]
