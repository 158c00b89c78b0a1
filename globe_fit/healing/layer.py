"""Heal one layer: train its adapters until its outputs are near the outputs of the dense layer, on the same inputs.

For a token t that is routed to experts i with router weights w_ti, x_t its hidden state, h the activation, V_i down:

    y_t(A) = sum_i w_ti V_i h(A_gate,i Bhat_gate,i x_t, A_up,i Bhat_up,i x_t)

    minimise  sum_t || y_t(A) - y_t ||^2 / sum_t || y_t ||^2         over the adapters A of all experts of the layer

y_t is the output of the dense experts. The bases Bhat stay as they are, rounded as the runtime rounds them, so no other
layer changes. Biases are those of the model.

1. A closed form: each A_i is fitted again to W_i by least squares, in the moment of the tokens that are routed to i,
   each weighted by w^2, shrunk towards the moment of the layer.
2. Adam on A for a few epochs of tokens. Rates are relative to the RMS of A, so that they need no tuning for a model.

A tenth of the tokens is held out. The adapters that are returned have the least error on these tokens, in the dtype in
which they are stored; they may be the adapters of the start.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F

from globe_fit.healing.inputs import RoutedInputs
from globe_fit.linalg import SingularBasisError, solve_adapters
from globe_kernels.format.layout import DOWN
from globe_kernels.format.names import FAMILIES
from globe_kernels.ops.activations import gated_activation

_HELD_OUT = 0.1  # of the tokens
_SHRINKAGE, _FLOOR = 0.3, 1e-3  # of the moment of an expert: towards the moment of its layer, towards I
_RIDGE = 1e-9
_EPOCHS = 3
_ROWS = 100  # tokens that an expert sees in a step, on average
_RATE, _FINAL_RATE, _WARMUP = 3e-3, 0.05, 20  # of the RMS of the adapters; share of it at the end; steps
_BETAS, _EPSILON = (0.9, 0.99), 1e-16  # gradients of an error that is small already are small
CHUNK = 4096  # tokens that are computed together where no gradient is needed

Adapters = Mapping[str, torch.Tensor]  # {family: (E, P, R)}
Projection = Callable[[torch.Tensor], list[torch.Tensor]]  # inputs of an expert (n, D) -> its gate and up (n, P)


@dataclass(frozen=True)
class HealedLayer:
    """The adapters of a healed layer, and its relative squared error on tokens that were held out."""

    FACTS = ("before", "after", "steps")

    adapters: Adapters  # in the dtype in which they are stored
    before: float  # NaN where an output is not finite
    after: float
    steps: int  # of Adam
    diverged: bool = False  # the adapters are the best from before

    @property
    def facts(self) -> dict:
        """Return the figures in JSON types."""
        values = {name: getattr(self, name) for name in self.FACTS}
        return {name: value if math.isfinite(value) else None for name, value in values.items()}


@dataclass(frozen=True)
class LayerExperts:
    """The parts of one layer that healing does not change, on the device of the healing."""

    bases: Adapters  # {family: (E, R, D)} as the runtime composes them
    kept: Mapping[str, torch.Tensor]  # down_proj (E, D, P), and biases where the experts have them
    activation: str
    dense: Callable[[str, int], torch.Tensor]  # (family, expert) -> W (P, D) float32

    def outputs(self, inputs: RoutedInputs, of_expert: Callable[[int], Projection]) -> torch.Tensor:
        """Return the outputs (T, D) float32 of the experts whose gate and up are given by `of_expert`."""
        act = gated_activation(self.activation)
        out = torch.zeros(inputs.hidden.shape, device=inputs.hidden.device)
        for expert, tokens, weight in _routes(inputs, len(self.kept[DOWN])):
            project, down, bias = of_expert(expert), self.kept[DOWN][expert].float(), self._bias("down", expert)
            for part, scale in zip(tokens.split(CHUNK), weight.split(CHUNK), strict=True):
                y = F.linear(act(*project(inputs.hidden[part].float())), down, bias)
                out.index_add_(0, part, y * scale[:, None])
        return out

    def as_dense(self, expert: int) -> Projection:
        """Return the function of the inputs of a dense expert that gives gate and up."""
        layers = [(self.dense(family, expert), self._bias(family, expert)) for family in FAMILIES]
        return lambda x: [F.linear(x, *layer) for layer in layers]

    def compressed(self, adapters: Adapters) -> Callable[[int], Projection]:
        """Return `as_dense` of the experts with these adapters."""
        parts = [adapters[family].unbind() for family in FAMILIES]  # one gradient for all experts

        def of_expert(expert: int) -> Projection:
            layers = [
                (self.bases[family][expert].float(), part[expert].float(), self._bias(family, expert))
                for family, part in zip(FAMILIES, parts, strict=True)
            ]
            return lambda x: [F.linear(F.linear(x, basis), adapter, bias) for basis, adapter, bias in layers]

        return of_expert

    def _bias(self, matrix: str, expert: int) -> torch.Tensor | None:
        found = self.kept.get(f"{matrix}_bias")
        return None if found is None else found[expert].float()


def heal_layer(
    experts: LayerExperts,
    inputs: RoutedInputs,
    stored: Adapters,
    seed: int,
    on_epoch: Callable[[float], None] = lambda done: None,
) -> HealedLayer:
    """Heal the layer of `experts`, whose adapters are `stored`; `on_epoch` gets the share of the work that is done.

    Memory beside the arguments: of the adapters in fp32 five times (adapters, gradient, two of Adam, a sum) and the
    best as stored, of the tokens (T, D) in fp32, and the rows of a step.
    """
    held = max(1, int(_HELD_OUT * len(inputs)))
    # the targets expert by expert over all tokens: a dense expert is read once
    with torch.no_grad():
        target = experts.outputs(inputs, experts.as_dense)
    training, test = slice(0, len(inputs) - held), slice(len(inputs) - held, None)
    seen, wanted = inputs[training], target[training]
    energy = wanted.square().mean()

    def error(adapters: Adapters) -> float:
        return _relative_error(experts, inputs[test], target[test], adapters)

    best, before = dict(stored), error(stored)
    after = before
    if not (energy > 0 and before > 0):  # no token reaches an expert, or nothing is lost
        return HealedLayer(best, before, before, 0)

    def keep_if_better(adapters: Adapters) -> float:
        nonlocal best, after
        rounded = {family: adapters[family].detach().to(stored[family].dtype) for family in FAMILIES}
        if (found := error(rounded)) < after:
            best, after = rounded, found
        return found

    try:
        refitted = _refit(experts, seen, stored)
    except SingularBasisError:
        refitted = stored
    on_epoch(1 / (_EPOCHS + 1))
    adapters = refitted if keep_if_better(refitted) == after else stored
    trained = {family: adapters[family].float().clone().requires_grad_() for family in FAMILIES}
    del refitted, adapters
    rates = [_RATE * each.detach().square().mean().sqrt().item() for each in trained.values()]
    groups = [{"params": [each], "rate": rate} for each, rate in zip(trained.values(), rates, strict=True)]
    adam = torch.optim.Adam(groups, betas=_BETAS, eps=_EPSILON)
    generator = torch.Generator().manual_seed(seed)
    size = tokens_of_step(len(stored[FAMILIES[0]]), inputs.index.shape[1])
    steps_each = -(-len(seen) // size)
    for epoch in range(_EPOCHS):
        order = torch.randperm(len(seen), generator=generator).to(inputs.hidden.device)
        for number, tokens in enumerate(order.split(size)):
            for group in adam.param_groups:
                group["lr"] = group["rate"] * _schedule(epoch * steps_each + number, _EPOCHS * steps_each)
            lost = experts.outputs(seen[tokens], experts.compressed(trained)) - wanted[tokens]
            adam.zero_grad()
            (lost.square().mean() / energy).backward()
            adam.step()
        if not math.isfinite(keep_if_better(trained)):
            return HealedLayer(best, before, after, (epoch + 1) * steps_each, diverged=True)
        on_epoch((epoch + 2) / (_EPOCHS + 1))
    return HealedLayer(best, before, after, _EPOCHS * steps_each)


def tokens_of_step(num_experts: int, top_k: int) -> int:
    """Return the tokens of a step of Adam for a layer of `num_experts`."""
    return max(1, _ROWS * num_experts // top_k)


def _schedule(step: int, steps: int) -> float:
    """Return the scale of the rate at a step: a linear warm-up, and a cosine to `_FINAL_RATE`."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return min(1.0, (step + 1) / _WARMUP) * (_FINAL_RATE + (1 - _FINAL_RATE) * cosine)


