"""Decompose experts, and solve for their adapters: A_i = argmin || W_i - A Bhat_i ||^2 + ridge || A ||^2.

The ridge rule of the whole fit is here. The ridge is relative to the mean diagonal of each Gram matrix. Where one
factorisation of a batch fails, the ridge of all matrices of the batch is raised, by the factors of _RIDGE_FACTORS in
turn; then SingularBasisError.
"""

from collections.abc import Callable

import torch

from globe_fit.run.distributed import ALONE, Ranks
from globe_kernels.ops.batched_spd_solve import batched_spd_solve
from globe_kernels.ops.counters import call_counts, count_call

_RIDGE_FACTORS = (1.0, 1e2, 1e4)
_RAISED = "ridge raised"
_REFITTED = 2  # experts at once: fp64 takes twice the memory of a step


class SingularBasisError(RuntimeError):
    """A Gram matrix that no ridge mends: the basis holds NaN or infinity."""


def truncated_svd(weights: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the best factors (E, P, rank), (E, rank, D) of weights (E, P, D) in the Frobenius norm."""
    if weights.shape[1] > weights.shape[2]:
        right, left = truncated_svd(weights.mT, rank)
        return left.mT, right.mT
    _, vectors = torch.linalg.eigh(weights @ weights.mT)  # ascending
    left = vectors[..., -rank:] if rank else vectors[..., :0]
    return left, left.mT @ weights


def solve_adapters(weights: torch.Tensor, basis: torch.Tensor, ridge: float, ranks: Ranks = ALONE) -> torch.Tensor:
    """Return adapters (E, P, R) for weights (E, P, D) and basis (E, R, D), in the dtype of `basis`.

    Of several `ranks` each gives its columns of weights and basis, and gets the same adapters.
    """
    gram, cross = basis @ basis.mT, weights @ basis.mT
    ranks.all_sum(gram, cross)
    return solve_spd(gram, cross.mT, ridge)[0].mT


def refit_adapters(weights: torch.Tensor, basis: torch.Tensor, ranks: Ranks = ALONE) -> torch.Tensor:
    """Return the adapters (E, P, R) float64 that are stored, for raw weights and the basis as the runtime composes it.

    The refit folds the normalisation of the fit into the adapters: the scale exactly, the mean as well as a matrix of
    the row space of the basis can.
    """
    parts = zip(weights.split(_REFITTED), basis.split(_REFITTED), strict=True)
    return torch.cat([solve_adapters(some.double(), of_some.double(), 1e-12, ranks) for some, of_some in parts])


def solve_spd(gram: torch.Tensor, rhs: torch.Tensor, ridge: float = 1e-6) -> tuple[torch.Tensor, int]:
    """Return (gram + ridge)^-1 rhs for gram (E, N, N) and rhs (E, N, K), and how often the ridge was raised."""
    return _with_ridge(gram, ridge, lambda shifted: batched_spd_solve(shifted, rhs))


def factorise(gram: torch.Tensor, ridge: float) -> tuple[torch.Tensor, int]:
    """Return the Cholesky factors of gram (..., N, N) + ridge, and how often the ridge was raised."""
    return _with_ridge(gram, ridge, torch.linalg.cholesky_ex)


def regularised_solves() -> int:
    """Count the batches of this process that needed a larger ridge than the caller asked for."""
    return call_counts().get(_RAISED, 0)


def _with_ridge(
    gram: torch.Tensor, ridge: float, solve: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
) -> tuple[torch.Tensor, int]:
    """Return the result of `solve`, which gives (result, info), at the least ridge where every info is 0."""
    level = gram.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
    level = torch.where(level == 0, 1.0, level)  # a basis of zeros has no scale
    for raised, factor in enumerate(_RIDGE_FACTORS):
        shifted = gram.clone()
        shifted.diagonal(dim1=-2, dim2=-1).add_(factor * ridge * level)
        result, info = solve(shifted)
        if not info.any():
            return result, raised
        if raised == 0:
            count_call(_RAISED)
    raise SingularBasisError(f"the Gram matrix of a basis stays singular at ridge {_RIDGE_FACTORS[-1] * ridge:g}")
