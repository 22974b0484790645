"""Offspring by what is expected: within the budget, and mostly where most is gained for least."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from evopress.errors import EvoPressError
from evopress.search.predicted import EitherMutation, PredictedSwitch
from evopress.search.sensitivity import Expected
from evopress.units import Budget


def test_what_gains_most_goes_up_and_what_loses_least_goes_down(quant_space) -> None:
    space = quant_space((1,) * 8, bits=(4, 3, 2))
    values = [[0.0, weight, 3 * weight] for weight in (100.0, 1, 1, 1, 1, 1, 1, 0.001)]
    draw = PredictedSwitch(space, Budget(24, 3.0, ""), values, max_switches=1, distribution="constant")
    rng = np.random.default_rng(0)
    children = [draw((1,) * 8, rng) for _ in range(200)]
    assert all(space.cost(child) == 24 and child != (1,) * 8 for child in children)
    up, down = (Counter(child.index(level) for child in children) for level in (0, 2))
    assert up[0] > 150 and down[7] > 150 and len(up) > 1


def test_modules_and_what_lies_in_them_are_one_change(joint_space) -> None:
    values = [[0.0, 5.0]] * 2 + [[0.0, 1.0, 3.0]] * 5
    expected, genome = Expected(joint_space, values), (0, 1, 1, 2, 0, 0, 1)
    for unit, by in ((0, 1), (1, -1), (2, 1), (6, -1)):
        other = (*genome[:unit], genome[unit] + by, *genome[unit + 1 :])
        assert expected.change(genome, unit, by) == expected.of(other) - expected.of(genome)
    budget = Budget(14, 2.8, "")
    draw = PredictedSwitch(joint_space, budget, values, max_switches=3, distribution="min_uniform")
    rng = np.random.default_rng(1)
    children = [draw((0, 0, 2, 1, 1, 1, 1), rng) for _ in range(100)]
    assert all(budget.met_by(joint_space, child) for child in children)
    assert any(any(child[:2]) for child in children) and not all(any(child[:2]) for child in children)


def test_either_is_drawn_with_its_chance_and_nothing_to_draw_is_told(quant_space) -> None:
    either = EitherMutation(lambda parent, rng: (1,), lambda parent, rng: (2,), 0.25)
    rng = np.random.default_rng(0)
    assert 15 < sum(either((0,), rng) == (1,) for _ in range(100)) < 35
    space = quant_space((1,) * 2, bits=(4, 3))
    draw = PredictedSwitch(space, Budget(8, 4.0, ""), [[0.0, 1.0]] * 2, max_switches=1, distribution="constant")
    with pytest.raises(EvoPressError, match="predicted_offspring=0"):
        draw((0, 0), rng)


def test_where_the_predicted_half_finds_nothing_the_other_is_drawn() -> None:
    """Draws by gain may keep coming to a move that a further limit forbids."""

    def nothing(parent, rng):
        raise EvoPressError("offspring by expected gain found no other genome")

    either = EitherMutation(nothing, lambda parent, rng: (2,), 0.5)
    assert {either((0,), np.random.default_rng(seed)) for seed in range(8)} == {(2,)}
    with pytest.raises(EvoPressError, match="found no other genome"):
        EitherMutation(lambda parent, rng: (1,), nothing, 0.0)((0,), np.random.default_rng(0))
