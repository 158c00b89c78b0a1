"""Improve the bank at fixed codes: exact steps in the metric of the adapters, and the method of optimal directions.

With A_i fixed the objective is, up to a constant,

    sum_i <Bhat_i, G_i Bhat_i> - 2 <C_i, Bhat_i>,    Bhat_i = sum_j a_ij B_j,  G_i = A_i^T A_i,  C_i = A_i^T W_i

so a pass over the experts needs to give only `Projected`. Every ridge acts on the change of the bank: no ridge, however
large, can raise the objective.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from globe_fit.data.stream import Block
from globe_fit.linalg import factorise, solve_adapters
from globe_fit.run.distributed import ALONE, Ranks
from globe_fit.solvers.base import BankState

RIDGE = 1e-6  # of the mean diagonal of each Gram matrix
_AT_ONCE = 8  # atoms


@dataclass(frozen=True)
class Projected:
    """A block of experts, projected by their adapters."""

    span: slice  # among all n experts
    gram: torch.Tensor  # (E, R, R) A^T A
    cross: torch.Tensor  # (E, R, D) A^T W; of several ranks the columns of this rank


Passes = Callable[[], Iterable[Projected]]


def project(block: Block, state: BankState, ranks: Ranks = ALONE) -> Projected:
    """Project a block by the best adapters for the state, into the coordinates of the present bases."""
    adapters = solve_adapters(block.weights, state.basis(block.span), RIDGE, ranks)
    return Projected(block.span, adapters.mT @ adapters, adapters.mT @ block.weights)


def exact_step(state: BankState, passes: Passes, iterations: int, ranks: Ranks = ALONE) -> int:
    """Lower the objective in the bank at the present adapters; return how often a ridge was raised.

    Takes `iterations` steps of preconditioned conjugate gradients (Hestenes and Stiefel, 1952) on the normal equations

        sum_i a_ij G_i sum_k a_ik B_k = sum_i a_ij C_i

    from the present bank on, so that stopping early is safe. The preconditioner is the diagonal block of each atom,
    sum_i a_ij^2 G_i (R, R). The right side takes a pass, and so does each iteration. Memory: four times the bank, and
    the preconditioner. Of several ranks each steps in its columns of the bank, and their inner products are summed.
    """
    bank, codes = state.bank, state.codes
    residual, curvature = _gradient(state, passes, torch.ones(len(bank), dtype=torch.bool, device=bank.device))
    chol, raised = factorise(curvature, RIDGE)
    del curvature
    change, image = torch.zeros_like(bank), torch.empty_like(bank)
    step = _precondition(residual, chol, torch.empty_like(bank))
    level = first = _dot(residual, step, ranks)
    for _ in range(iterations):
        image.zero_()
        for seen in passes():
            add_image(seen, codes, step, image)
            del seen  # before the next block is read
        bend = _dot(step, image, ranks)
        if bend <= 0:
            break
        length = level / bend
        change.addcmul_(step, length)
        residual.sub_(image.mul_(length))
        _precondition(residual, chol, image)
        before, level = level, _dot(residual, image, ranks)
        if level <= 1e-10 * first:  # the resolution of fp32; further steps would amplify rounding
            break
        step.mul_(level / before).add_(image)
    bank.add_(change)
    return raised


def _dot(first: torch.Tensor, second: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    total = torch.dot(first.flatten(), second.flatten())
    ranks.all_sum(total)
    return total


def _precondition(residual: torch.Tensor, chol: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Solve chol chol^T out = residual in parts, because the solve copies its arguments."""
    for left, factor, part in zip(*(tensor.split(_AT_ONCE) for tensor in (residual, chol, out)), strict=True):
        part.copy_(torch.cholesky_solve(left, factor))
    return out


def atom_by_atom(state: BankState, passes: Passes) -> int:
    """Minimise over one atom at a time, the others fixed; return how often a ridge was raised.

        (sum_i a_ij^2 G_i) dB_j = sum_i a_ij (C_i - G_i Bhat_i)

    Atoms that no expert uses together do not depend on each other: a batch of them takes one pass, and the adapters of
    the next pass follow. Dense codes take as many passes as atoms.
    """
    raised = 0
    for batch in independent(state.codes != 0):
        residual, curvature = _gradient(state, passes, batch)
        chol, more = factorise(curvature, RIDGE)
        state.bank[batch] += torch.cholesky_solve(residual, chol)
        raised += more
    return raised


