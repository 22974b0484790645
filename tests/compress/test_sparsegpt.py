from dataclasses import replace

import numpy as np
import pytest
import torch
from sparsegpt_literal import sparsegpt_literal
from torch import Tensor

from evopress.compress.hessian import HessianSum, SingularHessianError, inverse_factor
from evopress.compress.magnitude import magnitude
from evopress.compress.sparsegpt import SparseGPT, sparsegpt, sweep
from evopress.compress.wanda import wanda
from evopress.errors import EvoPressError


def inputs(columns: int, *, seed: int = 0, tokens: int = 200, rank: int = 8) -> Tensor:
    """Draw correlated activations [4, tokens, C]: a few directions carry most, columns of unequal strength."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(4 * tokens, rank, generator=generator) @ torch.randn(rank, columns, generator=generator)
    X += 0.5 * torch.randn(4 * tokens, columns, generator=generator)
    return (X * torch.rand(columns, generator=generator).add(0.2)).reshape(4, tokens, columns)


def hessian(X: Tensor) -> Tensor:
    accumulated = HessianSum(X.shape[-1])
    accumulated.add(X)
    return accumulated.result()


def weight(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(100 + seed)) * 0.1


@pytest.mark.parametrize("block_size", [16, 10, 64])
def test_every_level_of_a_stacked_sweep_equals_the_literal_version(block_size):
    H = hessian(inputs(40))
    weights = {"a": weight(12, 40), "b": weight(5, 40, seed=1)}
    compressor = SparseGPT(sparsity=0.6, step=24, num_levels=5, block_size=block_size, dtype_bits=32)
    results = compressor.compress(weights, H)
    for name, W in weights.items():
        kept = compressor.kept(W.numel())
        assert len(results[name]) == len(kept) > 5
        for count, result in zip(kept, results[name], strict=True):
            expected, mask = sparsegpt_literal(W.numpy(), H.numpy(), count, block_size=block_size)
            np.testing.assert_array_equal(result.payload.mask.numpy(), mask)
            np.testing.assert_allclose(result.payload.decode().numpy(), expected, atol=1e-5, rtol=1e-5)


def test_the_lazy_sweep_equals_the_literal_version_over_several_runs_and_blocks():
    H = hessian(inputs(75, seed=3)).double()
    W = weight(6, 75, seed=3).double()
    U, _ = inverse_factor(H, damping=0.01)
    Wt = torch.cat([W, W]).T.contiguous()
    mask = sweep(Wt, U, [6, 6], [200, 97], block_size=32)
    for part, kept in ((slice(0, 6), 200), (slice(6, 12), 97)):
        expected, expected_mask = sparsegpt_literal(W.numpy(), H.numpy(), kept, block_size=32)
        np.testing.assert_array_equal(mask[:, part].T.numpy(), expected_mask)
        np.testing.assert_allclose(Wt[:, part].T.numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("kind", ["random", "constant", "zero", "few values"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_level_keeps_exactly_what_it_says(kind, dtype):
    W = {
        "random": weight(9, 50),
        "constant": torch.full((9, 50), 0.25),
        "zero": torch.zeros(9, 50),
        "few values": weight(9, 50).sign() * 0.5,
    }[kind].to(dtype)
    kept = [450, 449, 300, 225, 101, 1, 0]
    H = torch.eye(50) if kind == "constant" else hessian(inputs(50))
    for count, result in zip(kept, sparsegpt({"w": W}, H, {"w": kept}, block_size=16)["w"], strict=True):
        assert int(result.payload.mask.sum()) == result.payload.values.numel() == count
        decoded = result.payload.decode()
        assert decoded.dtype == dtype
        assert not bool(decoded[~result.payload.mask].any())


def test_sparsity_0_is_the_weight_bit_for_bit_and_sparsity_1_is_zero():
    W = weight(8, 24).to(torch.bfloat16)
    W[0, 0] = -0.0
    H = hessian(inputs(24))
    H[5], H[:, 5] = 0.0, 0.0  # even where a column is never active
    full, empty = sparsegpt({"w": W}, H, {"w": [W.numel(), 0]})["w"]
    assert torch.equal(full.payload.decode().view(torch.int16), W.view(torch.int16))
    assert full.error == 0.0
    assert torch.equal(empty.payload.decode(), torch.zeros_like(W))
    assert empty.error == pytest.approx(1.0)


def test_never_active_columns_are_pruned_first_and_counts_stay_exact():
    X = inputs(32)
    X[..., [3, 20]] = 0.0
    W = weight(10, 32)
    kept = [310, 300, 290, 40]
    for count, result in zip(kept, sparsegpt({"w": W}, hessian(X), {"w": kept}, block_size=16)["w"], strict=True):
        mask = result.payload.mask
        assert int(mask.sum()) == count
        assert not bool(result.payload.decode()[:, [3, 20]].any())
        if count <= 300:  # one such column in each block of 16, and as many weights to prune
            assert not bool(mask[:, [3, 20]].any())


def test_errors_are_those_of_the_outputs():
    X = inputs(48)
    W = weight(16, 48)
    flat = X.reshape(-1, 48).double()
    for result in SparseGPT(sparsity=0.5, step=90, num_levels=3, dtype_bits=32).compress({"w": W}, hessian(X))["w"]:
        direct = ((W.double() - result.payload.decode().double()) @ flat.T).square().sum() / (W.double() @ flat.T).square().sum()
        assert result.error == pytest.approx(float(direct), rel=1e-4)
        assert result.damping == 0.01


def test_error_grows_with_sparsity_and_stays_below_wanda_and_wanda_below_magnitude():
    kept = [1600, 1024, 640]
    errors = {"sparsegpt": np.zeros(3), "wanda": np.zeros(3), "magnitude": np.zeros(3)}
    for seed in range(6):
        H = hessian(inputs(64, seed=seed))
        W = {"w": weight(32, 64, seed)}
        for name, prune in (("sparsegpt", sparsegpt), ("wanda", wanda), ("magnitude", magnitude)):
            errors[name] += [result.error for result in prune(W, H, {"w": kept})["w"]]
    for values in errors.values():
        assert values[0] < values[1] < values[2]
    assert (errors["sparsegpt"] < 0.7 * errors["wanda"]).all()
    assert (errors["wanda"] < 0.95 * errors["magnitude"]).all()


def test_slices_change_nothing_beyond_rounding():
    H = hessian(inputs(40))
    weights = {"a": weight(12, 40), "b": weight(7, 40, seed=1)}
    whole = SparseGPT(sparsity=0.5, step=40, num_levels=3, dtype_bits=32)
    for slice_bytes in (1, 40 * 5 * 30):
        sliced = replace(whole, slice_bytes=slice_bytes).compress(weights, H)
        for name, results in whole.compress(weights, H).items():
            for one, other in zip(results, sliced[name], strict=True):
                assert torch.equal(one.payload.mask, other.payload.mask)
                torch.testing.assert_close(one.payload.values, other.payload.values, atol=1e-6, rtol=1e-5)
    assert replace(whole, slice_bytes=1).settings() == whole.settings()


def test_weights_and_hessian_are_left_as_they_are():
    H, W = hessian(inputs(24)), weight(6, 24)
    H[4], H[:, 4] = 0.0, 0.0
    before = H.clone(), W.clone()
    sparsegpt({"w": W}, H, {"w": [70]})
    assert torch.equal(H, before[0]) and torch.equal(W, before[1])


@pytest.mark.parametrize(
    ("changed", "message"), [({"damping": 0.0}, "damping"), ({"block_size": 0}, "block_size"), ({"sparsity": 1.2}, "sparsity=1.2")]
)
def test_settings_out_of_range_are_refused(changed, message):
    with pytest.raises(EvoPressError, match=message):
        SparseGPT(**({"sparsity": 0.5, "step": 10} | changed))


def test_bad_input_is_named():
    H = hessian(inputs(8))
    with pytest.raises(EvoPressError, match="cannot keep 33"):
        sparsegpt({"w": weight(4, 8)}, H, {"w": [33]})
    with pytest.raises(EvoPressError, match="weight of w is not finite"):
        sparsegpt({"w": weight(4, 8) * float("inf")}, H, {"w": [3]})
    with pytest.raises(SingularHessianError):
        sparsegpt({"w": weight(4, 8)}, -H, {"w": [3]})
