"""Fit by variable projection: the adapters are eliminated, Adam runs on the bank and the codes.

    f(B, alpha) = min_A sum_i || W_i - A_i phi(sum_j alpha_ij B_j) ||^2

At the minimising A_i the gradient of f in the basis is the gradient of the residual with A_i held constant (envelope
theorem; Golub and Pereyra, 1973), so no gradient runs through the least-squares solve. The adapters have no state, and
f does not depend on the coordinates that an expert chooses for its basis. Every step is one pass over the experts
in blocks. In memory are the bank, the codes, their gradients and moments, and one block of weights.

The rates need no tuning. A step is in units of the tensor that it moves, whatever the number of weights
(globe_fit.solvers.adam). With phi identity f does not depend on the scale of the bank or on the scale of the codes of
an expert, and steps let both scales grow, unevenly, until steps in the first units hardly turn anything; so both are
brought back to RMS 1 every _RESCALE_EVERY steps.

The steps come in cycles, each twice as long as the cycle before. In a cycle the rate rises for `warmup_steps` and then
falls to zero. So the error is low at the end of every cycle, and the fall from the end of a cycle to the end of the
next is what twice the steps gain: the fit ends where this is less than `plateau`. A long cycle averages gradients over
more steps: b1 = 1 - 2 / sqrt(steps of the cycle), 1 - b2 = (1 - b1) / 2.
"""

import math
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate

import torch

from globe_fit.config import VarProConfig
from globe_fit.data.stream import Block, FamilyWeights
from globe_fit.linalg import SingularBasisError
from globe_fit.solvers.adam import Moments
from globe_fit.solvers.base import BankState, Pass, code_index
from globe_fit.solvers.objective import backward_block, eliminated_error
from globe_fit.solvers.start import allowed_atoms
from globe_fit.solvers.support import candidate_atoms, fix_support
from globe_kernels.format.checkpoint import GlobeConfig

_RESCALE_EVERY = 20  # steps
_LEAST_AVERAGED = 25  # b1 of a shorter cycle is that of a cycle of so many steps, 0.6


