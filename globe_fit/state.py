"""What every solver improves, and how the fit drives one."""

from dataclasses import dataclass
from typing import Protocol

import torch

from globe_fit.distributed import ALONE, Ranks
from globe_kernels.ops.compose_basis import PHI_FUNCTIONS


@dataclass
class BankState:
    """Atoms (M, R, D) and dense codes (n, M), zero outside each support. Of several ranks each has its own columns of
    the atoms, and all codes."""

    bank: torch.Tensor
    codes: torch.Tensor
    phi: str

    def basis(self, places: slice) -> torch.Tensor:
        """(E, R, D) composed bases of the experts at `places`."""
        mixture = self.codes[places] @ self.bank.flatten(1)
        return PHI_FUNCTIONS[self.phi](mixture).view(-1, *self.bank.shape[1:])

    def atom_norms(self, ranks: Ranks = ALONE) -> torch.Tensor:
        """(M,) Frobenius norms of the atoms."""
        squares = torch.linalg.vector_norm(self.bank.detach(), dim=(1, 2)).double().square()
        ranks.all_sum(squares)
        return squares.sqrt().float()

    def copy(self) -> "BankState":
        """A copy of the values, without gradients."""
        return BankState(self.bank.detach().clone(), self.codes.detach().clone(), self.phi)

    @torch.no_grad()
    def copy_(self, other: "BankState") -> None:
        """Take over the values of `other`."""
        self.bank.copy_(other.bank)
        self.codes.copy_(other.codes)


class Solver(Protocol):
    """Improves `state` in place, one step at a time: evaluate, update, evaluate, ...

    Deterministic: a solver that is restored from the tensors of another, taken after an update, goes on as that one.
    """

    state: BankState
    extras: dict[str, float]  # metrics of its own, as of the last update
    finished: bool  # whether further steps would not pay, as of the last evaluate

    def evaluate(self) -> float:
        """Relative error of the state on the normalised weights; NaN when it diverged."""
        ...

    def update(self) -> None:
        """One step from where `evaluate` left off."""
        ...

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything that the next step depends on."""
        ...

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take over what `tensors` gave."""
        ...
