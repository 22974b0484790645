"""The Triton kernels of a run of columns equal their twins in torch.

They need a GPU, or `TRITON_INTERPRET=1 pytest tests/compress/test_kernels.py` where Triton is installed.
"""

import importlib
import os

import pytest
import torch

from evopress.compress import columns
from evopress.compress.gptq import GPTQ
from evopress.compress.sparsegpt import SparseGPT

SHAPES = [(1, 1), (5, 3), (16, 40), (64, 33)]  # columns of a run, stacked rows: with and without whole programs


@pytest.fixture
def kernels():
    pytest.importorskip("triton")
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs a GPU, or TRITON_INTERPRET=1 before Triton is imported")
    return importlib.import_module("evopress.compress.kernels")


class Run:
    """A run of columns in the middle of a larger matrix, with grids of 2 to 8 bits."""

    def __init__(self, length: int, rows: int) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        generator = torch.Generator().manual_seed(length)
        X = torch.randn(200, length + 3, generator=generator)
        X[:, 2] = 0.0  # a column that is never active
        self.H = (X.T @ X).to(self.device)[1:-2, 1:-2]  # strided, as a group's part of H is
        self.weights = self.H.diagonal().contiguous()
        self.Wt = torch.randn(length, rows, generator=generator).to(self.device)
        self.maxq = 2.0 ** torch.randint(2, 9, (rows,), generator=generator).to(self.device) - 1.0
        self.scale = (4.0 / self.maxq).contiguous()
        self.low = -torch.round(self.maxq / 2)
        self.high = self.maxq + self.low
        self.steps = torch.minimum(torch.maximum(torch.round(self.Wt / self.scale), self.low), self.high)
        self.slope = self.H @ (self.Wt - self.steps * self.scale)
        self.new = torch.empty_like(self.Wt)


@pytest.mark.parametrize(("length", "rows"), SHAPES)
def test_a_run_is_rounded_as_in_torch(length, rows, kernels, monkeypatch):
    monkeypatch.setattr(columns, "_kernels", lambda device: None)
    run = Run(length, rows)
    spread = run.H.triu() / 100.0 if length % 2 else (run.H.triu() / 100.0).T.contiguous().T  # a factor may lie either way
    steps, errors = torch.empty_like(run.Wt), torch.empty_like(run.Wt)
    kernels.round_run(run.Wt, spread, run.scale, run.low, run.high, run.new, errors)
    expected = torch.empty_like(run.Wt)
    columns.round_run(run.Wt.clone(), spread, run.scale, run.low, run.high, steps=steps, errors=expected)
    assert (run.new == steps).float().mean() > 0.995  # a weight that lies between two codes may go either way
    same = (run.new == steps).all(0)
    torch.testing.assert_close(errors[:, same], expected[:, same], rtol=1e-4, atol=1e-4)
    assert (errors[:, same] != 0).any()


@pytest.mark.parametrize(("length", "rows"), SHAPES)
def test_a_run_is_pruned_as_in_torch(length, rows, kernels, monkeypatch):
    monkeypatch.setattr(columns, "_kernels", lambda device: None)
    run = Run(length, rows)
    U = run.H.triu() / 100.0 if length % 2 else (run.H.triu() / 100.0).T.contiguous().T
    U.diagonal().add_(0.5)
    factors = (run.Wt.abs() < 0.7) / U.diagonal().unsqueeze(1)
    plain, expected = run.Wt.clone(), torch.empty_like(run.Wt)
    kernels.prune_run(run.Wt, U, factors, run.new)
    columns.prune_run(plain, U, factors, errors=expected)
    torch.testing.assert_close(run.Wt, plain, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(run.new, expected, rtol=1e-4, atol=1e-4)
    assert not run.new[factors == 0].any()


@pytest.mark.parametrize("kind", ["random", "few values", "tiny and zero"])
def test_the_lowest_are_those_of_torch(kind, kernels, monkeypatch):
    monkeypatch.setattr(columns, "_kernels", lambda device: None)
    rows, length = torch.tensor([200, 1, 7, 200, 1500], dtype=torch.int32), 9
    scores = torch.randn(length, int(rows.sum()), generator=torch.Generator().manual_seed(0)).abs()
    scores = {"random": scores, "few values": (2 * scores).round(), "tiny and zero": (scores - 1.0).clamp(min=0.0) * 1e-40}[kind]
    counts = torch.tensor([600, 4, 63, 0, 10_001], dtype=torch.int32)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    marked = kernels.lowest_of_each(*(each.to(device) for each in (scores, rows, counts))).cpu()
    assert torch.equal(marked, columns.lowest_of_each(scores, rows, counts))
    assert [int(part.sum()) for part in marked.split(rows.tolist(), dim=1)] == counts.tolist()


@pytest.mark.parametrize(("length", "rows"), SHAPES)
def test_codes_descend_as_in_torch(length, rows, kernels, monkeypatch):
    monkeypatch.setattr(columns, "_kernels", lambda device: None)
    run = Run(length, rows)
    plain, fast = run.steps.clone(), run.steps.clone()
    expected = torch.empty_like(run.Wt)
    kernels.descend_run(run.H, fast, run.slope, run.scale, run.low, run.high, run.new)
    columns.descend_run(run.H, plain, run.slope.clone(), run.scale, run.low, run.high, moved=expected)
    assert (fast == plain).float().mean() > 0.995
    same = (fast == plain).all(0)
    torch.testing.assert_close(run.new[:, same], expected[:, same], rtol=1e-4, atol=1e-5)
    assert length < 16 or (fast != run.steps).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("length", "rows"), SHAPES)
