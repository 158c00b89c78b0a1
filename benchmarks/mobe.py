"""Fit MoBE, the published method that GloBE is held against: atoms per layer, dense convex codes, plain Adam.

For a family and each layer separately, over its E experts i with normalised weights W_i (P, D):

    minimise  sum_i || W_i - A_i f(sum_j softmax(theta_i)_j B_j) ||^2

A_i (P, R) adapters, B_j (R, D) the m atoms of the layer, theta_i (m,) logits, f silu, tanh or identity. Adam at lr 0.07
on all three at once. After "MoBE: Mixture-of-Basis-Experts for Compressing MoE-based LLMs" (arXiv 2508.05257), written
from the description in the paper. Where the paper leaves a choice, the choice favours MoBE:

* One mean and one scale normalise a family. At the end both are folded into the adapters, by least squares on the raw
  weights and the stored atoms as `globe_fit.finish` does it: the scale exactly, the mean as far as it lies in the row
  space of the basis.
* The result is the best state on the way, not the last state.
* A layer gets atoms in proportion to its experts, all layers together as many as the GloBE bank of `sizes`: with the
  same rank, the same bytes but for the codes.
* Both starts have atoms of RMS 0.3. Cold: Gaussian atoms, logits and adapters. Warm: grouped SVD within the layer, with
  least-squares adapters. A softmax of finite logits never selects a single atom, so the warm atoms are unmixed:
  theta_i is 3 on the group of the expert and 0 elsewhere, and B solves softmax(theta) B = the SVD atoms. The bases at
  step 0 are the SVD bases, whatever the logits, and the logits still have a gradient.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from globe_fit.data.source import ExpertLayer
from globe_fit.data.stream import FamilyWeights, share
from globe_fit.linalg import refit_adapters, solve_adapters
from globe_fit.solvers.start import group_of_experts, grouped_svd
from globe_kernels.errors import GlobeError, RequestError
from globe_kernels.format.checkpoint import GlobeConfig
from globe_kernels.format.names import FAMILIES, PHIS
from globe_kernels.ops.compose_basis import PHI_FUNCTIONS

Clock = Callable[[], float]

_START_RMS = 0.3
_WARM_LOGIT = 3.0
_RIDGE = 1e-6  # of the adapters at the warm start


@dataclass(frozen=True)
class MobeConfig:
    """Settings of the baseline. Raises RequestError for a setting out of its range."""

    steps: int = 5000
    lr: float = 0.07
    phi: str = "silu"
    warm_start: bool = False
    seed: int = 0

    def __post_init__(self):
        if self.phi not in PHIS:
            raise RequestError(f"phi is {self.phi!r}; expected one of {', '.join(PHIS)}.")
        if self.steps < 0 or not self.lr > 0:
            raise RequestError(f"steps is {self.steps} and lr {self.lr}; expected steps from 0 and a positive lr.")


@dataclass(frozen=True)
class MobeLayer:
    """The stored factors of a layer and family."""

    bank: torch.Tensor  # (m, R, D)
    codes: torch.Tensor  # (E, m) float32: softmax of the logits
    adapter: torch.Tensor  # (E, P, R)


@dataclass(frozen=True)
class MobeFit:
    """The fit of a family. `history` has (step, seconds, error of the best state so far, before the refit)."""

    phi: str
    layers: dict[int, MobeLayer]
    relative_error: float  # squared, of the stored factors on the raw weights
    history: list[tuple[int, float, float]]
    completed: bool  # False: a layer diverged, and its best state before was kept

    @property
    def num_bytes(self) -> int:
        """Count the bytes of all stored factors."""
        tensors = [t for factors in self.layers.values() for t in (factors.bank, factors.codes, factors.adapter)]
        return sum(tensor.nbytes for tensor in tensors)

    def reconstruct(self, layer: ExpertLayer, experts: range | None = None) -> torch.Tensor:
        """Return the dense weights (E, P, D) float32 of the given experts of a layer, by default all."""
        factors = self.layers[layer.layer]
        chosen = slice(None) if experts is None else slice(experts.start, experts.stop)
        return factors.adapter[chosen].float() @ _basis(factors.bank.float(), factors.codes[chosen], self.phi)


def fit_mobe(
    weights: FamilyWeights, sizes: GlobeConfig, config: MobeConfig, clock: Clock = time.perf_counter
) -> MobeFit:
    """Fit MoBE with the rank, the number of atoms and the dtype of `sizes`, a layer in memory at a time.

    `clock` tells the seconds of the history. A seed gives one result on a machine. Raises RequestError when a layer
    gets no atom, GlobeError when the start is not finite.
    """
    sizes = replace(sizes, scope="layer")
    base, statistics = sizes.base, weights.statistics
    if sizes.num_atoms * min(base.num_experts.values()) < base.total_experts:
        raise RequestError(
            f"{sizes.num_atoms} atoms leave a layer of {base.name} without atoms; give at least one atom per layer."
        )
    began = clock()
    generator = torch.Generator().manual_seed(config.seed + FAMILIES.index(weights.family))
    groups = group_of_experts(base, sizes.num_atoms, "layer").to(weights.device)
    svd_atoms = grouped_svd(weights, sizes).mul_(_START_RMS) if config.warm_start else None
    seconds = [clock() - began] * (config.steps + 1)
    lost_at, lost, completed, layers = [0.0] * (config.steps + 1), 0.0, True, {}
    for layer, span in weights.source.layer_spans:
        raw = weights.source.read(layer, weights.family).to(weights.device)
        target = (raw - statistics.mean) / statistics.scale
        first, last = int(groups[span][0]), int(groups[span][-1])
        atoms_of_layer = None if svd_atoms is None else svd_atoms[first : last + 1]
        start = _start(target, sizes.rank, groups[span] - first, atoms_of_layer, config.phi, generator)
        best, trace = _descend(target, start, config, clock)
        for step in range(config.steps + 1):
            took, error = trace[min(step, len(trace) - 1)]
            seconds[step] += took
            lost_at[step] += error
        completed &= len(trace) == config.steps + 1
        layers[layer.layer], residual = _store(raw, best, sizes.torch_dtype, config.phi)
        lost += residual
    history = [
        (step, took, error / weights.normalised_energy)
        for step, (took, error) in enumerate(zip(seconds, lost_at, strict=True))
    ]
    return MobeFit(config.phi, layers, share(lost, statistics.total_energy), history, completed)


def _basis(bank: torch.Tensor, codes: torch.Tensor, phi: str) -> torch.Tensor:
    """Compose the bases (E, R, D) from atoms (m, R, D) and codes (E, m)."""
    return PHI_FUNCTIONS[phi](codes @ bank.flatten(1)).view(-1, *bank.shape[1:])


def _start(
    target: torch.Tensor,
    rank: int,
    group: torch.Tensor,
    svd_atoms: torch.Tensor | None,
    phi: str,
    generator: torch.Generator,
) -> list[torch.Tensor]:
    """Return adapters (E, P, R), atoms (m, R, D), logits (E, m) for `target` (E, P, D); warm with `svd_atoms`."""
    (experts, inner, width), count = target.shape, int(group[-1]) + 1
    if svd_atoms is None:
        shapes = (experts, inner, rank), (count, rank, width), (experts, count)
        adapter, bank, logits = (torch.randn(shape, generator=generator).to(target) for shape in shapes)
        return [adapter.mul_(_START_RMS), bank.mul_(_START_RMS), logits]
    of_groups = _WARM_LOGIT * torch.eye(count).to(target)
    bank = torch.linalg.solve(of_groups.softmax(1), svd_atoms.flatten(1)).view_as(svd_atoms)
    logits = of_groups[group]
    return [solve_adapters(target, _basis(bank, logits.softmax(1), phi), _RIDGE), bank, logits]


def _descend(
    target: torch.Tensor, start: list[torch.Tensor], config: MobeConfig, clock: Clock
) -> tuple[list[torch.Tensor], list[tuple[float, float]]]:
    """Return the best state, and its (seconds, squared error) by step; the list ends early where Adam diverged."""
    adapter, bank, logits = parameters = [tensor.contiguous().requires_grad_() for tensor in start]
    optimizer = torch.optim.Adam(parameters, lr=config.lr, fused=True)
    best, lowest, trace, began = [tensor.detach().clone() for tensor in parameters], math.inf, [], clock()
    for step in range(config.steps + 1):
        loss = (target - adapter @ _basis(bank, logits.softmax(1), config.phi)).square().sum()
        lost = loss.item()
        if not math.isfinite(lost):
            break
        if lost < lowest:
            lowest = lost
            for kept, tensor in zip(best, parameters, strict=True):
                kept.copy_(tensor.detach())
        trace.append((clock() - began, lowest))
        if step < config.steps:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    if not trace:
        raise GlobeError("The start of a MoBE fit is not finite; the weights of this layer are too large for float32.")
    return best, trace


def _store(raw: torch.Tensor, state: list[torch.Tensor], dtype: torch.dtype, phi: str) -> tuple[MobeLayer, float]:
    """Return the layer in the stored dtype, with adapters refitted on `raw` (E, P, D), and its squared error."""
    _, bank, logits = state
    bank, codes = bank.to(dtype), logits.softmax(1)
    basis = _basis(bank.float(), codes, phi)
    adapter = refit_adapters(raw, basis).to(dtype)
    residual = raw - adapter.float() @ basis
    return MobeLayer(bank.cpu(), codes.cpu(), adapter.cpu()), residual.square().sum(dtype=torch.float64).item()
