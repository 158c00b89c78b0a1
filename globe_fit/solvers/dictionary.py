"""Steps of the bank, codes fixed: exact ones in the metric of the adapters, and the method of optimal directions.

With A_i fixed the objective is, up to a constant,

    sum_i <Bhat_i, G_i Bhat_i> - 2 <C_i, Bhat_i>,    Bhat_i = sum_j a_ij B_j,  G_i = A_i^T A_i,  C_i = A_i^T W_i

so a pass over the experts needs to give no more than `Projected`. Every ridge acts on the change of the bank: no ridge,
however large, can raise the objective.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from globe_fit.data.stream import Block
from globe_fit.linalg import factorise, solve_adapters
from globe_fit.solvers.base import BankState

RIDGE = 1e-6  # of the mean diagonal of each Gram matrix
_AT_ONCE = 8  # atoms


@dataclass(frozen=True)
class Projected:
    """A block of experts as its adapters see it."""

    places: slice
    gram: torch.Tensor  # (E, R, R) A^T A
    cross: torch.Tensor  # (E, R, D) A^T W


Passes = Callable[[], Iterable[Projected]]


def project(block: Block, state: BankState) -> Projected:
    """The block through the adapters that are best for the state: in the coordinates of its own current bases."""
    adapters = solve_adapters(block.weights, state.basis(block.places), RIDGE)
    return Projected(block.places, adapters.mT @ adapters, adapters.mT @ block.weights)


def exact_step(state: BankState, passes: Passes, iterations: int) -> int:
    """Bank of least objective at the present adapters, by `iterations` steps of preconditioned conjugate gradients
    (Hestenes and Stiefel, 1952) on its normal equations

        sum_i a_ij G_i sum_k a_ik B_k = sum_i a_ij C_i

    from the present bank on, so that stopping early is safe. The preconditioner is the diagonal block of each atom,
    sum_i a_ij^2 G_i (R, R). One pass for the right side and one per iteration; beside the bank four of its size and
    the preconditioner.
    Returns how often the ridge of the preconditioner was raised.
    """
    bank, codes = state.bank, state.codes
    residual, curvature = _gradient(state, passes, torch.ones(len(bank), dtype=torch.bool, device=bank.device))
    chol, raised = factorise(curvature, RIDGE)
    del curvature
    change, image = torch.zeros_like(bank), torch.empty_like(bank)
    step = _precondition(residual, chol, torch.empty_like(bank))
    level = first = torch.dot(residual.flatten(), step.flatten())
    for _ in range(iterations):
        image.zero_()
        for seen in passes():
            add_image(seen, codes, step, image)
            del seen  # before the next block is read
        bend = torch.dot(step.flatten(), image.flatten())
        if bend <= 0:
            break
        length = level / bend
        change.addcmul_(step, length)
        residual.sub_(image.mul_(length))
        _precondition(residual, chol, image)
        before, level = level, torch.dot(residual.flatten(), image.flatten())
        if level <= 1e-10 * first:  # what fp32 resolves; beyond it rounding would be amplified
            break
        step.mul_(level / before).add_(image)
    bank.add_(change)
    return raised


def _precondition(residual: torch.Tensor, chol: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """chol chol^T out = residual; in parts, because the solve makes copies of all that it is given."""
    for left, factor, part in zip(*(tensor.split(_AT_ONCE) for tensor in (residual, chol, out)), strict=True):
        part.copy_(torch.cholesky_solve(left, factor))
    return out


def atom_by_atom(state: BankState, passes: Passes) -> int:
    """Each atom in turn to its best at the present others: (sum_i a_ij^2 G_i) dB_j = sum_i a_ij (C_i - G_i Bhat_i).

    Atoms that no expert uses together do not see each other: they are solved in one batch, one pass per batch, with
    adapters that follow. Dense codes take as many passes as atoms. Returns how often a ridge was raised.
    """
    raised = 0
    for batch in independent(state.codes != 0):
        residual, curvature = _gradient(state, passes, batch)
        chol, more = factorise(curvature, RIDGE)
        state.bank[batch] += torch.cholesky_solve(residual, chol)
        raised += more
    return raised


def _gradient(state: BankState, passes: Passes, atoms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """sum_i a_ij (C_i - G_i Bhat_i) (N, R, D) and sum_i a_ij^2 G_i (N, R, R) for the N atoms of a mask (M,)."""
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
    """Add the experts of a block to the sums of `_gradient`, for the atoms that `codes` (n, N) are of."""
    own = codes[seen.places]
    left = seen.cross - seen.gram @ state.basis(seen.places)
    residual.flatten(1).addmm_(own.mT, left.flatten(1))
    curvature.flatten(1).addmm_(own.square().mT, seen.gram.flatten(1))


def add_image(seen: Projected, codes: torch.Tensor, step: torch.Tensor, image: torch.Tensor) -> None:
    """Add the experts of a block to sum_i a_ij G_i sum_k a_ik step_k (M, R, D), the left side for a step."""
    mixture = (codes[seen.places] @ step.flatten(1)).view_as(seen.cross)
    image.flatten(1).addmm_(codes[seen.places].mT, (seen.gram @ mixture).flatten(1))


def independent(used: torch.Tensor) -> list[torch.Tensor]:
    """Masks (M,) of atoms that no expert uses together, greedily; of `used` (n, M). Unused atoms are left out."""
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
    """B <- X a^T (a a^T)^-1 (Engan, Aase and Husoy, 1999) for targets X_i, accumulated block by block.

    Solved for the change of the bank, so that atoms without experts stay as they are. (M, R, D) and (M, M) beside it.
    """

    def __init__(self, state: BankState):
        self._state = state
        self._residual = torch.zeros_like(state.bank)
        self._gram = state.bank.new_zeros(len(state.bank), len(state.bank))

    def add(self, places: slice, targets: torch.Tensor) -> None:
        """Targets (E, R, D) of the experts at `places`, whose codes are final."""
        codes = self._state.codes[places]
        self._residual.flatten(1).addmm_(codes.mT, (targets - self._state.basis(places)).flatten(1))
        self._gram.addmm_(codes.mT, codes)

    def step(self) -> tuple[int, float]:
        """Change the bank; how often the ridge was raised, and the condition number of a a^T over the atoms in use."""
        chol, raised = factorise(self._gram, RIDGE)
        self._state.bank.flatten(1).add_(torch.cholesky_solve(self._residual.flatten(1), chol))
        used = self._gram.diagonal() > 0
        spectrum = torch.linalg.eigvalsh(self._gram[used][:, used].double())
        return raised, (spectrum[-1] / spectrum[0].clamp_min(1e-16 * spectrum[-1])).item()


def normalise_atoms(state: BankState) -> torch.Tensor:
    """Give every atom RMS 1 and its codes the factor, so that no product changes; returns the factors (M,)."""
    rms = torch.linalg.vector_norm(state.bank, dim=(1, 2)) / state.bank[0].numel() ** 0.5
    rms = torch.where(rms > 0, rms, 1.0)
    state.bank.div_(rms[:, None, None])
    state.codes.mul_(rms)
    return rms
