"""The one owner of the bank in a live model, and what the layers on one device share."""

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
    cache_bytes: int  # of the pools of composed bases, all devices together; 0 without
    choices: int  # K, experts per token


class GlobeBank(nn.Module):
    """The atoms of both families, (M, R, D) each, registered once at the root of a model as `globe_bank`.

    Every layer composes from this bank and none holds a copy, so `state_dict` has each atom once.
    A *parked* bank stays in host memory when the model moves to a device: a model that has composed every basis no
    longer needs it there, and saving still finds it. `places` are the devices whose layers run from atoms.
    """

    gate: nn.Parameter
    up: nn.Parameter
    arrangement: Arrangement | None

    def __init__(self, config: GlobeConfig, device=None):
        super().__init__()
        self.config = config
        self.parked = False
        self.arrangement = None
        for family in FAMILIES:
            atoms = torch.empty(config.bank_shape(), dtype=config.torch_dtype, device=device)
            self.register_parameter(family, nn.Parameter(atoms, requires_grad=False))
        self.places = nn.ModuleList()

    def atoms(self, family: str) -> torch.Tensor:
        return getattr(self, family)

    @property
    def caches(self) -> list[BasisCache]:
        """Those of the places that have one."""
        return [place.cache for place in self.places if isinstance(place, Place) and place.cache is not None]

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
        return self if self.parked else super()._apply(fn, recurse)


class Place(nn.Module):
    """What the layers on one device run from beside their own weights.

    The atoms: those of the bank where it is on this device, else a copy, which `state_dict` leaves out. `cache` is the
    pool of composed bases of layers that have one, `scratch` what composes those that are composed when called.
    """

    cache: BasisCache | None

    def __init__(self, bank: GlobeBank, device: torch.device):
        super().__init__()
        self._bank = (bank,)  # a tuple: a module would be registered, and saved, once more
        self.cache: BasisCache | None = None
        self.scratch: Scratch | None = None
        for family in FAMILIES:
            atoms = bank.atoms(family)
            self.register_buffer(
                f"{family}_copy", None if atoms.device == device else atoms.detach().to(device), persistent=False
            )

    @property
    def config(self) -> GlobeConfig:
        return self._bank[0].config

    @property
    def gate(self) -> torch.Tensor:
        return self.atoms("gate")

    @property
    def up(self) -> torch.Tensor:
        return self.atoms("up")

    def atoms(self, family: str) -> torch.Tensor:
        copied = getattr(self, f"{family}_copy")
        return self._bank[0].atoms(family) if copied is None else copied

    def _apply(self, fn, recurse=True):
        if self.scratch is not None:
            self.scratch.forget()
        return super()._apply(fn, recurse)
