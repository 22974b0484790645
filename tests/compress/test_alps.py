"""Masks and values found together: step by step those of the literal version, exact counts, and better than a sweep's."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from alps_literal import alps_literal
from torch import Tensor

from evopress.compress import alps
from evopress.compress.alps import regularized, walk
from evopress.compress.hessian import HessianSum, SingularHessianError, damp
from evopress.compress.sparse import PruneTo
from evopress.compress.sparsegpt import SparseGPT, alps_levels, sparsegpt
from evopress.errors import EvoPressError


def hessian(columns: int, *, seed: int = 0, dead: tuple[int, ...] = ()) -> Tensor:
    """Accumulate correlated activations: a few directions carry most, columns of unequal strength."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(800, 8, generator=generator) @ torch.randn(8, columns, generator=generator)
    X += 0.5 * torch.randn(800, columns, generator=generator)
    X *= torch.rand(columns, generator=generator).add(0.2)
    X[:, list(dead)] = 0.0
    accumulated = HessianSum(columns)
    accumulated.add(X.reshape(4, 200, columns))
    return accumulated.result()


def weight(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(100 + seed)) * 0.1


def best_values(W: Tensor, H: Tensor, mask: Tensor) -> Tensor:
    """Solve the normal equations of each row on its mask."""
    V = torch.zeros_like(W)
    for row, kept in enumerate(mask):
        V[row, kept] = torch.linalg.solve(H[kept][:, kept], (H @ W[row])[kept])
    return V


@pytest.mark.parametrize("dead", [(), (3, 20)])
def test_every_level_equals_the_literal_version(dead: tuple[int, ...]) -> None:
    H = hessian(40, dead=dead)
    weights = {"a": weight(12, 40), "b": weight(5, 40, seed=1)}
    compressor = SparseGPT(sparsity=0.6, step=24, num_levels=3, dtype_bits=32, recipe="best")
    results = compressor.compress(weights, H)
    for name, W in weights.items():
        kept = compressor.kept(W.numel())
        for result, (expected, mask) in zip(results[name], alps_literal(W.numpy(), H.numpy(), list(kept)), strict=True):
            np.testing.assert_array_equal(result.payload.mask.numpy(), mask)
            np.testing.assert_allclose(result.payload.decode().numpy(), expected, atol=1e-5, rtol=1e-4)


def test_uncorrelated_inputs_leave_the_largest_contributions_as_they_are() -> None:
    diagonal = torch.linspace(0.5, 4.0, 24)
    W = weight(100, 24)
    contributions = W.square() * diagonal
    for count in (1200, 720):
        [(pruned, mask)] = walk(W, *regularized(torch.diag(diagonal)), [count])
        assert torch.equal(mask, contributions >= contributions.flatten().sort().values[-count])
        least = contributions[~mask].sum()
        assert least <= ((W - pruned).square() * diagonal).sum() < 1.002 * least


def test_errors_are_below_a_sweeps_at_every_level() -> None:
    kept = [1600, 1300, 1024, 800, 640, 400]
    ratios = []
    for seed in range(6):
        H, W = hessian(64, seed=seed), weight(32, 64, seed)
        swept = sparsegpt({"w": W}, H, {"w": kept})["w"]
        found = alps_levels({"w": W}, H, {"w": kept})["w"]
        ratios.append([one.error / other.error for one, other in zip(found, swept, strict=True)])
    assert np.mean(ratios, axis=0).max() < 0.8
    assert np.max(ratios) < 1.0


def test_a_mask_settles_where_no_single_exchange_with_refitted_values_helps_much() -> None:
    """Of all exchanges of one kept weight of a row for a pruned one, none takes more than a few hundredths of its error away."""
    H, W = hessian(10, seed=5).double(), weight(4, 10, seed=5).double()
    damped, _ = damp(H, damping=0.01)
    [(_, mask)] = walk(W, *regularized(damped), [20])

    def energy(mask: Tensor) -> float:
        E = W - best_values(W, damped, mask)
        return float(((E @ damped) * E).sum())

    reached = energy(mask)
    lowest = reached
    for row in range(4):
        for out in mask[row].nonzero().flatten():
            for into in (~mask[row]).nonzero().flatten():
                exchanged = mask.clone()
                exchanged[row, out], exchanged[row, into] = False, True
                lowest = min(lowest, energy(exchanged))
    assert lowest > 0.9 * reached


