"""Variable projection: the adapters are eliminated, Adam runs on the bank and the codes.

    f(B, alpha) = min_A sum_i || W_i - A_i phi(sum_j alpha_ij B_j) ||^2

At the minimising A_i the gradient of f in the basis is that of the residual with A_i held constant (envelope
theorem; Golub and Pereyra, 1973), so no gradient runs through the least-squares solve. There is no
adapter state, and f does not depend on the coordinates that an expert chooses for its basis.
Every step is one pass over the experts in blocks; what is resident is the bank, the codes, their Adam
state and one block of weights.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from globe_fit.adapters import SingularBasisError, solve_adapters
from globe_fit.codes import largest_support
from globe_fit.config import VarProConfig
from globe_fit.objective import FamilyWeights
from globe_fit.warm_start import allowed_atoms
from globe_kernels.ops.compose_basis import PHI_FUNCTIONS


@dataclass
class BankState:
    """What a solver improves: atoms (M, R, D) and dense codes (n, M), zero outside each support."""

    bank: torch.Tensor
    codes: torch.Tensor
    phi: str

    def basis(self, places: slice) -> torch.Tensor:
        """(E, R, D) composed bases of the experts at `places`."""
        mixture = self.codes[places] @ self.bank.flatten(1)
        return PHI_FUNCTIONS[self.phi](mixture).view(-1, *self.bank.shape[1:])

    def copy(self) -> "BankState":
        """A copy of the values, without gradients."""
        return BankState(self.bank.detach().clone(), self.codes.detach().clone(), self.phi)

    @torch.no_grad()
    def copy_(self, other: "BankState") -> None:
        """Take over the values of `other`."""
        self.bank.copy_(other.bank)
        self.codes.copy_(other.codes)


def solve(
    weights: FamilyWeights, start: BankState, support: int, scope: str, config: VarProConfig
) -> Iterator[tuple[int, float, BankState]]:
    """Yields (step, relative error before the step, BankState) for steps 0..config.steps.

    The state is `start` itself, changed in place: copy what must be kept. A step that diverged yields NaN. From the
    step at which the support is fixed on, no expert has more than `support` codes. Exact and deterministic: one seed
    gives one result on one machine.
    """
    state = start
    bank, codes = state.bank.requires_grad_(), state.codes.requires_grad_()
    allowed = allowed_atoms(weights.source.base, bank.shape[0], scope).to(codes.device)
    rms = bank.detach().square().mean().sqrt().item()
    optimizer = torch.optim.Adam(
        [{"params": [bank], "base": config.lr * rms}, {"params": [codes], "base": config.lr * config.code_lr_scale}],
        betas=config.betas,
        fused=True,  # without temporaries of the size of the bank
    )
    fixed = False
    for step in range(config.steps + 1):
        if not fixed and step >= config.support_at * config.steps:
            with torch.no_grad():
                norms = bank.flatten(1).norm(dim=1)
                allowed &= largest_support(codes, norms, support)
                codes.mul_(allowed)
            fixed = True
        optimizer.zero_grad(set_to_none=True)
        try:
            error = _backward(weights, state, config.ridge)
        except SingularBasisError:
            error = math.nan
        yield step, error, state
        if step == config.steps:
            return
        assert codes.grad is not None
        codes.grad.mul_(allowed)
        for group in optimizer.param_groups:
            group["lr"] = group["base"] * _schedule(step, config)
        optimizer.step()
        with torch.no_grad():
            codes.mul_(allowed)  # momentum from before the support was fixed


def _backward(weights: FamilyWeights, state: BankState, ridge: float) -> float:
    """Accumulate the gradients of the relative error, block by block; returns it."""
    total = 0.0
    for block in weights.normalised():
        basis = state.basis(block.places)
        with torch.no_grad():
            adapters = solve_adapters(block.weights, basis, ridge)
        loss = (block.weights - adapters @ basis).square().sum() / weights.normalised_energy
        loss.backward()
        total += loss.item()
        del block, basis, adapters, loss  # before the next block is read
    return total


def _schedule(step: int, config: VarProConfig) -> float:
    """Linear warm-up, then a cosine to `final_lr_scale`."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(config.steps - config.warmup_steps, 1)
    return config.final_lr_scale + (1 - config.final_lr_scale) * 0.5 * (1 + math.cos(math.pi * progress))
