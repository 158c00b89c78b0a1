"""Measure how far experts that stand for others are from them."""

from collections.abc import Callable

import torch

from globe_fit.data.source import ExpertLayer, ExpertSource
from globe_fit.data.stream import share
from globe_kernels.format.names import FAMILIES


def relative_errors(source: ExpertSource, weights: Callable[[ExpertLayer, str], torch.Tensor]) -> dict[str, float]:
    """Return {family: squared error of the experts `weights(layer, family)` (E, P, D), relative to the raw weights}."""
    errors = {}
    for family in FAMILIES:
        lost = energy = 0.0
        for layer in source.layers:
            raw = source.read(layer, family)
            lost += _energy(raw - weights(layer, family))
            energy += _energy(raw)
        errors[family] = share(lost, energy)
    return errors


def _energy(weights: torch.Tensor) -> float:
    return torch.linalg.vector_norm(weights, dtype=torch.float64).square().item()
