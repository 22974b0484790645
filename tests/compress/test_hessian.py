import pytest
import torch
from torch import Tensor

from evopress.compress import hessian
from evopress.compress.compressor import with_errors
from evopress.compress.hessian import HessianSum, SingularHessianError, add_product, inverse_factor
from evopress.errors import EvoPressError


def indefinite(columns: int, least: float) -> Tensor:
    """Return a symmetric matrix with mean diagonal 1 and least eigenvalue `least`."""
    Q = torch.linalg.qr(torch.randn(columns, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    eigenvalues = torch.full((columns,), (columns - least) / (columns - 1), dtype=torch.float64)
    eigenvalues[0] = least
    return (Q @ torch.diag(eigenvalues) @ Q.T).float()


@pytest.mark.parametrize("columns", [8, 192, 500, 1700])  # one panel, one full panel, two and a rest, nine
def test_the_sum_is_two_x_xt_over_sequences_whatever_the_batches(columns):
    X = torch.randn(6, 10, columns, generator=torch.Generator().manual_seed(0))
    expected = 2.0 / 6 * sum(x.double().T @ x.double() for x in X)
    for sizes in ([6], [1, 2, 3], [4, 2]):
        total = HessianSum(columns)
        for part in X.split(sizes):
            total.add(part)
        assert total.num_sequences == 6
        H = total.result()
        torch.testing.assert_close(H.double(), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(H, H.T)


def test_half_precision_inputs_are_summed_in_float32():
    X = torch.full((1, 5000, 2), 1.0, dtype=torch.bfloat16)
    total = HessianSum(2)
    total.add(X)
    assert torch.equal(total.result(), torch.full((2, 2), 10000.0))


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("columns", [8, 192, 500])
def test_bfloat16_inputs_lose_only_their_last_bits(split, columns, monkeypatch):
    if split and not hessian._splits_products():
        pytest.skip("this CPU has no bfloat16 products")
    monkeypatch.setattr(hessian, "_splits_products", lambda: split)
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(columns, generator=generator) * 10.0
    X = ((torch.randn(8, 300, columns, generator=generator) + 1.0) * scale).to(torch.bfloat16)
    total = HessianSum(columns)
    for part in X.split([5, 3]):
        total.add(part)
    rows = X.reshape(-1, columns).double()
    exact = 2.0 / 8 * rows.T @ rows
    root = exact.diagonal().sqrt()
    assert ((total.result() - exact).abs() / (root[:, None] * root)).max() < 1e-5


def test_a_product_in_two_halves_keeps_what_one_in_bfloat16_would_lose():
    if not hessian._splits_products():
        pytest.skip("this CPU has no bfloat16 products")
    left = torch.ones(257, 1, dtype=torch.bfloat16)
    total = torch.zeros(1, 1)
    add_product(total, left, left)
    assert float(left.T @ left) == 256.0, "bfloat16 cannot hold 257"
    assert total.item() == 257.0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_that_are_not_finite_are_refused(value, dtype):
    total = HessianSum(3)
    X = torch.ones(1, 2, 3, dtype=dtype)
    X[0, 1, 2] = value
    total.add(X)
    with pytest.raises(EvoPressError, match="not finite"):
        total.result()


def test_the_factor_is_the_inverse_of_the_damped_hessian():
    X = torch.randn(40, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    H = X.T @ X
    before = H.float()
    given = before.clone()
    U, damping = inverse_factor(given, damping=0.05)
    assert damping == 0.05
    assert torch.equal(given, before), "H was modified"
    assert torch.equal(U, U.triu())
    damped = H + 0.05 * H.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    torch.testing.assert_close(U.double().T @ U.double() @ damped, torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-4)


def test_columns_never_active_get_a_unit_diagonal_before_the_mean_is_taken():
    H = torch.diag(torch.tensor([4.0, 0.0, 4.0, 0.0]))
    U, _ = inverse_factor(H, damping=0.1)
    mean = (4 + 1 + 4 + 1) / 4
    torch.testing.assert_close(U.diagonal() ** -2, torch.tensor([4.0, 1.0, 4.0, 1.0]) + 0.1 * mean)


@pytest.mark.parametrize(("least", "expected"), [(-0.005, 0.01), (-0.05, 0.1), (-0.5, 1.0), (-5.0, 10.0)])
def test_a_hessian_that_is_not_positive_definite_gets_ten_times_more_damping_up_to_three_times(least, expected):
    _, damping = inverse_factor(indefinite(16, least), damping=0.01)
    assert damping == pytest.approx(expected)


def test_a_hessian_that_no_damping_cures_is_a_typed_error():
    with pytest.raises(SingularHessianError, match="damping 10 of the mean diagonal"):
        inverse_factor(indefinite(16, -20.0), damping=0.01)
    assert issubclass(SingularHessianError, EvoPressError)


def test_a_hessian_of_rank_one_is_cured_by_ordinary_damping():
    x = torch.randn(1, 32, generator=torch.Generator().manual_seed(2))
    U, damping = inverse_factor(x.T @ x, damping=0.01)
    assert damping == 0.01
    assert torch.isfinite(U).all()


@pytest.mark.parametrize("columns", [1, 96, 129, 700])  # below a leaf, a leaf and one, several halves
def test_the_factor_is_that_of_the_explicit_inverse(columns):
    X = torch.randn(3 * columns, columns, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    H = (X.T @ X).float()
    U, _ = inverse_factor(H, damping=0.01)
    damped = H.double() + 0.01 * H.double().diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    expected = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)  # as GPTQ writes it
    torch.testing.assert_close(U.double(), expected, rtol=1e-3, atol=1e-5 * float(expected.max()))


@pytest.mark.parametrize("columns", [5, 192, 500])  # one panel, one full panel, two and a rest
def test_errors_are_the_quadratic_form_over_all_columns(columns):
    class Stored:
        codec = "test"

        def decode(self):
            return W.round()

    generator = torch.Generator().manual_seed(4)
    W = torch.randn(7, columns, generator=generator)
    X = torch.randn(2 * columns, columns, generator=generator)
    H = X.T @ X
    E = (W - W.round()).double()
    expected = float(((E @ H.double()) * E).sum() / ((W.double() @ H.double()) * W.double()).sum())
    assert with_errors([Stored()], W, H)[0].error == pytest.approx(expected, rel=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sums_on_a_gpu_are_those_of_float64(dtype):
    X = torch.randn(4, 500, 300, generator=torch.Generator().manual_seed(0)).to(dtype)
    total = HessianSum(300, device="cuda")
    total.add(X.cuda())
    rows = X.reshape(-1, 300).double()
    exact = 2.0 / 4 * rows.T @ rows
    root = exact.diagonal().sqrt()
    assert ((total.result().cpu() - exact).abs() / (root[:, None] * root)).max() < 1e-5


def test_a_library_without_float32_results_is_given_float32(monkeypatch):
    def refuses(*args, **kwargs):
        raise NotImplementedError

    monkeypatch.setattr(torch, "mm", refuses)
    assert not hessian._gives_float32.__wrapped__(torch.device("cpu"), torch.bfloat16)
