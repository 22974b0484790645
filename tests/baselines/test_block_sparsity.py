"""Ramps and tails: what divides sparsity over blocks beside OWL's outliers."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from evopress.baselines.alpha_pruning import TAUS, AlphaPruning, tail_exponent
from evopress.baselines.atp import TRIALS, LinearRamp
from evopress.baselines.block_sparsity import block_sparsities
from evopress.units import Budget


def problem(*weights, sparsity=0.7):
    blocks = [{f"{i}": SimpleNamespace(weight=W)} for i, W in enumerate(weights)]
    opened = SimpleNamespace(blocks=blocks, slots=blocks.__getitem__, device="cpu")
    kept: dict = {}
    budget = Budget(1, sparsity, "sparsity")
    return SimpleNamespace(blocks=opened, budget=budget, kept=lambda name, about: kept, tokens=0, spend=lambda **took: None)


def sparsities(candidate, count, *, sparsity=0.7):
    return block_sparsities(candidate.scores, [[1000]] * count, sparsity=sparsity, lambda_=candidate.lambda_)


@pytest.mark.parametrize("sparsity", [0.3, 0.7])
def test_ramps_are_arithmetic_progressions_around_the_target(sparsity) -> None:
    tried = LinearRamp(tokens=64).candidates(problem(*[torch.ones(2, 2)] * 5, sparsity=sparsity))
    assert len(tried) == TRIALS == LinearRamp.num_candidates
    for number, candidate in enumerate(tried, start=1):
        step = number / 10 * 0.3 / 2
        expected = [sparsity + (block - 2) * step for block in range(5)]
        assert sparsities(candidate, 5, sparsity=sparsity) == pytest.approx(expected)


def test_the_exponent_is_hills_estimate_from_the_peak_on() -> None:
    eigenvalues = (1 - np.random.default_rng(0).random(400)) ** (-1 / 1.5)  # p(λ) ∝ λ^-2.5 above 1
    assert tail_exponent(torch.diag(torch.from_numpy(eigenvalues).sqrt().float())) == pytest.approx(2.5, rel=0.15)
    W = torch.randn(24, 40, generator=torch.Generator().manual_seed(1))
    logs = np.sort(np.log(np.linalg.eigvalsh((W @ W.T).double().numpy())))
    edges = np.linspace(logs[0], logs[-1], 101)
    counts = [sum(low <= x < low + (edges[1] - edges[0]) for x in logs) for low in edges[:-1]]
    tail = logs[logs >= edges[int(np.argmax(counts))] - 1e-9]
    assert tail_exponent(W) == pytest.approx(1 + len(tail) / sum(x - tail[0] for x in tail), rel=1e-3)


def test_lighter_tails_are_pruned_more() -> None:
    generator = torch.Generator().manual_seed(0)
    light = torch.randn(64, 64, generator=generator)
    heavy = torch.diag(torch.linspace(0.1, 1, 64) ** -2) @ light
    tried = AlphaPruning(tokens=64).candidates(problem(light, heavy))
    assert tail_exponent(light) > tail_exponent(heavy) and len(tried) == len(TAUS)
    for tau, candidate in zip(TAUS, tried, strict=True):
        first, second = sparsities(candidate, 2)
        assert (first, second) == pytest.approx((0.7 * (1 + tau), 0.7 * (1 - tau))) if 0.7 * (1 + tau) < 1 else first > second


def test_spectra_are_not_taken_again() -> None:
    given = problem(torch.randn(8, 8), torch.eye(2))
    tried = AlphaPruning(tokens=64).candidates(given)
    assert given.kept("", {})["0"] == -tried[0].scores[0] and tried[0].scores[1] == -math.inf
    given.blocks.slots = lambda index: pytest.fail(f"block {index} is looked at again")
    given.kept("", {})["1"] = None  # as it is read from the file
    assert AlphaPruning(tokens=64).candidates(given) == tried
