"""Measure the errors of stored factors on the raw weights, for the report of a fit."""

import torch

from globe_fit.data.stream import Block, FamilyWeights, share
from globe_fit.result import FamilyFactors
from globe_kernels.ops.compose_basis import compose_basis_ref


class StoredErrors:
    """Sums over the blocks of a family; each of several ranks adds its columns."""

    def __init__(self, weights: FamilyWeights):
        self._weights = weights
        self._lost = dict.fromkeys(weights.source.base.num_experts, 0.0)
        self._residual = self._lost_in_metric = self._energy_in_metric = 0.0

    def add(self, block: Block, adapter: torch.Tensor, basis: torch.Tensor) -> None:
        """Add a block of raw weights, which are overwritten, with adapters (E, P, R) and bases (E, R, D) as stored."""
        weights, unit = self._weights, self._weights.statistics.unit
        block.weights.div_(unit)
        residual = block.weights - (adapter.float() / unit) @ basis.float()
        self._lost_in_metric += weights.weighted(block, residual).square().sum(dtype=torch.float64).item()
        self._energy_in_metric += weights.weighted(block, block.weights).square().sum(dtype=torch.float64).item()
        self._lost[block.layer.layer] += residual.square().sum(dtype=torch.float64).item()
        self._residual += residual.sum(dtype=torch.float64).item()

    def report(self) -> dict:
        """Return the errors under the names of globe_fit.run.metrics; all ranks call this together."""
        weights, statistics, base = self._weights, self._weights.statistics, self._weights.source.base
        residual, lost_in_metric, energy_in_metric, *by_layer = weights.ranks.sums(
            self._residual, self._lost_in_metric, self._energy_in_metric, *self._lost.values()
        )
        lost = {layer: found * statistics.unit**2 for layer, found in zip(self._lost, by_layer, strict=True)}
        count = base.total_experts * base.intermediate_size * base.hidden_size
        mean = statistics.mean
        return {
            "relative_error": share(sum(lost.values()), statistics.total_energy),
            "calibrated_error": None if weights.metric is None else share(lost_in_metric, energy_in_metric),
            "relative_error_by_layer": {str(layer): share(lost[layer], statistics.energy[layer]) for layer in lost},
            "mse": sum(lost.values()) / count,
            "mean_energy_left": (residual * statistics.unit / count / mean) ** 2 if mean else 0.0,
        }


def stored_errors(weights: FamilyWeights, factors: FamilyFactors, phi: str) -> dict:
    """Return the errors of the stored `factors`, in one pass over the weights."""
    errors, bank = StoredErrors(weights), factors.bank.to(weights.device)
    for block in weights.raw():
        code, adapter = factors.at(block.span).code, factors.adapter[block.span].to(weights.device)
        index, value = code.index.to(weights.device), code.value.to(weights.device)
        errors.add(block, adapter, compose_basis_ref(index, value, bank, phi))
        del block, adapter  # before the next block is read
    return errors.report()
