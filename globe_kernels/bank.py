"""The one owner of the bank in a live model, and of what all layers share beside it."""

from dataclasses import dataclass

import torch
from torch import nn

from globe_kernels.cache import BasisCache
from globe_kernels.checkpoint import GlobeConfig
from globe_kernels.families import FAMILIES
from globe_kernels.scratch import Scratch


@dataclass(frozen=True)
class Arrangement:
    """By which paths (globe_kernels.strategy) the experts of a model may run."""

    strategy: str  # as it was asked for
    paths: tuple[str, ...]
    cache_bytes: int  # of the pool of composed bases; 0 without one
    choices: int  # K, experts per token


class GlobeBank(nn.Module):
    """The atoms of both families, (M, R, D) each, registered once at the root of a model as `globe_bank`.

    Every layer composes from this bank and none holds a copy, so `state_dict` has each atom once.
    A *parked* bank stays in host memory when the model moves to a device: a model that has composed every basis no
    longer needs it there, and saving still finds it. `cache` is the pool of composed bases of a model that has one,
    `scratch` what composes the layers of one that composes them when they are called.
    """

    gate: nn.Parameter
    up: nn.Parameter
    cache: BasisCache | None
    scratch: Scratch | None
    arrangement: Arrangement | None

    def __init__(self, config: GlobeConfig, device=None):
        super().__init__()
        self.config = config
        self.parked = False
        self.cache, self.scratch, self.arrangement = None, None, None
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

    def unpark(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move the atoms to where the experts run, in their dtype, and let them follow the model."""
        self.parked = False
        self.to(device, dtype)

    def _apply(self, fn, recurse=True):
        # nn.Module.to, .cuda, .half and the like all end here
        if self.scratch is not None:
            self.scratch.forget()
        return self if self.parked else super()._apply(fn, recurse)
