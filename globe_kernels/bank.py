"""The one owner of the bank in a live model."""

import torch
from torch import nn

from globe_kernels.checkpoint import GlobeConfig
from globe_kernels.families import FAMILIES


class GlobeBank(nn.Module):
    """The atoms of both families, (M, R, D) each, registered once at the root of a model as `globe_bank`.

    Every layer composes from this bank and none holds a copy, so `state_dict` has each atom once.
    A *parked* bank stays in host memory when the model moves to a device: strategies that have
    composed every basis no longer need it there, and saving still finds it.
    """

    gate: nn.Parameter
    up: nn.Parameter

    def __init__(self, config: GlobeConfig, device=None):
        super().__init__()
        self.parked = False
        for family in FAMILIES:
            atoms = torch.empty(config.bank_shape(), dtype=config.torch_dtype, device=device)
            self.register_parameter(family, nn.Parameter(atoms, requires_grad=False))

    def atoms(self, family: str) -> torch.Tensor:
        return getattr(self, family)

    def park(self) -> None:
        """Move the atoms to host memory and keep them there."""
        self.parked = False
        self.to("cpu")
        self.parked = True

    def _apply(self, fn, recurse=True):
        # nn.Module.to, .cuda, .half and the like all end here
        return self if self.parked else super()._apply(fn, recurse)
