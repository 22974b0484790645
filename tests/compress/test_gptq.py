from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gptq_literal import gptq_literal, relative_error, round_to_nearest
from torch import Tensor

from evopress.compress.gptq import GPTQ, sweep, whole_range
from evopress.compress.hessian import SingularHessianError, inverse_factor
from evopress.errors import EvoPressError

BITS = (6, 5, 4, 3, 2)


def correlated(columns: int, *, rows: int = 512, rank: int = 6, seed: int = 0, noise: float = 0.3) -> Tensor:
    """Draw strongly correlated activations [n, l, C], n = 4 sequences, columns of unequal strength."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(rows, rank, generator=generator) @ torch.randn(rank, columns, generator=generator)
    X = (X + noise * torch.randn(rows, columns, generator=generator)) * torch.rand(columns, generator=generator).add(0.2)
    return X.reshape(4, -1, columns)


def hessian(X: Tensor) -> Tensor:
    rows = X.reshape(-1, X.shape[-1])
    return rows.T @ rows * (2.0 / len(X))


def weight(rows: int, columns: int, *, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(100 + seed)) * 0.1


@pytest.fixture(scope="module")
def H() -> Tensor:
    return hessian(correlated(96))


@pytest.mark.parametrize("group_size", [16, 32, None])
def test_uncorrelated_inputs_give_rounding_to_the_grid(group_size):
    W = weight(24, 64)
    results = GPTQ(bits=BITS, group_size=group_size).compress({"w": W}, torch.eye(64))["w"]
    for bits, result in zip(BITS, results, strict=True):
        expected = round_to_nearest(W, bits=bits, group_size=group_size or 64)
        assert torch.equal(result.payload.decode(), expected)
        assert result.error == pytest.approx(float((W - expected).square().sum() / W.square().sum()), rel=1e-5)


@pytest.mark.parametrize("bits", BITS)
def test_correlated_inputs_are_served_better_than_by_rounding(bits, H):
    W = weight(32, 96)
    result = GPTQ(bits=(bits,), group_size=16).compress({"w": W}, H)["w"][0]
    assert result.error < 0.6 * relative_error(round_to_nearest(W, bits=bits, group_size=16), W, H)


# Float32 scales where results are compared closely: a scale on the boundary between two float16 numbers may fall to either side.


@pytest.mark.parametrize("scale_dtype", ["float32", "float16"])
@pytest.mark.parametrize("group_size", [8, 16, 24, 32, 48, None])
def test_the_sweep_equals_the_literal_algorithm(group_size, scale_dtype, H):
    W = weight(20, 96)
    results = GPTQ(bits=BITS, group_size=group_size, block_size=32, scale_dtype=scale_dtype).compress({"w": W}, H)["w"]
    for bits, result in zip(BITS, results, strict=True):
        literal = gptq_literal(W, H, bits=bits, group_size=group_size or 96, scale_dtype=getattr(torch, scale_dtype))
        same = torch.isclose(result.payload.decode(), literal.float(), rtol=1e-4, atol=1e-6)
        # The literal one runs in float64: a weight that lies on a rounding boundary in float32 may fall to the other side.
        assert same.float().mean() > (0.99 if scale_dtype == "float32" else 0.95)
        assert result.error == pytest.approx(relative_error(literal, W, H), rel=1e-2)


@pytest.mark.parametrize("group_size", [16, 24, None])
@pytest.mark.parametrize("slice_bytes", [10_000, 2**28])
def test_one_stacked_sweep_equals_one_sweep_per_unit_and_level(group_size, slice_bytes, H):
    bit_widths = (5, 3, 2)
    weights = {"q": weight(12, 96, seed=1), "k": weight(3, 96, seed=2), "v": weight(7, 96, seed=3)}
    one = GPTQ(bits=bit_widths, group_size=group_size, slice_bytes=slice_bytes, scale_dtype="float32")
    stacked = one.compress(weights, H)
    assert list(stacked) == list(weights)
    for name, W in weights.items():
        for bits, result in zip(bit_widths, stacked[name], strict=True):
            alone = replace(one, bits=(bits,), slice_bytes=2**28).compress({name: W}, H)[name][0]
            assert result.payload.bits == bits
            assert result.error == pytest.approx(alone.error, rel=1e-5)
            torch.testing.assert_close(result.payload.decode(), alone.payload.decode(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("group_size", [8, 16, 24, 48, 96])
@pytest.mark.parametrize(("block_size", "inner_size"), [(1, 1), (7, 16), (16, 16), (20, 4), (32, 16), (64, 5), (128, 128)])
def test_block_sizes_change_the_result_only_by_rounding(group_size, block_size, inner_size, H):
    W = weight(16, 96)
    maxq = torch.full((16,), 7.0)
    U, _ = inverse_factor(H, damping=0.01)

    fit = whole_range(maxq, scale_dtype=torch.float32)

    def run(block_size: int, inner_size: int) -> Tensor:
        Wt = W.T.contiguous()
        codes, scales, zeros = sweep(Wt, U, maxq, group_size, fit, block_size=block_size, inner_size=inner_size)
        return ((codes.float() - zeros.repeat_interleave(group_size, 0)) * scales.repeat_interleave(group_size, 0)).T

    changed, plain = run(block_size, inner_size), run(96, 1)
    assert torch.isclose(changed, plain, rtol=1e-4, atol=1e-6).float().mean() > 0.99
    assert relative_error(changed, W, H) == pytest.approx(relative_error(plain, W, H), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_errors_are_those_of_the_outputs(dtype):
    X = correlated(64)
    W = weight(16, 64).to(dtype)
    results = GPTQ(bits=BITS, group_size=16).compress({"w": W}, hessian(X))["w"]
    x, w = X.reshape(-1, 64).double(), W.double()
    for result in results:
        assert result.payload.decode().dtype == dtype
        outputs = (x @ (w - result.payload.decode().double()).T).square().sum() / (x @ w.T).square().sum()
        assert result.error == pytest.approx(float(outputs), rel=1e-4)
    errors = [result.error for result in results]
    assert errors == sorted(errors)


@pytest.mark.parametrize("group_size", [8, None])
def test_columns_never_active_are_zeroed_and_cost_nothing(group_size):
    X = correlated(32)
    dead = torch.zeros(32, dtype=torch.bool)
    dead[[0, 5, 16, 17, 18, 19, 20, 21, 22, 23, 31]] = True  # 16 to 23 are a whole group
    X[..., dead] = 0.0
    W = weight(8, 32)
    results = GPTQ(bits=BITS, group_size=group_size).compress({"w": W}, hessian(X))["w"]
    for result in results:
        assert (result.payload.decode()[:, dead] == 0).all()
    alive = GPTQ(bits=(4,), group_size=None).compress({"w": W[:, ~dead]}, hessian(X[..., ~dead]))["w"][0]
    if group_size is None:  # the same columns share the one scale; 0 widens no range here
        assert results[BITS.index(4)].error == pytest.approx(alive.error, rel=0.3)


def test_a_weight_that_never_sees_input_has_no_error():
    results = GPTQ(bits=(4, 2), group_size=8).compress({"w": weight(4, 16)}, torch.zeros(16, 16))["w"]
    assert [result.error for result in results] == [0.0, 0.0]
    assert all((result.payload.decode() == 0).all() for result in results)


def test_constant_groups_are_kept(H):
    W = weight(6, 96)
    W[0] = 0.0
    W[1] = 0.5
    W[2] = -0.25
    W[3, :16] = 2.0
    for result in GPTQ(bits=(8, 2, 1), group_size=16).compress({"w": W}, H)["w"]:
        decoded = result.payload.decode()
        assert torch.equal(decoded[:3], W[:3])
        assert torch.equal(decoded[3, :16], W[3, :16])


def test_far_off_narrow_groups_have_small_errors(H):
    W = weight(4, 96) * 1e-3 + 3.0
    for bits, result in zip((8, 4), GPTQ(bits=(8, 4), group_size=16).compress({"w": W}, H)["w"], strict=True):
        assert torch.isfinite(result.payload.decode()).all()
        assert result.error < 4.0**-bits


def test_inputs_are_left_as_they_are(H):
    weights = {"q": weight(4, 96), "k": weight(4, 96, seed=5)}
    H = H.clone()
    H[3], H[:, 3] = 0.0, 0.0
    before = [H.clone(), *(W.clone() for W in weights.values())]
    GPTQ(bits=(3, 2), group_size=16).compress(weights, H)
    assert all(torch.equal(a, b) for a, b in zip(before, [H, *weights.values()], strict=True))


def test_damping_that_was_used_is_recorded():
    H = torch.eye(16) * 17 / 15
    H[0, 0] = -1.0  # mean diagonal 1
    with_more = GPTQ(bits=(3, 2), group_size=8).compress({"w": weight(4, 16)}, H)["w"]
    assert [result.damping for result in with_more] == pytest.approx([10.0, 10.0])
    plain = GPTQ(bits=(3,), group_size=8, damping=0.02).compress({"w": weight(4, 16)}, torch.eye(16))["w"]
    assert plain[0].damping == 0.02


def test_a_hopeless_hessian_is_a_typed_error():
    H = torch.eye(16)
    H[0, 0] = -1000.0
    with pytest.raises(SingularHessianError):
        GPTQ(bits=(3,), group_size=8).compress({"w": weight(4, 16)}, H)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(value):
    broken = weight(4, 16)
    broken[1, 2] = value
    with pytest.raises(EvoPressError, match=r"blocks\.0\.k .*not finite"):
        GPTQ(bits=(3,), group_size=8).compress({"blocks.0.q": weight(4, 16), "blocks.0.k": broken}, torch.eye(16))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"bits": ()}, "distinct bit widths"),
        ({"bits": (2, 3)}, "descending"),
        ({"bits": (3, 3)}, "distinct"),
        ({"bits": (9, 2)}, "1 to 8"),
        ({"bits": (2, 0)}, "1 to 8"),
        ({"group_size": 0}, "group_size 0"),
        ({"damping": 0.0}, "damping 0 "),
        ({"damping": 1.0}, "damping 1 "),
        ({"damping": float("nan")}, "damping nan"),
        ({"block_size": 0}, "block_size 0"),
        ({"scale_dtype": "int8"}, "scale_dtype 'int8'"),
    ],
)
def test_bad_settings_are_one_sentence(settings, sentence):
    with pytest.raises(EvoPressError, match=sentence):
        GPTQ(**settings)


def test_a_group_size_that_does_not_divide_the_columns_is_refused_with_one_that_does():
    with pytest.raises(EvoPressError, match=r"group size 128 does not divide the 576 .*group_size=64"):
        GPTQ(group_size=128).levels((4, 576))
    with pytest.raises(EvoPressError, match="group_size=null"):
        GPTQ(group_size=128).levels((4, 9))


@pytest.mark.parametrize(("group_size", "scale_dtype"), [(16, "float16"), (8, "float32"), (None, "float16")])
def test_levels_say_what_is_stored(group_size, scale_dtype, H):
    gptq = GPTQ(bits=BITS, group_size=group_size, scale_dtype=scale_dtype)
    levels = gptq.levels((6, 96))
    assert [level.label for level in levels] == [f"{b} bits" for b in BITS]
    assert [level.cost for level in levels] == [b * 6 * 96 for b in BITS]
    for level, result in zip(levels, gptq.compress({"w": weight(6, 96)}, H)["w"], strict=True):
        payload = result.payload
        metadata = payload.scales.numel() * payload.scales.element_size() + payload.zeros.numel() * payload.zeros.element_size()
        assert level.stored_bits == level.cost + 8 * metadata
        assert payload.codes.max() < 2**payload.bits


def test_settings_hold_what_decides_the_result_and_no_more():
    gptq = GPTQ()
    assert replace(gptq, slice_bytes=1).settings() == gptq.settings()
    for change in ({"bits": (3, 2)}, {"group_size": 64}, {"damping": 0.02}, {"block_size": 64}, {"scale_dtype": "float32"}):
        assert replace(gptq, **change).settings() != gptq.settings()


# Measured with the authors' code on SmolLM2-135M, group size 64, float32 scales: relative output errors at 6, 5, 4, 3, 2 bits.
AUTHORS = {
    "model.layers.0.self_attn.q_proj": (1.1938e-5, 4.9590e-5, 2.1208e-4, 1.0312e-3, 7.1328e-3),
    "model.layers.15.mlp.down_proj": (2.6582e-4, 1.0993e-3, 4.7215e-3, 2.1838e-2, 1.2373e-1),
    "model.layers.29.mlp.up_proj": (8.7454e-5, 3.6601e-4, 1.5630e-3, 7.2343e-3, 3.8500e-2),
}


@pytest.fixture(scope="module")
def authors_inputs() -> dict[str, Tensor]:
    path = Path(__file__).parents[3] / "shared" / "reference" / "gptq_inputs.safetensors"
    if not path.is_file():
        pytest.skip(f"the authors' Hessians are not beside this repository ({path.name})")
    from safetensors.torch import load_file

    return load_file(path)


@pytest.mark.parametrize("layer", AUTHORS)
def test_real_layers_come_out_as_with_the_authors_code(layer, authors_inputs):
    W, H = authors_inputs[f"{layer}.W"], authors_inputs[f"{layer}.H"]
    results = GPTQ(bits=BITS, group_size=64).compress({layer: W}, H)[layer]
    # Ours fits the second group of 64 in each block of 128 to weights with all updates; theirs misses those of the block.
    assert [result.error for result in results] == pytest.approx(AUTHORS[layer], rel=0.05)


@pytest.mark.parametrize(("layer", "bits"), [("model.layers.29.mlp.up_proj", 2), ("model.layers.0.self_attn.q_proj", 3)])
def test_the_literal_algorithm_with_stale_groups_gives_the_authors_figures(layer, bits, authors_inputs):
    W, H = authors_inputs[f"{layer}.W"], authors_inputs[f"{layer}.H"]
    Q = gptq_literal(W, H, bits=bits, group_size=64, stale_groups=True, dtype=torch.float32)
    assert relative_error(Q, W, H) == pytest.approx(AUTHORS[layer][BITS.index(bits)], rel=2e-4)
