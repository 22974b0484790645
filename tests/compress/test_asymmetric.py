"""Weights corrected for the inputs that they get: least squares of the outputs, and nothing where the inputs are the dense ones."""

import pytest
import torch

from evopress.compress.asymmetric import PairedSum, Seen, corrected
from evopress.errors import EvoPressError


def inputs(sequences: int = 6, tokens: int = 40, columns: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    x = torch.randn(sequences, tokens, columns, generator=random) @ torch.randn(columns, columns, generator=random)
    return x, x + 0.3 * torch.randn(x.shape, generator=random) + 0.2 * x.roll(1, -1)


@pytest.mark.parametrize("added", [False, True])
def test_it_is_the_least_squares_solution(added) -> None:
    x, compressed = inputs()
    random = torch.Generator().manual_seed(2)
    W = torch.randn(5, 24, generator=random)
    lost = torch.randn(6, 40, 5, generator=random) + compressed[..., :5] if added else torch.zeros(6, 40, 5)
    total = PairedSum()
    for part in (slice(0, 2), slice(2, 6)):
        stream = (lost[part], torch.zeros_like(lost[part])) if added else (None, None)
        total.add(Seen(x[part], stream[0]), Seen(compressed[part], stream[1]))
    rows = compressed.reshape(-1, 24).double()
    outputs = x.reshape(-1, 24).double() @ W.T.double() + lost.reshape(-1, 5).double()
    best = torch.linalg.lstsq(rows, outputs).solution.T
    found = corrected(W, total.result(), share=1.0, damping=1e-7)
    assert torch.allclose(found.double(), best, atol=1e-4)
    half = corrected(W, total.result(), share=0.5, damping=1e-7)
    assert torch.allclose(half, (found + W) / 2, atol=1e-6)

    def loss(V: torch.Tensor) -> float:
        return float((rows @ V.T.double() - outputs).square().sum())

    assert loss(found) < loss(half) < loss(W)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_inputs_change_nothing_and_columns_that_see_none_stay(dtype) -> None:
    x, _ = inputs()
    x[..., 3] = 0.0
    total = PairedSum()
    total.add(Seen(x.to(dtype)), Seen(x.to(dtype)))
    W = torch.randn(5, 24).to(dtype)
    assert torch.equal(corrected(W, total.result(), share=0.5, damping=0.01), W)


def test_what_is_not_finite_is_refused() -> None:
    x, compressed = inputs()
    total = PairedSum()
    total.add(Seen(torch.full_like(x, float("inf"))), Seen(compressed))
    with pytest.raises(EvoPressError, match="not finite"):
        corrected(torch.ones(5, 24), total.result(), share=0.5, damping=0.01)
