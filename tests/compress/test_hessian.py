import pytest
import torch
from torch import Tensor

from evopress.compress.hessian import HessianSum, SingularHessianError, inverse_factor
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


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_activations_that_are_not_finite_are_refused(value):
    total = HessianSum(3)
    X = torch.ones(1, 2, 3)
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
