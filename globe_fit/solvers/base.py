"""What every solver improves, and how the fit drives one."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from globe_fit.data.stream import Block
from globe_fit.run.distributed import ALONE, Ranks
from globe_kernels.ops.compose_basis import PHI_FUNCTIONS
from globe_kernels.ops.mixture import mixture


@dataclass
class BankState:
    """Atoms (M, R, D) and dense codes (n, M), zero outside each support. Of several ranks each has its own columns of
    the atoms, and all codes."""

    bank: torch.Tensor
    codes: torch.Tensor
    phi: str

    def basis(self, places: slice) -> torch.Tensor:
        """(E, R, D) composed bases of the experts at `places`, without gradients."""
        index = code_index(self.codes.detach()[places] != 0)
        return PHI_FUNCTIONS[self.phi](self.mixture(places, index)[0])

    def mixture(self, places: slice, index: torch.Tensor) -> tuple[torch.Tensor, Callable[[torch.Tensor], None]]:
        """(E, R, D) what phi is applied to for the experts at `places`, whose codes are zero but at `index` (E, C); and
        what adds to the gradients of the tensors here that require one, given that of the mixture."""
        # detached: no gradient runs but by the function that is returned
        value = self.codes.detach()[places].gather(1, index.long())
        found, backward = mixture(index, value, self.bank.detach())

        @torch.no_grad()
        def add_gradients(gradient: torch.Tensor) -> None:
            value_gradient = backward(gradient, _gradient(self.bank) if self.bank.requires_grad else None)
            if self.codes.requires_grad:
                _gradient(self.codes)[places].scatter_add_(1, index.long(), value_gradient)

        return found, add_gradients

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


def code_index(used: torch.Tensor) -> torch.Tensor:
    """(n, C) int32: the atoms of `used` (n, M), ascending; C is the most of one expert, and others fill its places."""
    width = int(used.sum(1).max())
    return torch.argsort(~used, dim=1, stable=True)[:, :width].int()


def _gradient(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.grad is None:
        tensor.grad = torch.zeros_like(tensor)
    return tensor.grad


@dataclass(frozen=True)
class Pass:
    """A kind of pass over all experts: how many a fit takes, and the work of a pass on one block."""

    count: int
    visit: Callable[[Block], object]


def steps_before_fixing(steps: int, support_at: float) -> int:
    """How many of the steps a solver takes before it fixes the support."""
    return min(math.ceil(support_at * steps), steps)


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

    def passes(self) -> Iterator[Pass]:
        """The passes of a whole fit, for an estimate of its time. Work on the bank and the codes alone is left out.

        Visit one block by each pass before you ask for the next: the codes follow the phases of a fit. The solver
        cannot fit after that.
        """
        ...

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take over what `tensors` gave."""
        ...
