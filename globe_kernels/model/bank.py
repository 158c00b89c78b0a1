"""The bank of a live model, and the tensors that the layers on one device share."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from globe_kernels.format.checkpoint import GlobeConfig
from globe_kernels.format.names import FAMILIES
from globe_kernels.model.cache import BasisCache
from globe_kernels.model.calls import Calls
from globe_kernels.model.parallel import is_split, whole
from globe_kernels.model.scratch import ScratchBuffers


@dataclass(frozen=True)
class Arrangement:
    """The strategies by which the experts of a model may run."""

    strategy: str  # as the user asked for it, "auto" included
    strategies: tuple[str, ...]
    cache_bytes: int  # of the pools of composed bases, all devices together; 0 without a pool
    top_k: float  # K; of experts that several processes share, the choices that come to this process on average

    @property
    def paths(self) -> tuple[str, ...]:
        """The earlier name of `strategies`."""
        return self.strategies


class GlobeBank(nn.Module):
    """The atoms of both families, (M, R, D) each, registered once at the root of a model as `globe_bank`.

    Every layer composes from this bank and no layer holds a copy, so `state_dict` has each atom once. A *parked* bank
    stays in host memory when the model moves to a device. Parked is the bank of a model that has composed every basis,
    or whose devices hold copies of atoms: calls do not read it, and `state_dict` does. `device_banks` has an entry for
    every device whose layers run from atoms. `calls` are the calls of the model, for which changes wait.
    """

    gate: nn.Parameter
    up: nn.Parameter
    arrangement: Arrangement  # of the layers of the model

    def __init__(self, config: GlobeConfig, device=None):
        super().__init__()
        self.config = config
        self.parked = False
        self.calls = Calls()
        for family in FAMILIES:
            atoms = torch.empty(config.bank_shape(), dtype=config.torch_dtype, device=device)
            self.register_parameter(family, nn.Parameter(atoms, requires_grad=False))
        self.device_banks = nn.ModuleList()

    def atoms(self, family: str) -> torch.Tensor:
        """Return (M, R, D)."""
        return getattr(self, family)

    @property
    def caches(self) -> list[BasisCache]:
        """The caches of the devices, where there are any."""
        banks = (bank for bank in self.device_banks if isinstance(bank, DeviceBank))
        return [bank.cache for bank in banks if bank.cache is not None]

    def park(self) -> None:
        """Move the atoms to host memory and keep them there; atoms that FSDP has split stay where they are."""
        if is_split(self.gate):
            return
        self.parked = False
        self.to("cpu")
        self.parked = True

    def unpark(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move the atoms to where the experts run, in their dtype, and let them follow the model."""
        self.parked = False
        self.to(device, dtype)

    def _apply(self, fn, recurse=True):
        # nn.Module.to, .cuda, .half and the like all end here
        if not self.parked:
            return super()._apply(fn, recurse)
        self.device_banks._apply(fn)
        return self


class DeviceBank(nn.Module):
    """The tensors that the layers on one device share: atoms, and a cache or buffers if a strategy needs them.

    The atoms are the whole bank, or copies of the atoms that these layers use, which `state_dict` leaves out.
    """

    cache: BasisCache | None
    gate_copy: torch.Tensor | None
    up_copy: torch.Tensor | None

    def __init__(
        self,
        bank: GlobeBank,
        used: Mapping[str, torch.Tensor] | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        """Share the atoms of `bank`, or copy the atoms `used`, {family: ascending ids}, to `device` in `dtype`."""
        super().__init__()
        self._bank = (bank,)  # a tuple: a module would be registered, and saved, once more
        self._used = used
        self.cache: BasisCache | None = None
        self.scratch: ScratchBuffers | None = None
        for family in FAMILIES:
            copied = None
            if used is not None:
                copied = whole(bank.atoms(family).detach())[used[family]].to(device, dtype)
            self.register_buffer(f"{family}_copy", copied, persistent=False)

    def release(self) -> None:
        """Let go of the copies: every basis is composed."""
        self._used, self.gate_copy, self.up_copy = None, None, None

    @property
    def config(self) -> GlobeConfig:
        """The configuration of the checkpoint."""
        return self._bank[0].config

    @property
    def gate(self) -> torch.Tensor:
        """The atoms of gate on this device."""
        return self.atoms("gate")

    @property
    def up(self) -> torch.Tensor:
        """The atoms of up on this device."""
        return self.atoms("up")

    @property
    def holds_copies(self) -> bool:
        """Whether this device holds copies of some atoms in place of the bank."""
        return self._used is not None

    def local_ids(self, family: str, ids: torch.Tensor) -> torch.Tensor:
        """Return where the atoms with these ids stand among the atoms of this device."""
        if self._used is None:
            return ids
        return torch.searchsorted(self._used[family].to(ids), ids).to(ids.dtype)

    def atoms(self, family: str) -> torch.Tensor:
        """Return (M, R, D), or the copies of some atoms."""
        copied = getattr(self, f"{family}_copy")
        return self._bank[0].atoms(family) if copied is None else copied

    def _apply(self, fn, recurse=True):
        if self.scratch is not None:
            self.scratch.forget()
        return super()._apply(fn, recurse)
