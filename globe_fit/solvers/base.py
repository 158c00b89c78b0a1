"""Define the state that every solver improves, and the protocol by which a fit drives a solver."""

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
    """Atoms (M, R, D) and dense codes (n, M), zero outside each support.

    Each of several ranks has its columns of the atoms, and all codes.
    """

    bank: torch.Tensor
    codes: torch.Tensor
    phi: str

    def basis(self, span: slice) -> torch.Tensor:
        """Compose the bases (E, R, D) of the experts of `span`, without gradients."""
        index = code_index(self.codes.detach()[span] != 0)
        return PHI_FUNCTIONS[self.phi](self.mixture(span, index)[0])

    def mixture(self, span: slice, index: torch.Tensor) -> tuple[torch.Tensor, Callable[[torch.Tensor], None]]:
        """Return the mixtures (E, R, D) of the experts of `span`, to which phi applies, and their backward function.

        The codes are zero but at `index` (E, C). The backward function takes the gradient of the mixtures and adds to
        the gradients of bank and codes, where they require gradients.
        """
        # detached: gradients run through the backward function alone
        value = self.codes.detach()[span].gather(1, index.long())
        found, backward = mixture(index, value, self.bank.detach())

        @torch.no_grad()
        def add_gradients(gradient: torch.Tensor) -> None:
            value_gradient = backward(gradient, _gradient(self.bank) if self.bank.requires_grad else None)
            if self.codes.requires_grad:
                _gradient(self.codes)[span].scatter_add_(1, index.long(), value_gradient)

        return found, add_gradients

    def atom_norms(self, ranks: Ranks = ALONE) -> torch.Tensor:
        """Return the Frobenius norms (M,) of the atoms."""
        squares = torch.linalg.vector_norm(self.bank.detach(), dim=(1, 2)).double().square()
        ranks.all_sum(squares)
        return squares.sqrt().float()

    def copy(self, dtype: torch.dtype | None = None) -> "BankState":
        """Copy the values, without gradients; the atoms in `dtype`, by default their own."""
        return BankState(self.bank.detach().to(dtype, copy=True), self.codes.detach().clone(), self.phi)

    @torch.no_grad()
    def copy_(self, other: "BankState") -> None:
        """Take over the values of `other`."""
        self.bank.copy_(other.bank)
        self.codes.copy_(other.codes)


def support_index(used: torch.Tensor, size: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the ids (n, S) int64 of the atoms of `used` (n, M) bool, ascending, and whether each id is such an atom.

    S is `size`, or the largest support; the rows of smaller supports end with other atoms.
    """
    size = int(used.sum(1).max()) if size is None else size
    index = torch.argsort(~used, dim=1, stable=True)[:, :size]
    return index, used.gather(1, index)


def code_index(used: torch.Tensor) -> torch.Tensor:
    """Return the ids of `support_index` in int32, as the kernels read them."""
    return support_index(used)[0].int()


def _gradient(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.grad is None:
        tensor.grad = torch.zeros_like(tensor)
    return tensor.grad


@dataclass(frozen=True)
class Pass:
    """A kind of pass over all experts: how many passes a fit takes, and the work of a pass on one block."""

    count: int
    visit: Callable[[Block], object]


def steps_before_fixing(steps: int, support_at: float) -> int:
    """Count the steps that a solver takes before it fixes the support."""
    return min(math.ceil(support_at * steps), steps)


class Solver(Protocol):
    """Improve `state` in place, one step at a time: evaluate, update, evaluate, ...

    A solver is deterministic: restored from the tensors that another solver gave after an update, it takes the same
    steps as the other.
    """

    state: BankState
    extras: dict[str, float]  # metrics of this solver alone, as of the last update
    finished: bool  # as of the last evaluate: further steps would not pay

    def evaluate(self) -> float:
        """Return the relative error of the state on the normalised weights; NaN when it diverged."""
        ...

    def update(self) -> None:
        """Take a step from the state that `evaluate` saw."""
        ...

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return all tensors that the next step depends on."""
        ...

    def passes(self) -> Iterator[Pass]:
        """Yield the passes of a whole fit, for an estimate of its time; work on bank and codes alone is left out.

        Visit a block by each pass before you ask for the next pass: the codes follow the phases of a fit. The solver
        cannot fit after that.
        """
        ...

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take over the tensors of another solver."""
        ...