def test_a_scale_moves_as_in_torch(length, rows, dtype, kernels, monkeypatch):
    monkeypatch.setattr(columns, "_kernels", lambda device: None)
    run = Run(length, rows)
    moved = 0.01 * run.Wt
    reach = run.H @ run.steps
    scales, moves = [], []
    for move_scale in (kernels.move_scale, lambda *args: columns.move_scale(*args[:4], moved=args[4], dtype=args[5])):
        scales.append(run.scale.to(dtype).float().clone())
        moves.append(moved.clone())
        move_scale(reach, run.steps, run.slope, scales[-1], moves[-1], dtype)
    rtol = 2 * torch.finfo(dtype).eps + 1e-5  # sums that end beside a storable scale may be rounded to either
    torch.testing.assert_close(scales[0], scales[1], rtol=rtol, atol=0.0)
    torch.testing.assert_close(moves[0], moves[1], rtol=1e-4, atol=float(rtol * (run.steps * run.scale).abs().max()))
    assert length < 16 or (scales[0] != run.scale.to(dtype).float()).any()


@pytest.mark.parametrize(("length", "rows"), SHAPES)
def test_ranges_cost_what_they_cost_in_torch(length, rows, kernels, monkeypatch):
    monkeypatch.setattr(columns, "_kernels", lambda device: None)
    run = Run(length, rows)
    scales = torch.stack([run.scale * part for part in (1.0, 0.7, 0.4)])
    grids = (scales, run.low.expand_as(scales).contiguous(), run.high.expand_as(scales).contiguous())
    costs = kernels.range_costs(run.Wt, run.weights, *grids)
    torch.testing.assert_close(costs, columns.range_costs(run.Wt, run.weights, *grids), rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "compressor",
    [
        GPTQ(bits=(8, 4, 3, 2), group_size=64, recipe="paper"),
        GPTQ(bits=(8, 4, 3, 2), group_size=64, recipe="best"),
        SparseGPT(sparsity=0.5, step=9000, num_levels=2, dtype_bits=32),
    ],
    ids=["quant, paper", "quant, best", "sparsity"],
)
def test_levels_made_by_kernels_are_as_close_as_those_made_in_torch(compressor, kernels, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(2000, 576, generator=generator) * torch.rand(576, generator=generator)
    H = (X.T @ X).cuda() / 1000
    weights = {"a": torch.randn(300, 576, generator=generator), "b": torch.randn(65, 576, generator=generator)}
    assert columns._kernels("cuda") is kernels
    fast = compressor.compress(weights, H)
    monkeypatch.setattr(columns, "_kernels", lambda device: None)
    plain = compressor.compress(weights, H)
    for name in weights:
        for a, b in zip(fast[name], plain[name], strict=True):
            assert a.error == pytest.approx(b.error, rel=0.005)


def test_without_a_compiler_columns_are_swept_in_torch_and_it_is_said_once(monkeypatch, caplog):
    def broken(name):
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable")

    monkeypatch.setattr(columns.importlib, "import_module", broken)
    choose = columns._kernels.__wrapped__
    assert choose("cpu") is None and not caplog.records
    assert choose("cuda") is None
    assert "without Triton kernels" in caplog.text and "C compiler" in caplog.text
