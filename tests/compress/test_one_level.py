"""A compressor narrowed to a level per unit makes those levels, and no other, as it would have among all."""

import pytest
import torch
from torch import Tensor

from evopress.compress.compressor import Compressor
from evopress.compress.gptq import GPTQ
from evopress.compress.magnitude import Magnitude
from evopress.compress.sparse import PruneTo
from evopress.compress.sparsegpt import SparseGPT
from evopress.compress.wanda import Wanda

NUMBERS = {"sparsity": 0.5, "step": 20, "num_levels": 2, "dtype_bits": 32}
COMPRESSORS = [
    GPTQ(bits=(4, 3, 2), group_size=8),
    GPTQ(bits=(3, 2), group_size=8, group_sizes={2: 4}, recipe="best", dense_bits=32),
    SparseGPT(**NUMBERS),
    Wanda(**NUMBERS),
    Magnitude(**NUMBERS),
]


def problem() -> tuple[dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(64, 16, generator=generator) @ torch.randn(16, 16, generator=generator)
    return {name: torch.randn(6, 16, generator=generator) for name in "abc"}, X.T @ X / 32


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=lambda compressor: type(compressor).__name__)
def test_each_unit_is_made_at_its_own_level_alone(compressor: Compressor) -> None:
    weights, H = problem()
    levels = compressor.levels((6, 16))
    places = dict(zip(weights, (2, 0, 2), strict=True))
    narrowed = compressor.narrowed({name: levels[place] for name, place in places.items()})
    every, one = compressor.compress(weights, H), narrowed.compress(weights, H)
    assert list(one) == list(weights)
    for name, place in places.items():
        assert [level.cost for level in narrowed.levels((6, 16), unit=name)] == [levels[place].cost]
        (made,) = one[name]
        torch.testing.assert_close(made.payload.decode(), every[name][place].payload.decode(), rtol=1e-4, atol=1e-5)
        assert made.error == pytest.approx(every[name][place].error, rel=1e-3)
        assert not torch.equal(made.payload.decode(), every[name][1].payload.decode())


def test_what_is_narrowed_can_be_narrowed_further() -> None:
    weights, H = problem()
    for compressor in (GPTQ(bits=(4, 2), group_size=8), PruneTo(pruner=SparseGPT(**NUMBERS), kept=dict.fromkeys("abc", (60, 40)))):
        low = compressor.levels((6, 16), unit="a")[1]
        once = compressor.narrowed(dict.fromkeys("abc", low))
        twice = once.narrowed({"b": low})
        found = twice.compress({"b": weights["b"]}, H)["b"]
        assert torch.equal(found[0].payload.decode(), once.compress({"b": weights["b"]}, H)["b"][0].payload.decode())
        assert once.settings() != compressor.settings()
