import pytest
import torch

from globe_fit.linalg import SingularBasisError, refit_adapters, solve_adapters
from globe_kernels.testing import assert_close


def test_is_the_least_squares_solution():
    torch.manual_seed(0)
    weights, basis = torch.randn(3, 5, 12), torch.randn(3, 4, 12)
    expected = torch.linalg.lstsq(basis.mT.double(), weights.mT.double()).solution.mT
    assert_close(refit_adapters(weights, basis), expected, rms=1e-9, peak=1e-9)
    assert_close(solve_adapters(weights, basis, 1e-7), expected, rms=1e-5, peak=1e-5)


def test_no_other_adapter_is_better():
    torch.manual_seed(0)
    weights, basis = torch.randn(2, 5, 12), torch.randn(2, 4, 12)
    adapters = refit_adapters(weights, basis)
    best = (weights - adapters @ basis.double()).square().sum()
    for _ in range(20):
        other = adapters + 1e-3 * torch.randn_like(adapters)
        assert (weights - other @ basis.double()).square().sum() > best


def test_dependent_rows_still_give_the_best_approximation():
    torch.manual_seed(0)
    weights = torch.randn(1, 5, 12)
    row = torch.randn(1, 1, 12)
    basis = torch.cat([row, row, 2 * row], dim=1)  # rank 1
    fitted = solve_adapters(weights, basis, 1e-6) @ basis
    projection = weights @ row.mT @ row / row.square().sum()
    assert_close(fitted, projection, rms=1e-4, peak=1e-4)


def test_a_basis_of_zeros_gives_finite_adapters():
    adapters = solve_adapters(torch.randn(1, 5, 12), torch.zeros(1, 4, 12), 1e-6)
    assert torch.equal(adapters, torch.zeros(1, 5, 4))


def test_a_nan_is_not_hidden():
    with pytest.raises(SingularBasisError, match="stays singular"):
        solve_adapters(torch.randn(1, 5, 12), torch.full((1, 4, 12), float("nan")), 1e-6)
