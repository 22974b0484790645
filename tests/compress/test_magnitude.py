import pytest
import torch

from evopress.compress.magnitude import Magnitude, magnitude


def test_keeps_the_largest_of_the_whole_unit_unchanged():
    W = torch.tensor([[3.0, -1.0, 0.5], [-4.0, 2.0, 0.1]])
    results = magnitude({"w": W}, torch.eye(3), {"w": [6, 3, 1, 0]})["w"]
    assert [result.payload.decode().tolist() for result in results] == [
        W.tolist(),
        [[3.0, 0.0, 0.0], [-4.0, 2.0, 0.0]],
        [[0.0, 0.0, 0.0], [-4.0, 0.0, 0.0]],
        [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]],
    ]
    assert results[1].error == pytest.approx((1 + 0.25 + 0.01) / (9 + 1 + 0.25 + 16 + 4 + 0.01))
    assert [results[0].error, results[3].error] == [0.0, pytest.approx(1.0)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_levels_keep_exact_counts_with_ties(dtype):
    W = torch.full((7, 11), -0.5, dtype=dtype)
    compressor = Magnitude(sparsity=0.6, step=5, dtype_bits=dtype.itemsize * 8)
    results = compressor.compress({"w": W}, torch.eye(11))["w"]
    assert [int((r.payload.decode() != 0).sum()) for r in results] == list(compressor.kept(77))
    assert [level.cost for level in compressor.levels((7, 11))] == list(compressor.kept(77))


def test_the_choice_ignores_the_inputs():
    W = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    one = magnitude({"w": W}, torch.eye(8), {"w": [20]})["w"][0]
    other = magnitude({"w": W}, torch.diag(torch.arange(1.0, 9.0)), {"w": [20]})["w"][0]
    assert torch.equal(one.payload.decode(), other.payload.decode())
    assert one.error != other.error