@pytest.mark.parametrize("kind", ["random", "constant", "zero", "few values"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_level_keeps_exactly_what_it_says(kind: str, dtype: torch.dtype) -> None:
    W = {
        "random": weight(9, 50),
        "constant": torch.full((9, 50), 0.25),
        "zero": torch.zeros(9, 50),
        "few values": weight(9, 50).sign() * 0.5,
    }[kind].to(dtype)
    kept = [225, 450, 449, 101, 300, 1, 0, 225]
    H = torch.eye(50) if kind == "constant" else hessian(50)
    for count, result in zip(kept, alps_levels({"w": W}, H, {"w": kept})["w"], strict=True):
        assert int(result.payload.mask.sum()) == result.payload.values.numel() == count
        decoded = result.payload.decode()
        assert decoded.dtype == dtype
        assert not bool(decoded[~result.payload.mask].any())


def test_whole_weights_come_back_bit_for_bit_and_never_active_columns_go_first() -> None:
    W = weight(10, 32).to(torch.bfloat16)
    W[0, 0] = -0.0
    H = hessian(32, dead=(3, 20))
    full, all_but_dead, half, empty = alps_levels({"w": W}, H, {"w": [320, 299, 160, 0]})["w"]
    assert torch.equal(full.payload.decode().view(torch.int16), W.view(torch.int16)) and full.error == 0.0
    # 20 weights of never-active columns and the zero are as good as pruned.
    assert not bool(all_but_dead.payload.mask[:, [3, 20]].any()) and not bool(half.payload.mask[:, [3, 20]].any())
    assert not bool(empty.payload.decode().any()) and empty.error == pytest.approx(1.0)


def test_other_units_and_the_order_of_counts_change_nothing() -> None:
    H, weights = hessian(40), {"a": weight(12, 40), "b": weight(7, 40, seed=1)}
    together = alps_levels(weights, H, {"a": [300, 200, 100], "b": [90]})
    alone = alps_levels({"a": weights["a"]}, H, {"a": [100, 300, 200]})
    for i, j in ((0, 1), (1, 2), (2, 0)):
        assert torch.equal(together["a"][i].payload.values, alone["a"][j].payload.values)
        assert torch.equal(together["a"][i].payload.mask, alone["a"][j].payload.mask)


def test_a_single_level_is_as_good_as_one_on_the_way() -> None:
    for seed in range(4):
        H, W = hessian(64, seed=seed), weight(32, 64, seed)
        [alone] = alps_levels({"w": W}, H, {"w": [640]})["w"]
        on_the_way = alps_levels({"w": W}, H, {"w": [800, 720, 640]})["w"][-1]
        assert alone.error == pytest.approx(on_the_way.error, rel=0.1)


def test_inverses_are_those_of_the_scaled_hessian_and_inputs_are_left_as_they_are() -> None:
    H, W = hessian(24), weight(6, 24)
    before = H.clone(), W.clone()
    scale, inverses = regularized(H)
    for rho, inverse in inverses.items():
        scaled = H.double() / torch.outer(scale, scale)
        torch.testing.assert_close(inverse.double() @ (scaled + rho * torch.eye(24)), torch.eye(24).double(), atol=1e-4, rtol=0)
    assert set(inverses) == {alps.WALK, *alps.FINISH}
    list(walk(W, scale, inverses, [70, 40]))
    alps_levels({"w": W}, H, {"w": [70]})
    assert torch.equal(H, before[0]) and torch.equal(W, before[1])


def test_settings_of_the_papers_recipe_are_those_from_before_there_were_recipes() -> None:
    paper = SparseGPT(sparsity=0.6, step=24, num_levels=3, dtype_bits=32)
    assert paper.settings() == {
        "sparsity": 0.6,
        "step": 24,
        "num_levels": 3,
        "dtype_bits": 32,
        "damping": 0.01,
        "block_size": 128,
        "compressor": "sparsegpt",
        "numerics": 1,
    }
    best = replace(paper, recipe="best")
    assert best.settings()["recipe"] == "best"
    assert best.settings() == replace(best, block_size=64).settings()
    assert PruneTo(pruner=best, kept={}).settings()["recipe"] == "best"
    with pytest.raises(EvoPressError, match=r"method\.recipe=worst is unknown: choose paper or best"):
        replace(paper, recipe="worst")


def test_bad_input_is_named_and_indefinite_hessians_are_damped_more_or_refused() -> None:
    H = hessian(8)
    with pytest.raises(EvoPressError, match="cannot keep 33"):
        alps_levels({"w": weight(4, 8)}, H, {"w": [33]})
    with pytest.raises(EvoPressError, match="weight of w is not finite"):
        alps_levels({"w": weight(4, 8) * float("inf")}, H, {"w": [3]})
    with pytest.raises(SingularHessianError):
        alps_levels({"w": weight(4, 8)}, -H, {"w": [3]})
    indefinite = torch.eye(8)
    indefinite[0, 1] = indefinite[1, 0] = 1.05
    [level] = alps_levels({"w": weight(4, 8)}, indefinite, {"w": [16]})["w"]
    assert level.damping == pytest.approx(0.1)
