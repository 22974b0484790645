import pytest
import torch

from evopress.compress import sparse
from evopress.compress.magnitude import magnitude
from evopress.compress.wanda import Wanda, wanda, wanda_scores


def test_scores_are_weights_times_input_norms():
    X = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    W = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    scores = wanda_scores(W, X.T @ X)
    torch.testing.assert_close(scores, W.abs() * X.norm(dim=0))


def test_each_row_keeps_its_most_important_inputs_unchanged():
    W = torch.tensor([[3.0, -1.0, 0.5, 2.0], [-40.0, 20.0, 10.0, 30.0]])
    H = torch.diag(torch.tensor([1.0, 100.0, 1.0, 1.0]))
    results = wanda({"w": W}, H, {"w": [8, 4, 0]})["w"]
    assert results[0].payload.decode().tolist() == W.tolist()
    assert results[1].payload.decode().tolist() == [[3.0, -1.0, 0.0, 0.0], [-40.0, 20.0, 0.0, 0.0]]
    assert results[2].payload.decode().tolist() == [[0.0] * 4] * 2
    assert [results[0].error, results[2].error] == [0.0, pytest.approx(1.0)]


@pytest.mark.parametrize("constant", [True, False])
def test_counts_are_exact_and_rows_differ_by_one_at_most(constant):
    W = torch.full((7, 11), 0.5) if constant else torch.randn(7, 11, generator=torch.Generator().manual_seed(0))
    compressor = Wanda(sparsity=0.6, step=5, dtype_bits=32)
    for kept, result in zip(compressor.kept(77), compressor.compress({"w": W}, torch.eye(11))["w"], strict=True):
        rows = result.payload.mask.sum(1)
        assert int(rows.sum()) == kept
        assert int(rows.max() - rows.min()) <= 1


@pytest.mark.parametrize("run", [1, 25, 2**22])
def test_some_rows_at_a_time_are_pruned_as_all_at_once(run, monkeypatch):
    monkeypatch.setattr(sparse, "_RUN", run)
    W = torch.randint(-3, 4, (7, 11), generator=torch.Generator().manual_seed(0)).float()
    counts = [77, 60, 33, 5, 0]
    ranks = wanda_scores(W, torch.eye(11)).argsort(dim=1, stable=True).argsort(dim=1)
    for count, level in zip(counts, wanda({"w": W}, torch.eye(11), {"w": counts})["w"], strict=True):
        pruned = torch.tensor(sparse.distribute(77 - count, [11] * 7)).unsqueeze(1)
        assert torch.equal(level.payload.mask, ranks >= pruned)


def test_never_active_inputs_go_first():
    W = torch.full((3, 4), 0.5)
    W[:, 2] = 100.0
    H = torch.diag(torch.tensor([1.0, 2.0, 0.0, 3.0]))
    by_wanda, by_magnitude = (prune({"w": W}, H, {"w": [9]})["w"][0] for prune in (wanda, magnitude))
    assert not bool(by_wanda.payload.mask[:, 2].any())
    assert by_wanda.error == 0.0 < by_magnitude.error


def test_settings_name_the_compressor():
    assert Wanda(sparsity=0.5, step=3).settings()["compressor"] == "wanda"
