"""Levels that are GGUF's types: decoded by the gguf package, found by descent as its literal twin does, better than rounding."""

from __future__ import annotations

import gguf
import gguf_levels_literal as literal
import pytest
import torch
from torch import Tensor

from evopress.compress.gguf_fit import Limits, Parts, block_order, descend_parts, fit_types
from evopress.compress.gguf_levels import GGUFLevels, GGUFWeight
from evopress.compress.gguf_types import GGUF_TYPES, GGUFType
from evopress.compress.gptq import GPTQ, Dense
from evopress.compress.hessian import inverse_factor
from evopress.errors import EvoPressError
from evopress.levels.codec import CODECS, check_meta


def layer(columns: int, rows: int = 24, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return a weight with a few outliers, and the Hessian of correlated inputs of unequal energy, one of them never active."""
    rng = torch.Generator().manual_seed(seed)
    X = torch.randn(4 * columns, columns, generator=rng)
    X = X @ (torch.eye(columns) + 0.1 * torch.randn(columns, columns, generator=rng)) * torch.rand(columns, generator=rng).exp()
    X[:, 5] = 0.0
    W = torch.randn(rows, columns, generator=rng) * 0.02
    return W * (1.0 + 4.0 * (torch.rand(W.shape, generator=rng) > 0.99)), X.T @ X


def relative(W: Tensor, H: Tensor, decoded: Tensor) -> float:
    E = W - decoded
    return float(torch.trace(E @ H @ E.T) / torch.trace(W @ H @ W.T))


EVERY = GGUFLevels(tuple(GGUF_TYPES))


def test_levels_of_256_are_k_types_and_all_decode_as_gguf_says() -> None:
    W, H = layer(256)
    levels, results = EVERY.levels((24, 256)), EVERY.compress({"a": W, "b": W[:7].to(torch.bfloat16)}, H)
    assert [level.key for level in levels] == ["Q8_0", "Q6_K", "Q5_1", "Q5_K", "Q4_1", "Q4_K", "Q3_K", "Q2_K"]
    for name, dtype in (("a", torch.float32), ("b", torch.bfloat16)):
        errors = []
        for level, result in zip(levels, results[name], strict=True):
            payload = result.payload
            assert isinstance(payload, GGUFWeight) and payload.kind == level.key
            if name == "a":
                assert level.cost == level.stored_bits == 8 * payload.blocks.numel()
            found = gguf.quants.dequantize(payload.blocks.numpy(), gguf.GGMLQuantizationType[payload.kind])
            assert torch.equal(payload.decode(), torch.from_numpy(found).to(dtype)) and payload.decode().dtype == dtype
            errors.append(result.error)
        k_types = [errors[index] for index in (0, 1, 3, 5, 6, 7)]
        assert k_types == sorted(k_types) and errors[4] < errors[6]
    assert results["a"][0].error == pytest.approx(relative(W * (H.diagonal() > 0), H, results["a"][0].payload.decode()), rel=1e-2)


def test_rows_that_are_no_multiple_of_256_have_the_types_of_32() -> None:
    assert [level.key for level in EVERY.levels((8, 96))] == ["Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"]
    with pytest.raises(EvoPressError, match=r"none of method.levels \['Q4_K'\] fits rows of 96 weights.*: add Q4_0, which has 32"):
        GGUFLevels(("Q4_K",)).levels((8, 96))
    with pytest.raises(EvoPressError, match=r"rows of 80 .*: add dense, the weight as it is"):
        GGUFLevels(("Q4_0",)).levels((8, 80))
    assert [level.key for level in GGUFLevels(("Q4_0",), dense_bits=16).levels((8, 80))] == ["dense"]


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_the_output_error_is_a_fraction_of_rounding(name: str) -> None:
    W, H = layer(64)
    W[:, 5] = 0.0
    kind = gguf.GGMLQuantizationType[name]
    rounded = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(W.numpy(), kind), kind))
    ours = GGUFLevels((name,)).compress({"w": W}, H)["w"][0]
    assert ours.error < 0.5 * relative(W, H, rounded)


def test_k_types_have_less_error_than_our_own_grids_of_as_many_bits() -> None:
    """2.625 and 3.4375 bits with scales of 16 columns, against 2.5 and 3.5 bits with scales of 64."""
    W, H = layer(256)
    theirs = {r.payload.kind: r.error for r in GGUFLevels(("Q3_K", "Q2_K")).compress({"w": W}, H)["w"]}  # type: ignore[attr-defined]
    ours = [r.error for r in GPTQ(bits=(3, 2), group_size=64, recipe="best").compress({"w": W}, H)["w"]]
    assert theirs["Q3_K"] < ours[0] and theirs["Q2_K"] < ours[1]


def of_row(parts: Parts, row: int, of: GGUFType) -> dict[str, list[float]]:
    """Return the numbers of a row as the literal twin has them."""
    steps, *rest = (numbers[:, row] for numbers in vars(parts).values())
    return dict(
        zip(
            ("codes", "d", "dmin", "scales", "mins"), ((steps + of.offset).tolist(), *(each.tolist() for each in rest)), strict=True
        )
    )


@pytest.mark.parametrize("name", ["Q2_K", "Q3_K", "Q4_1", "Q5_0"])
def test_descent_is_its_literal_twin_and_raises_no_row(name: str) -> None:
    of = GGUF_TYPES[name]
    columns = of.width if of.part else 2 * of.width
    W, H = layer(columns, rows=2, seed=3)
    Wt, H = W.T.double().contiguous(), H.double()
    rng = torch.Generator().manual_seed(4)

    def drawn(low: int, high: int, count: int) -> Tensor:
        return torch.randint(low, high + 1, (count, 2), generator=rng).double()

    blocks, parts = columns // of.width, columns // of.width * of.parts
    d = torch.full((blocks, 2), 0.08 / of.maxq / max(of.scales[1] // 2, 1), dtype=torch.float64).half().double()
    dmin = torch.full((blocks, 2), 0.04 / max(of.mins[1] // 2, 1) if of.mins[1] else 0.0, dtype=torch.float64).half().double()
    scales = drawn(max(of.scales[1] // 4, 1), of.scales[1], parts)
    start = Parts(drawn(0, of.maxq, columns) - of.offset, d, dmin, scales, drawn(of.mins[1] // 2, of.mins[1], parts))
    found = Parts(*(numbers.clone() for numbers in vars(start).values()))
    limits = Limits([of], torch.zeros(2, dtype=torch.int64), dtype=torch.float64)
    descend_parts(Wt, H, found, limits, tolerance=0.05, max_passes=3)

    def energies(numbers: Parts) -> Tensor:
        E = Wt - numbers.values()
        return torch.linalg.vecdot(E, H @ E, dim=0)

    assert bool((energies(found) < 0.5 * energies(start)).all())
    for row in range(2):
        numbers = of_row(start, row, of)
        literal.descend(Wt[:, row], H, numbers, of, tolerance=0.05, max_passes=3)
        assert of_row(found, row, of) == numbers


@pytest.mark.parametrize(
    "names", [("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"), ("Q6_K", "Q3_K", "Q2_K"), ("Q5_K", "Q4_K")], ids=lambda names: names[-1]
)
def test_types_that_are_swept_together_are_those_of_a_literal_sweep_of_each(names: tuple[str, ...]) -> None:
    types = [GGUF_TYPES[name] for name in names]
    W, H = layer(256, rows=2, seed=3)
    order = block_order(H.diagonal(), types[0])
    W, H = W[:, order], H[order][:, order]
    U, _ = inverse_factor(H, damping=0.01)
    every = fit_types(W.T, H, U, types, max_passes=0)
    for of, found in zip(types, every, strict=True):
        for row in range(2):
            assert of_row(found, row, of) == literal.sweep(W[row].double(), U.double(), of), (of.name, row)


def test_blocks_and_their_parts_stay_together() -> None:
    of = GGUF_TYPES["Q4_K"]
    order = block_order(torch.rand(1024, generator=torch.Generator().manual_seed(0)), of)
    assert sorted(order.tolist()) == list(range(1024)) and order.tolist() != list(range(1024))
    for width in (of.width, of.part):
        assert all(len(set((piece // width).tolist())) == 1 for piece in order.split(width))


def test_a_weight_on_a_types_grid_stays_as_it_is() -> None:
    """The default model's weights were stored as Q4_1, and are worth no more than that."""
    rng = torch.Generator().manual_seed(1)
    of = GGUF_TYPES["Q4_1"]
    codes = torch.randint(16, (8, 64), generator=rng).float()
    codes[:, ::32], codes[:, 1::32] = 0.0, 15.0
    W = codes * 2.0**-7 - 0.0625
    result = GGUFLevels((of.name,)).compress({"w": W}, torch.eye(64))["w"][0]
    assert result.error == 0.0 and torch.equal(result.payload.decode(), W)


def test_zeros_slices_and_one_level_of_each() -> None:
    W, H = layer(256)
    W[3] = 0.0
    compressor = GGUFLevels(("Q4_K", "Q2_K"), dense_bits=32)
    whole = compressor.compress({"w": W}, H)["w"]
    assert isinstance(whole[0].payload, Dense) and all(not result.payload.decode()[3].any() for result in whole)
    narrow = compressor.narrowed({"w": compressor.levels((24, 256))[2], "v": compressor.levels((24, 256))[0]})
    one = narrow.compress({"w": W, "v": W}, H)
    assert torch.equal(one["w"][0].payload.decode(), whole[2].payload.decode()) and isinstance(one["v"][0].payload, Dense)
    cut = GGUFLevels(compressor.types, dense_bits=32, slice_bytes=10 * (256 * 32 + 128 * 8)).compress({"w": W}, H)["w"]
    for a, b in zip(whole, cut, strict=True):
        assert b.error == pytest.approx(a.error, rel=0.05, abs=1e-9)


def test_the_bytes_come_back_and_meta_is_checked() -> None:
    W, H = layer(256, rows=4)
    payload = GGUFLevels(("Q3_K",)).compress({"w": W}, H)["w"][0].payload
    tensors, meta = CODECS[payload.codec].encode(payload)
    check_meta(payload.codec, meta, size=4 * 256)
    assert torch.equal(CODECS[payload.codec].decode(tensors, meta).decode(), payload.decode())
    for wrong in ({"type": "Q9"}, {"type": None}, {"shape": [8, 128]}, {"dtype": "int8"}):
        with pytest.raises(ValueError, match=r"type is|dtype is"):
            check_meta(payload.codec, {**meta, **wrong}, size=4 * 256)
    with pytest.raises(ValueError, match="blocks are"):
        CODECS[payload.codec].decode({"blocks": tensors["blocks"][:, 1:]}, meta)


def test_settings_are_checked() -> None:
    for wrong, sentence in (
        ({"types": ("Q4_9",)}, "method.levels has Q4_9, which is no type of GGUF: choose among Q2_K"),
        ({"damping": 0.0}, "method.damping 0"),
        ({"tolerance": 1.0}, "method.tolerance 1"),
        ({"block_size": 0}, "method.block_size 0"),
    ):
        with pytest.raises(EvoPressError, match=sentence):
            GGUFLevels(**{"types": ("Q4_0",), **wrong})  # type: ignore[arg-type]
