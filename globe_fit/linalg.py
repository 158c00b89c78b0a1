"""Adapters by ordinary least squares: A_i = argmin || W_i - A Bhat_i ||^2 + ridge || A ||^2."""

import torch

from globe_fit.run.distributed import ALONE, Ranks
from globe_kernels.ops.counters import call_counts, count_call

_LARGER_RIDGE = (1.0, 1e2, 1e4)
_REGULARISED = "solve_adapters, larger ridge"


class SingularBasisError(RuntimeError):
    """A Gram matrix that no ridge mends: the basis holds NaN or infinity."""


def solve_adapters(weights: torch.Tensor, basis: torch.Tensor, ridge: float, ranks: Ranks = ALONE) -> torch.Tensor:
    """(E, P, R) from weights (E, P, D) and basis (E, R, D), in the dtype of `basis`; over several `ranks` from the
    columns that each holds, the same on all.

    `ridge` is relative to the mean diagonal of each Gram matrix Bhat Bhat^T. Where the Cholesky
    factorisation fails, the ridge of all experts is raised, at most twice; then SingularBasisError.
    """
    gram, cross = basis @ basis.mT, weights @ basis.mT
    ranks.all_sum(gram, cross)
    return solve_spd(gram, cross.mT, ridge)[0].mT


def solve_spd(gram: torch.Tensor, right: torch.Tensor, ridge: float = 1e-6) -> tuple[torch.Tensor, int]:
    """gram^-1 right for Gram matrices (E, N, N) and right sides (E, N, K); and how often the ridge was raised."""
    chol, raised = factorise(gram, ridge)
    return torch.cholesky_solve(right, chol), raised


def factorise(gram: torch.Tensor, ridge: float) -> tuple[torch.Tensor, int]:
    """Cholesky factors of Gram matrices (E, N, N) with `ridge` times their mean diagonal; and how often it was raised.

    Raises SingularBasisError when raising the ridge of all of them twice did not help.
    """
    level = gram.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
    level = torch.where(level == 0, 1.0, level)  # a basis of zeros has no scale of its own
    for raised, factor in enumerate(_LARGER_RIDGE):
        shifted = gram.clone()
        shifted.diagonal(dim1=-2, dim2=-1).add_(factor * ridge * level)
        chol, info = torch.linalg.cholesky_ex(shifted)
        if not info.any():
            return chol, raised
        if raised == 0:
            count_call(_REGULARISED)
    raise SingularBasisError(f"the Gram matrix of a basis stays singular at ridge {_LARGER_RIDGE[-1] * ridge:g}")


def regularised_solves() -> int:
    """How often, in this process, a block of experts needed a larger ridge than the one asked for."""
    return call_counts().get(_REGULARISED, 0)


def refit_adapters(weights: torch.Tensor, basis: torch.Tensor, ranks: Ranks = ALONE) -> torch.Tensor:
    """(E, P, R) float64: the adapters that are stored, on raw weights and the basis as it will be composed.

    This folds the normalisation of the fit into the adapters: exactly for the scale, as well as a
    matrix of the row space of the basis can for the mean.
    """
    return solve_adapters(weights.double(), basis.double(), 1e-12, ranks)
