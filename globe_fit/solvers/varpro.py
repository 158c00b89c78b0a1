"""Fit by variable projection: the adapters are eliminated, Adam runs on the bank and the codes.

    f(B, alpha) = min_A sum_i || W_i - A_i phi(sum_j alpha_ij B_j) ||^2

At the minimising A_i the gradient of f in the basis is the gradient of the residual with A_i held constant (envelope
theorem; Golub and Pereyra, 1973), so no gradient runs through the least-squares solve. The adapters have no state, and
f does not depend on the coordinates that an expert chooses for its basis. Every step is one pass over the experts
in blocks. In memory are the bank, the codes, their Adam state and one block of weights.
"""

import math
from collections.abc import Iterator

import torch

from globe_fit.config import VarProConfig
from globe_fit.data.stream import Block, FamilyWeights
from globe_fit.linalg import SingularBasisError
from globe_fit.solvers.base import BankState, Pass, code_index, steps_before_fixing
from globe_fit.solvers.objective import backward_block, eliminated_error
from globe_fit.solvers.start import allowed_atoms
from globe_fit.solvers.support import candidate_atoms, fix_support
from globe_kernels.format.checkpoint import GlobeConfig


class VarPro:
    """The solver; it changes `state` in place, at first by reducing the codes to the candidates of each expert.

    Once the support is fixed, no expert has more atoms than its support and no layer more than its palette.
    """

    def __init__(self, weights: FamilyWeights, state: BankState, sizes: GlobeConfig, config: VarProConfig):
        self.state, self._weights, self._sizes, self._config = state, weights, sizes, config
        self.extras: dict[str, float] = {}
        self.finished = False
        bank, codes = state.bank.requires_grad_(), state.codes.requires_grad_()
        allowed = allowed_atoms(sizes.base, sizes.num_atoms, sizes.scope).to(codes.device)
        self._allow(candidate_atoms(state, allowed, sizes, config.candidates))
        codes.data.mul_(self._allowed)
        square = bank.detach().square().mean().sqrt().item() ** 2
        rms = weights.ranks.sums(square * (bank.shape[2] / sizes.base.hidden_size))[0] ** 0.5
        self._rates = (config.lr * rms, config.lr * config.code_lr_scale)
        # fused: no temporaries of the size of the bank
        self._adam = torch.optim.Adam([{"params": [bank]}, {"params": [codes]}], betas=config.betas, fused=True)
        self._step, self._fixed = 0, False

    def _allow(self, allowed: torch.Tensor) -> None:
        self._allowed, self._index = allowed, code_index(allowed)

    def _fix(self) -> None:
        self._allow(fix_support(self.state, self._allowed, self._sizes, self._weights.ranks))
        self._fixed = True

    def evaluate(self) -> float:
        if not self._fixed and self._step >= self._config.support_at * self._config.steps:
            self._fix()
        self._adam.zero_grad(set_to_none=True)
        try:
            return eliminated_error(self._weights, self.state, self._index, self._config.ridge)
        except SingularBasisError:
            return math.nan

    def update(self) -> None:
        codes = self.state.codes
        assert codes.grad is not None
        codes.grad.mul_(self._allowed)
        for group, rate in zip(self._adam.param_groups, self._rates, strict=True):
            group["lr"] = rate * _schedule(self._step, self._config)
        self._adam.step()
        with torch.no_grad():
            codes.mul_(self._allowed)  # Adam has momentum from before the support was fixed
        self._step += 1

    def passes(self) -> Iterator[Pass]:
        def visit(block: Block) -> None:
            backward_block(self._weights, block, self.state, self._index, self._config.ridge)

        free = steps_before_fixing(self._config.steps, self._config.support_at)
        yield Pass(free, visit)
        self._fix()
        yield Pass(self._config.steps + 1 - free, visit)

    def tensors(self) -> dict[str, torch.Tensor]:
        counters = torch.tensor([self._step, self._fixed])
        rates = torch.tensor(self._rates, dtype=torch.float64)
        tensors = {"bank": self.state.bank, "codes": self.state.codes, "allowed": self._allowed}
        tensors |= {"counters": counters, "rates": rates}
        for name, parameter in (("bank", self.state.bank), ("codes", self.state.codes)):
            tensors |= {f"adam.{name}.{key}": value for key, value in self._adam.state[parameter].items()}
        return {name: tensor.detach() for name, tensor in tensors.items()}

    @torch.no_grad()
    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        self.state.bank.copy_(tensors["bank"])
        self.state.codes.copy_(tensors["codes"])
        self._allow(tensors["allowed"].to(self._allowed.device))
        self._step, self._fixed = int(tensors["counters"][0]), bool(tensors["counters"][1])
        first, second = tensors["rates"].tolist()
        self._rates = (first, second)
        for name, parameter in (("bank", self.state.bank), ("codes", self.state.codes)):
            prefix = f"adam.{name}."
            self._adam.state[parameter] = {
                key.removeprefix(prefix): value.to(parameter.device)
                for key, value in tensors.items()
                if key.startswith(prefix)
            }


def _schedule(step: int, config: VarProConfig) -> float:
    """Return the scale of the learning rate at a step: linear warm-up, then a cosine to `final_lr_scale`."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(config.steps - config.warmup_steps, 1)
    return config.final_lr_scale + (1 - config.final_lr_scale) * 0.5 * (1 + math.cos(math.pi * progress))
