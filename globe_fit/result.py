"""The result of a fit: factors in the dtype in which they are stored and run."""

from dataclasses import dataclass

import torch

from globe_kernels.format.checkpoint import Code, GlobeConfig, LayerFactors
from globe_kernels.ops.compose_basis import compose_basis_ref


@dataclass(frozen=True)
class FamilyFactors:
    """Bank, codes and adapters of one family over all n experts, in host memory."""

    bank: torch.Tensor  # (M, R, D)
    code: Code  # (n, C)
    adapter: torch.Tensor  # (n, P, R)

    def at(self, places: slice) -> LayerFactors:
        """The factors of the experts at `places`."""
        return LayerFactors(self.adapter[places], Code(self.code.index[places], self.code.value[places]))


def reconstruct(layer: LayerFactors, bank: torch.Tensor, phi: str) -> torch.Tensor:
    """(E, P, D) float32: the dense weights that the factors stand for, without rounding in between."""
    basis = compose_basis_ref(layer.code.index, layer.code.value, bank, phi, torch.float32)
    return layer.adapter.float() @ basis


@dataclass(frozen=True)
class FitStatus:
    """How a fit ended, and what to try next."""

    completed: bool
    advice: str


@dataclass(frozen=True)
class FitResult:
    """What `globe_fit.fit` returns, whatever the options.

    `report` has the errors per layer and family beside the baselines; `history` one record per logged
    step. Over several ranks only the first has the banks and the adapters. Save it with `globe_fit.export.save_fit`.
    """

    config: GlobeConfig
    families: dict[str, FamilyFactors]
    status: FitStatus
    history: list[dict]
    report: dict
