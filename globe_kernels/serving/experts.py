"""The GloBE experts of one process of an engine, read from the export itself.

The loader of an engine knows no tensor that all layers share, and its models name and merge the tensors of experts in
many ways. So the loader leaves them alone, and each process reads the experts and rows that it runs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypedDict

import torch

from globe_kernels.errors import GlobeError, RequestError
from globe_kernels.format.checkpoint import GlobeConfig
from globe_kernels.format.exported import Export
from globe_kernels.format.names import FAMILIES
from globe_kernels.format.typed import checked
from globe_kernels.model.arrange import arrange, plan_arrangement
from globe_kernels.model.bank import GlobeBank
from globe_kernels.model.experts import GlobeMoEFFN
from globe_kernels.strategies.budget import AUTO
from globe_kernels.units import parse_bytes


class Options(TypedDict, total=False):
    """The key "globe" of `--additional-config`: the arguments of globe_kernels.set_strategy."""

    strategy: str
    memory_budget: int | str | None
    cache_bytes: int | str | None


def options_of(additional_config: Any) -> Options:
    """Check and return the options for GloBE. Raises RequestError for other keys and types."""
    given = additional_config.get("globe", {}) if isinstance(additional_config, Mapping) else {}
    where, known = 'the key "globe" of --additional-config', Options.__annotations__
    if isinstance(given, Mapping) and (unknown := {*given} - {*known}):
        raise RequestError(f"{min(unknown)!r} in {where} is not known; expected {', '.join(known)}.")
    try:
        return checked(Options, given, where, f"give {', '.join(known)}")
    except GlobeError as error:
        raise RequestError(str(error)) from error


@dataclass(frozen=True)
class Share:
    """The part of a layer that a process runs."""

    experts: tuple[int, ...]  # ids in the model, in the order of the local ids
    rows: range  # of every adapter, and the columns of down
    top_k: float  # experts of a token that come to this process, on average
    activation: str
    dtype: torch.dtype
    adds_down_bias: bool


class Experts:
    """The experts that a process runs, layer by layer, and their bank.

    `expect` all layers, then `load` each: the first opens the export, and the last is followed by the arrangement of
    all layers and lets go of the export. `opened` opens it; without it the factors have random values.
    """

    def __init__(self, sizes: GlobeConfig, options: Options, opened: Callable[[], Export] | None = None):
        self._sizes, self._options, self._opened = sizes, options, opened
        self._export: Export | None = None
        self._shares: dict[int, Share] = {}
        self._loaded: dict[int, GlobeMoEFFN] = {}
        self.is_arranged = False

    @property
    def layers(self) -> frozenset[int]:
        """The ids of the expected layers."""
        return frozenset(self._shares)

    def expect(self, layer: int, share: Share) -> None:
        """Take note of the part of a layer that this process runs."""
        self._shares[layer] = share

    def load(self, layer: int, device: torch.device) -> tuple[GlobeMoEFFN, GlobeBank | None]:
        """Make the experts of a layer on `device`; with those of the last layer, return the bank too."""
        share, config = self._shares[layer], self._config()
        module = GlobeMoEFFN(
            config, layer, share.activation, share.dtype, device, has_bias=config.base.has_bias
        ).requires_grad_(False)
        module.take_share(range(len(share.experts)), len(share.rows), is_first=share.adds_down_bias)
        if self._opened is None:
            _randomize(module, config.num_atoms)
        else:
            self._export = self._export or self._opened()
            for name, tensor in self._export.experts(layer, share.experts, share.rows).items():
                getattr(module, name).copy_(tensor)
        self._loaded[layer] = module
        return module, self._arrange(device) if self._loaded.keys() == self._shares.keys() else None

    def _config(self) -> GlobeConfig:
        """The sizes of the checkpoint, as far as this process has them."""
        config, some = self._sizes, next(iter(self._shares.values()))
        counts = {layer: len(share.experts) for layer, share in sorted(self._shares.items())}
        base = replace(config.base, intermediate_size=len(some.rows), num_experts=counts)
        return replace(config, base=base)

    def _arrange(self, device: torch.device) -> GlobeBank:
        bank = GlobeBank(self._config(), device)
        for family in FAMILIES:
            if self._export is None:
                bank.atoms(family).normal_(std=0.02)
            else:
                bank.atoms(family).copy_(self._export.bank(family))
        if self._export is not None:
            self._export.verify()
            self._export = None  # its files are mapped into memory
        modules = [self._loaded[layer] for layer in sorted(self._loaded)]
        budget, cache = (self._options.get(name) for name in ("memory_budget", "cache_bytes"))
        bounds = (None if size is None else parse_bytes(size) for size in (budget, cache))
        top_k = next(iter(self._shares.values())).top_k
        arrange(bank, modules, plan_arrangement(bank, modules, top_k, self._options.get("strategy", AUTO), *bounds))
        if bank.parked:  # every basis is composed, and no engine asks for another strategy later
            bank.parked = False
            bank.to("meta")
        self._loaded, self.is_arranged = {}, True
        return bank


def _randomize(module: GlobeMoEFFN, num_atoms: int) -> None:
    for name, tensor in module.state_dict().items():
        if name.endswith("_code_index"):
            tensor.copy_(torch.arange(tensor.numel()).view_as(tensor) % num_atoms)
        else:
            tensor.normal_(std=0.02)