class VarPro:
    """The solver; it changes `state` in place, at first by reducing the codes to the candidates of each expert.

    The support is fixed when the first warm-up ends. Then no expert has more atoms than its support and no layer more
    than its palette.
    """

    def __init__(self, weights: FamilyWeights, state: BankState, sizes: GlobeConfig, config: VarProConfig):
        self.state, self._weights, self._sizes, self._config = state, weights, sizes, config
        self.extras: dict[str, float] = {}
        self.finished = False
        bank, codes = state.bank.requires_grad_(), state.codes.requires_grad_()
        allowed = allowed_atoms(sizes.base, sizes.num_atoms, sizes.scope).to(codes.device)
        self._allow(candidate_atoms(state, allowed, sizes, config.candidates))
        codes.data.mul_(self._allowed)
        self._unit = self._bank_rms()
        self._moments = {"bank": Moments.of(bank), "codes": Moments.of(codes)}
        self._cycles = cycles(config.steps, config.first_cycle)
        self._ends = list(accumulate(self._cycles))
        self._errors: list[float] = []  # at the ends of the cycles
        self._step, self._fixed = 0, False

    def _allow(self, allowed: torch.Tensor) -> None:
        self._allowed, self._index = allowed, code_index(allowed)

    def _fix(self) -> None:
        self._allow(fix_support(self.state, self._allowed, self._sizes, self._weights.ranks))
        self._fixed = True

    def evaluate(self) -> float:
        if not self._fixed and self._step >= self._warmup(0):
            self._fix()
        if self._fixed and self._step % _RESCALE_EVERY == 0 and self.state.phi == "identity":
            self._rescale()
        self.state.bank.grad = self.state.codes.grad = None
        self.extras = {}
        try:
            error = eliminated_error(self._weights, self.state, self._index, self._config.ridge)
        except SingularBasisError:
            return math.nan
        if self._step in self._ends[len(self._errors) :]:
            before = self._errors[-1] if self._errors else math.inf
            self._errors.append(error)
            gain = 1 - error / before if before else 0.0
            if len(self._errors) > 1:
                self.extras["cycle_gain"] = gain
            self.finished = gain < self._config.plateau
        return error

    def update(self) -> None:
        bank, codes = self.state.bank, self.state.codes
        assert bank.grad is not None and codes.grad is not None
        cycle = bisect_right(self._ends, self._step)
        length, warmup = self._cycles[cycle], self._warmup(cycle)
        at = self._step - self._ends[cycle] + length
        rate = self._config.lr * ((at + 1) / warmup if at < warmup else (length - at) / (length - warmup))
        averaged = 2 / math.sqrt(max(length, _LEAST_AVERAGED))
        betas = (1 - averaged, 1 - averaged / 2)
        self._moments["bank"].step(bank, bank.grad, rate * self._unit, betas)
        self._moments["codes"].step(codes, codes.grad.mul_(self._allowed), rate * self._config.code_lr_scale, betas)
        with torch.no_grad():
            codes.mul_(self._allowed)  # there is momentum from before the support was fixed
        self._step += 1

    def _warmup(self, cycle: int) -> int:
        """Return the steps of a cycle in which the rate rises."""
        return min(self._config.warmup_steps, self._cycles[cycle] // 5)

    def _bank_rms(self) -> float:
        norms = self.state.atom_norms(self._weights.ranks).double()
        return (norms.square().mean().item() / (self._sizes.rank * self._sizes.base.hidden_size)) ** 0.5

    @torch.no_grad()
    def _rescale(self) -> None:
        """Give the bank the RMS that it began with, and the codes of every expert RMS 1."""
        rms = self._bank_rms()
        scale = self._unit / rms if rms else 1.0
        self.state.bank.mul_(scale)
        self._moments["bank"].rescale(scale)
        rms = (self.state.codes.square().sum(1, keepdim=True) / self._allowed.sum(1, keepdim=True)).sqrt()
        scales = torch.where(rms > 0, 1 / rms, 1.0)
        self.state.codes.mul_(scales)
        self._moments["codes"].rescale(scales)

    def passes(self) -> Iterator[Pass]:
        def visit(block: Block) -> None:
            backward_block(self._weights, block, self.state, self._index, self._config.ridge)

        free = self._warmup(0)
        yield Pass(free, visit)
        self._fix()
        yield Pass(self._config.steps + 1 - free, visit)

    def tensors(self) -> dict[str, torch.Tensor]:
        tensors = {"bank": self.state.bank, "codes": self.state.codes, "allowed": self._allowed}
        tensors["counters"] = torch.tensor([self._step, self._fixed])
        tensors["facts"] = torch.tensor([self._unit, *self._errors], dtype=torch.float64)
        for name, moments in self._moments.items():
            tensors |= {f"{name}.first": moments.first, f"{name}.second": moments.second}
            tensors[f"{name}.left"] = torch.tensor(moments.left, dtype=torch.float64)
        return {name: tensor.detach() for name, tensor in tensors.items()}

    @torch.no_grad()
    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        self.state.bank.copy_(tensors["bank"])
        self.state.codes.copy_(tensors["codes"])
        self._allow(tensors["allowed"].to(self._allowed.device))
        self._step, self._fixed = int(tensors["counters"][0]), bool(tensors["counters"][1])
        self._unit, *self._errors = tensors["facts"].tolist()
        for name, moments in self._moments.items():
            moments.first.copy_(tensors[f"{name}.first"])
            moments.second.copy_(tensors[f"{name}.second"])
            moments.left = tuple(tensors[f"{name}.left"].tolist())


def cycles(steps: int, first: int) -> list[int]:
    """Return the lengths of the cycles of `steps` in all: each twice the length before, the last takes what is left."""
    lengths = [min(steps, first)]
    while (left := steps - sum(lengths)) >= 2 * lengths[-1] > 0:
        lengths.append(2 * lengths[-1])
    lengths[-1] += left
    return lengths
