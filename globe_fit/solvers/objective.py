"""Evaluate the objective that both solvers lower: the error that is left once the adapters are eliminated.

f(B, alpha) = min_A sum_i || W_i - A_i phi(sum_j alpha_ij B_j) ||^2 / sum_i || W_i ||^2
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from globe_fit.data.stream import Block, FamilyWeights
from globe_fit.linalg import solve_adapters
from globe_fit.solvers.base import BankState
from globe_kernels.ops.compose_basis import PHI_FUNCTIONS


def eliminated_error(weights: FamilyWeights, state: BankState, index: torch.Tensor, ridge: float) -> float:
    """Return the relative error; add its gradient, block by block, to the tensors of the state that require one.

    The codes are zero but at `index` (n, C), and have no gradient elsewhere. Each of several ranks adds the gradient of
    its columns of the bank; the gradient of the codes is summed over the ranks.
    """
    total = torch.zeros((), dtype=torch.float64, device=weights.device)
    for block in weights.normalised():
        total += backward_block(weights, block, state, index, ridge)
        del block  # before the next block is read
    if state.codes.grad is not None:
        weights.ranks.all_sum(state.codes.grad)
    return weights.ranks.sums(total.item())[0]


def backward_block(
    weights: FamilyWeights, block: Block, state: BankState, index: torch.Tensor, ridge: float
) -> torch.Tensor:
    """Return the part of a block in the relative error, in the columns of this rank; add its gradients to the state."""
    mixture, add_gradients = state.mixture(block.span, index[block.span])
    mixture.requires_grad_(state.bank.requires_grad or state.codes.requires_grad)
    basis = weights.in_metric(block, PHI_FUNCTIONS[state.phi](mixture))
    target = weights.weighted(block, block.weights)
    with torch.no_grad():
        adapters = solve_adapters(target, basis, ridge, weights.ranks)
    with _quick_products(basis.device):
        loss = (target - adapters @ basis).square().sum() / weights.normalised_energy
        if loss.requires_grad:
            loss.backward()
    if mixture.grad is not None:
        add_gradients(mixture.grad)
    return loss.detach()


@contextmanager
def _quick_products(device: torch.device) -> Iterator[None]:
    """Allow matrix products on a GPU to round factors to TF32 in the block: ten bits of mantissa, sums in fp32.

    The products are A_i Bhat_i and A_i^T times the residual. They only measure the solution, to a relative 1e-3 of the
    residual; the Gram matrices and the solve itself stay in fp32.
    """
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
