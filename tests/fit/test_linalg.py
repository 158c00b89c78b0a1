import pytest
import torch

from globe_fit.linalg import (
    SingularBasisError,
    factorise,
    refit_adapters,
    regularised_solves,
    solve_adapters,
    solve_spd,
)
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


def test_a_failure_raises_the_ridge_of_its_batch_by_one_rule():
    """Pivots that leave no doubt: indefinite by as much as the second and the third ridge repair, and by more."""
    before = regularised_solves()
    for raised, shift in enumerate((0.0, 5e-5, 5e-3)):
        gram = torch.eye(6).repeat(2, 1, 1)
        gram[1, 5, 5] = -shift
        level = gram.diagonal(dim1=1, dim2=2).mean(1)
        shifted = gram + 1e-6 * 100**raised * level[:, None, None] * torch.eye(6)
        rhs = torch.ones(2, 6, 3)
        solution, found = solve_spd(gram, rhs, 1e-6)
        assert found == raised
        assert_close(solution, torch.linalg.solve(shifted, rhs), rms=1e-3, peak=1e-3)
        factor, found = factorise(gram, 1e-6)
        assert found == raised
        assert torch.equal(torch.cholesky_solve(rhs, factor), solution)
    assert regularised_solves() == before + 4
    gram[1, 5, 5] = -1.0
    with pytest.raises(SingularBasisError, match="stays singular at ridge 0.01"):
        solve_spd(gram, rhs, 1e-6)


def test_a_solve_asks_for_the_extension(monkeypatch):
    """The fit reaches the CUDA extension by the predicate of the op alone."""
    from globe_kernels.ops import batched_spd_solve as op

    asked = []
    monkeypatch.setattr(op, "load_extension", lambda: asked.append("load") or True)
    monkeypatch.setattr(op, "uses_extension", lambda *sizes: asked.append(sizes) or True)
    monkeypatch.setattr(op, "launch_batched_spd_solve", op.batched_spd_solve_ref)

    class OnCard(torch.Tensor):
        is_cuda = True

    gram, rhs = torch.eye(4).repeat(3, 1, 1).as_subclass(OnCard), torch.ones(3, 4, 2)
    solve_spd(gram, rhs)
    assert asked == [(4, 2, 3, torch.float32), "load"]