def _routes(inputs: RoutedInputs, num_experts: int) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Yield every expert that has tokens, with their places (n,) and router weights (n,)."""
    ids, order = inputs.index.flatten().sort(stable=True)
    bounds = torch.searchsorted(ids, torch.arange(num_experts + 1, device=ids.device)).tolist()
    weights, top_k = inputs.weight.flatten(), inputs.index.shape[1]
    for expert, (start, stop) in enumerate(pairwise(bounds)):
        if start < stop:
            routed = order[start:stop]
            yield expert, routed // top_k, weights[routed]


@torch.no_grad()
def _relative_error(experts: LayerExperts, inputs: RoutedInputs, target: torch.Tensor, adapters: Adapters) -> float:
    """Return the squared error of the outputs over the energy of `target`; NaN where it is not finite."""
    project, lost = experts.compressed(adapters), 0.0
    for start in range(0, len(inputs), CHUNK):
        part = slice(start, start + CHUNK)
        lost += (experts.outputs(inputs[part], project) - target[part]).square().sum(dtype=torch.float64).item()
    energy = target.square().sum(dtype=torch.float64).item()
    if not math.isfinite(lost):
        return math.nan
    return lost / energy if energy else 0.0


@torch.no_grad()
def _refit(experts: LayerExperts, inputs: RoutedInputs, stored: Adapters) -> Adapters:
    """Fit every adapter again by least squares in the moment of the tokens that are routed to its expert."""
    of_layer = _normalised(_moment(inputs.hidden, None))
    fitted = {family: stored[family].float().clone() for family in FAMILIES}
    for expert, tokens, weight in _routes(inputs, len(experts.kept[DOWN])):
        moment = _normalised(_moment(inputs.hidden[tokens], weight)).add_(of_layer, alpha=_SHRINKAGE)
        moment.diagonal().add_(_FLOOR)
        root = torch.linalg.cholesky(moment)
        for family in FAMILIES:
            target, basis = experts.dense(family, expert).double() @ root, experts.bases[family][expert].double() @ root
            fitted[family][expert] = solve_adapters(target[None], basis[None], _RIDGE)[0].float()
    return fitted


def _moment(hidden: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    """Return sum_t w_t^2 x_t x_t^T (D, D) float64 of hidden states (n, D)."""
    total = torch.zeros(hidden.shape[1], hidden.shape[1], dtype=torch.float64, device=hidden.device)
    for start in range(0, len(hidden), CHUNK):
        x = hidden[start : start + CHUNK].float()
        if weight is not None:
            x = x * weight[start : start + CHUNK, None]
        total += x.mT @ x
    return total


def _normalised(moment: torch.Tensor) -> torch.Tensor:
    level = moment.diagonal().mean()
    return moment / torch.where(level > 0, level, 1.0)
