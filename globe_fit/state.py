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

    def bases(self) -> torch.Tensor:
        """(n, R, D) composed bases of all experts."""
        return PHI_FUNCTIONS[self.phi](self.codes @ self.bank.flatten(1)).view(-1, *self.bank.shape[1:])

    def basis(self, places: slice) -> torch.Tensor:
        """(E, R, D) composed bases of the experts at `places`, without gradients."""
        return self.part(places)[0].bases()

    def part(self, places: slice) -> tuple["BankState", torch.Tensor]:
        """The experts at `places` and the atoms that they use, detached; and which of all atoms these are.

        Codes of zero are left out with their atoms, so that neither work nor traffic grows with atoms that a block of
        experts has nothing to do with. Where more than half are used it is all of them, without a copy.
        """
        bank, codes = self.bank.detach(), self.codes.detach()[places]
        atoms = (codes != 0).any(0).nonzero().flatten()
        if 2 * len(atoms) > len(bank):
            return BankState(bank, codes, self.phi), torch.arange(len(bank), device=bank.device)
        return BankState(bank[atoms], codes[:, atoms], self.phi), atoms

    @torch.no_grad()
    def add_gradients(self, places: slice, atoms: torch.Tensor, part: "BankState") -> None:
        """Add the gradients of a `part` to those of the tensors here."""
        if part.bank.grad is not None:
            _gradient(self.bank).index_add_(0, atoms, part.bank.grad)
        if part.codes.grad is not None:
            _gradient(self.codes)[places].index_add_(1, atoms, part.codes.grad)

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


def _gradient(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.grad is None:
        tensor.grad = torch.zeros_like(tensor)
    return tensor.grad


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
