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
from contextlib import contextmanager

import torch

from globe_fit.config import VarProConfig
from globe_fit.data.stream import Block, FamilyWeights
from globe_fit.linalg import SingularBasisError, solve_adapters
from globe_fit.solvers.base import BankState, code_index
from globe_fit.solvers.start import allowed_atoms
from globe_fit.solvers.support import candidate_atoms, fix_support
from globe_kernels.format.checkpoint import GlobeConfig
from globe_kernels.ops.compose_basis import PHI_FUNCTIONS


class VarPro:
    """The solver, from `state` on, which it changes in place: first to the candidates of each expert. From the step at
    which the support is fixed on, no expert has more than its support and no layer more than its palette."""

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
        # fused: without temporaries of the size of the bank
        self._adam = torch.optim.Adam([{"params": [bank]}, {"params": [codes]}], betas=config.betas, fused=True)
        self._step, self._fixed = 0, False

    def _allow(self, allowed: torch.Tensor) -> None:
        self._allowed, self._index = allowed, code_index(allowed)

    def evaluate(self) -> float:
        if not self._fixed and self._step >= self._config.support_at * self._config.steps:
            self._allow(fix_support(self.state, self._allowed, self._sizes, self._weights.ranks))
            self._fixed = True
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
            codes.mul_(self._allowed)  # momentum from before the support was fixed
        self._step += 1

    def tensors(self) -> dict[str, torch.Tensor]:
        counters = torch.tensor([self._step, self._fixed])
        rates = torch.tensor(self._rates, dtype=torch.float64)
        own = {"bank": self.state.bank, "codes": self.state.codes, "allowed": self._allowed}
        own |= {"counters": counters, "rates": rates}
        for name, parameter in (("bank", self.state.bank), ("codes", self.state.codes)):
            own |= {f"adam.{name}.{key}": value for key, value in self._adam.state[parameter].items()}
        return {name: tensor.detach() for name, tensor in own.items()}

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


def eliminated_error(weights: FamilyWeights, state: BankState, index: torch.Tensor, ridge: float) -> float:
    """The relative error; block by block, its gradient is added to the parts of the state that require one.

    The codes are zero but at `index` (n, C), and have no gradient elsewhere. Of several ranks each adds the gradient of
    its own columns of the bank; that of the codes is summed over them.
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
    """Add the gradients of what one block, in the columns of this rank, adds to the relative error, where the state
    requires some; returns it."""
    mixture, add_gradients = state.mixture(block.places, index[block.places])
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
    """Inside, matrix products on a GPU may round their factors to TF32, ten bits of mantissa, and sum in fp32.

    For A_i Bhat_i and A_i^T times the residual: they only say where the solve, which is fp32 with its Gram matrices,
    has led to, to a relative 1e-3 of the residual.
    """
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _schedule(step: int, config: VarProConfig) -> float:
    """Linear warm-up, then a cosine to `final_lr_scale`."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(config.steps - config.warmup_steps, 1)
    return config.final_lr_scale + (1 - config.final_lr_scale) * 0.5 * (1 + math.cos(math.pi * progress))
