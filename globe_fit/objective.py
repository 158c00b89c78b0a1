"""The objective of a fit, and the weights it is measured on.

For one family, over all n experts i with weights W_i (P, D):

    minimise  sum_i || W_i - A_i phi(sum_j alpha_ij B_j) ||^2 / sum_i || W_i ||^2

A_i (P, R) adapters, B_j (R, D) atoms, alpha_i codes. The solvers see weights normalised by one mean and
one scale per family; errors that are reported are always those of the stored factors on the raw weights.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from globe_fit.source import ExpertLayer, ExpertSource


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation over all weights of a family, and the energy per layer."""

    mean: float
    scale: float
    energy: tuple[float, ...]  # sum of squares of the raw weights, per layer

    @property
    def total_energy(self) -> float:
        return sum(self.energy)


@dataclass(frozen=True)
class FamilyWeights:
    """The experts of one family, streamed a layer at a time onto `device`."""

    source: ExpertSource
    family: str
    device: str
    statistics: Statistics

    @classmethod
    def measure(cls, source: ExpertSource, family: str, device: str) -> "FamilyWeights":
        """One pass over the weights for their statistics. Raises GlobeError when one is NaN or infinite."""
        total, count, energy = 0.0, 0, []
        for layer in source.layers:
            weights = source.read(layer, family)
            source.require_finite(layer, family, weights)
            wide = weights.double()
            total += wide.sum().item()
            energy.append(wide.square().sum().item())
            count += weights.numel()
            del weights, wide  # before the next layer is read
        mean = total / count
        scale = max(sum(energy) / count - mean**2, 0.0) ** 0.5
        return cls(source, family, device, Statistics(mean, scale or 1.0, tuple(energy)))

    def raw(self) -> Iterator[tuple[ExpertLayer, slice, torch.Tensor]]:
        """(layer, places of its experts among all n, weights (E, P, D) float32) of each layer in turn."""
        for layer, places in self.source.blocks:
            yield layer, places, self.source.read(layer, self.family).to(self.device)

    def normalised(self) -> Iterator[tuple[ExpertLayer, slice, torch.Tensor]]:
        """As `raw`, with mean 0 and standard deviation 1 over the family."""
        for layer, places, weights in self.raw():
            yield layer, places, weights.sub_(self.statistics.mean).div_(self.statistics.scale)

    @property
    def normalised_energy(self) -> float:
        """Sum of squares of the normalised weights: one per weight, by definition of the scale."""
        base = self.source.base
        return float(base.total_experts * base.intermediate_size * base.hidden_size)