def _gradient(state: BankState, passes: Passes, atoms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return sum_i a_ij (C_i - G_i Bhat_i) (N, R, D) and sum_i a_ij^2 G_i (N, R, R) for the N atoms of a mask (M,)."""
    codes = state.codes[:, atoms]
    residual = torch.zeros_like(state.bank[atoms])
    curvature = residual.new_zeros(len(residual), residual.shape[1], residual.shape[1])
    for seen in passes():
        add_gradient(seen, state, codes, residual, curvature)
        del seen  # before the next block is read
    return residual, curvature


def add_gradient(
    seen: Projected, state: BankState, codes: torch.Tensor, residual: torch.Tensor, curvature: torch.Tensor
) -> None:
    """Add the experts of a block to the sums of `_gradient`; `codes` (n, N) are the codes of the N atoms."""
    block_codes = codes[seen.span]
    left = seen.cross - seen.gram @ state.basis(seen.span)
    residual.flatten(1).addmm_(block_codes.mT, left.flatten(1))
    curvature.flatten(1).addmm_(block_codes.square().mT, seen.gram.flatten(1))


def add_image(seen: Projected, codes: torch.Tensor, step: torch.Tensor, image: torch.Tensor) -> None:
    """Add the experts of a block to sum_i a_ij G_i sum_k a_ik step_k (M, R, D), the left side of the equations."""
    mixture = (codes[seen.span] @ step.flatten(1)).view_as(seen.cross)
    image.flatten(1).addmm_(codes[seen.span].mT, (seen.gram @ mixture).flatten(1))


def independent(used: torch.Tensor) -> list[torch.Tensor]:
    """Split the atoms of `used` (n, M) greedily into masks (M,) of atoms that no expert uses together.

    Atoms without experts are in no mask.
    """
    together = used.float().mT @ used.float() > 0
    batches: list[torch.Tensor] = []
    for atom in used.any(0).nonzero()[:, 0].tolist():
        for batch in batches:
            if not (together[atom] & batch).any():
                batch[atom] = True
                break
        else:
            batches.append(torch.zeros_like(together[0]).index_fill_(0, torch.tensor(atom, device=used.device), True))
    return batches


class OptimalDirections:
    """Set B <- X a^T (a a^T)^-1 (Engan, Aase and Husoy, 1999) for targets X_i that come block by block.

    The equations are solved for the change of the bank, so that atoms without experts stay as they are. Memory beside
    the bank: (M, R, D) and (M, M).
    """

    def __init__(self, state: BankState):
        self._state = state
        self._residual = torch.zeros_like(state.bank)
        self._gram = state.bank.new_zeros(len(state.bank), len(state.bank))

    def add(self, span: slice, targets: torch.Tensor) -> None:
        """Add the targets (E, R, D) of the experts of `span`, whose codes are final."""
        codes = self._state.codes[span]
        self._residual.flatten(1).addmm_(codes.mT, (targets - self._state.basis(span)).flatten(1))
        self._gram.addmm_(codes.mT, codes)

    def step(self) -> tuple[int, float]:
        """Change the bank; return how often the ridge was raised, and the condition of a a^T over the atoms in use."""
        chol, raised = factorise(self._gram, RIDGE)
        self._state.bank.flatten(1).add_(torch.cholesky_solve(self._residual.flatten(1), chol))
        used = self._gram.diagonal() > 0
        spectrum = torch.linalg.eigvalsh(self._gram[used][:, used].double())
        return raised, (spectrum[-1] / spectrum[0].clamp_min(1e-16 * spectrum[-1])).item()


def normalise_atoms(state: BankState, ranks: Ranks = ALONE) -> torch.Tensor:
    """Give every atom RMS 1 and its codes the factor, so that no product changes; return the factors (M,)."""
    (values,) = ranks.sums(state.bank[0].numel())
    rms = state.atom_norms(ranks) / values**0.5
    rms = torch.where(rms > 0, rms, 1.0)
    state.bank.div_(rms[:, None, None])
    state.codes.mul_(rms)
    return rms
