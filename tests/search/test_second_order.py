"""What levels change to second order: certain changes are kept, noise is drawn towards what the sensitivities say."""

from __future__ import annotations

import math

import numpy as np
import pytest

from evopress.search.second_order import second_order_values

EXPECTED = [[0.01, 0.04, 0.16], [0.02, 0.08, 0.32], [0.01, 0.04, 0.16], [0.03, 0.12, 0.48]]
GENOME = (1, 1, 1, 1)


@pytest.fixture
def space(quant_space):
    return quant_space((1,) * 4, bits=(4, 3, 2), kinds=("q",) * 4)


def told() -> np.ndarray:
    return np.array([[held - of_unit[1] for held in of_unit] for of_unit in EXPECTED])


def test_what_is_certain_is_kept(space) -> None:
    certain = told() * np.array([[1.5], [0.5], [-1.0], [2.0]])
    values = second_order_values(space, GENOME, np.tile(certain, (4, 1, 1)), EXPECTED)
    assert np.allclose(values, certain)


def test_noise_is_drawn_towards_what_was_expected(space) -> None:
    rng = np.random.default_rng(0)
    noise = 0.2 * rng.normal(size=(64, 4, 3)) * np.abs(told())
    noise[:, :, 1] = 0.0
    values = np.array(second_order_values(space, GENOME, told() + noise, EXPECTED))
    assert bool((values[:, 1] == 0).all())
    assert float(np.square(values - told()).sum()) < 0.3 * float(np.square(noise.mean(axis=0)).sum())


@pytest.mark.parametrize("seed", range(3))
def test_shrinkage_is_by_the_variance_of_rests_beyond_their_errors(space, seed) -> None:
    rng = np.random.default_rng(seed)
    expanded = told() * rng.lognormal(size=(4, 1)) + 0.02 * rng.normal(size=(6, 4, 3))
    values = second_order_values(space, GENOME, expanded, EXPECTED)
    for level in (0, 2):
        scales = [(EXPECTED[unit][level] + EXPECTED[unit][1]) / 2 for unit in range(4)]
        rests = [(float(np.mean(expanded[:, unit, level])) - told()[unit, level]) / scales[unit] for unit in range(4)]
        errors = [float(np.var(expanded[:, unit, level], ddof=1)) / 6 / scales[unit] ** 2 for unit in range(4)]
        spread = max(sum(r * r - e for r, e in zip(rests, errors, strict=True)) / 4, 0.05 * sum(errors) / 4)
        for unit in range(4):
            expected = told()[unit, level] + scales[unit] * rests[unit] * spread / (spread + errors[unit])
            assert values[unit][level] == pytest.approx(expected, rel=1e-9)


def test_what_is_not_known_is_what_was_expected(space) -> None:
    expanded = np.zeros((2, 4, 3))
    expanded[:, 2] = math.nan
    values = second_order_values(space, GENOME, expanded, EXPECTED)
    assert values[2] == pytest.approx(told()[2].tolist())


def test_levels_without_any_error_change_nothing(space) -> None:
    expected = [[0.0, 0.0, 0.1], *EXPECTED[1:]]
    values = second_order_values(space, GENOME, np.zeros((2, 4, 3)), expected)
    assert values[0][:2] == [0.0, 0.0] and all(math.isfinite(value) for of_unit in values for value in of_unit)
