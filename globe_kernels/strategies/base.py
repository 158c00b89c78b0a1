"""Define a strategy: how it runs the experts of one layer, which bytes it holds, how long it takes.

A checkpoint has gate and up as adapters, codes and a bank. Every strategy computes the same function from them, up to
rounding. Each strategy is one file of this package; `globe_kernels.strategies.STRATEGIES` lists them.

Symbols: T tokens, K experts per token (top_k), S = T K routed rows, L layers, E experts of a layer, n experts of all
layers, P intermediate size, D hidden size, R rank, M atoms of a bank, C support, U palette (distinct atoms of a layer).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, Protocol

import torch

from globe_kernels.format.checkpoint import Code, GlobeConfig
from globe_kernels.format.names import FAMILIES
from globe_kernels.ops.moe_ffn import FromRank

INDEX_BYTES = 4  # int32
_CODE_BYTES = INDEX_BYTES + 4  # float32 value

Palettes = Mapping[int, Mapping[str, float]]  # layer id -> family -> U


class Routed(NamedTuple):
    """The tokens of a call, and the experts that the router chose for them."""

    hidden_states: torch.Tensor  # (T, D)
    top_k_index: torch.Tensor  # (T, K)
    top_k_weights: torch.Tensor  # (T, K)


@dataclass(frozen=True)
class LayerSizes:
    """The sizes of one layer that its time depends on."""

    experts: int  # E
    top_k: float  # K; of experts that several processes share, the choices that come to this process on average
    hidden: int  # D
    intermediate: int  # P
    rank: int  # R
    support: int  # C
    palette: float  # U, on average over the families
    phi: str
    item_size: int
    active: float | None = None  # measured number of experts that a call activates; None: uniform routing

    def active_experts(self, tokens: int) -> float:
        """Return the number of experts that `tokens` tokens activate; E (1 - (1 - K/E)^T) with uniform routing."""
        if self.active is not None:
            return self.active
        return self.experts * (1 - (1 - self.top_k / self.experts) ** tokens)


@dataclass(frozen=True)
class Pool:
    """The cache of composed bases that all layers of a device share."""

    slots: int
    experts: int  # n
    miss_rate: float | None = None  # measured; None: the rate of uniform routing

    def misses(self, active_share: float) -> float:
        """Return the misses per active expert when a step activates `active_share` of the experts of every layer.

        The pool keeps the bases that were used last: an expert hits when it comes back before the slots are used up.
        Under uniform routing the hit rate is the share of experts that have a slot. When a step over all layers
        activates more experts than there are slots, no basis lasts until the next step.
        """
        share = self.slots / self.experts
        if self.miss_rate is not None:
            return self.miss_rate
        return 1 - min(share, 1.0) if share >= active_share else 1.0


class Stage(NamedTuple):
    """One step of a call, as the cost model counts it."""

    values: float  # read and written, of item_size bytes each
    flops: float
    calls: Mapping[str, float] = MappingProxyType({})  # {constant of cost.References: how often a CPU pays it}
    launches: int = 1
    is_gathered: bool = False  # a CPU copies these values before it multiplies


@dataclass(frozen=True)
class Residents:
    """Bytes that a model holds on its devices, by part, and beside them the bytes in host memory."""

    down: int
    dense: int = 0  # gate and up matrices
    adapters: int = 0
    codes: int = 0
    bases: int = 0
    bank: int = 0
    palette_codes: int = 0
    pool: int = 0
    host: int = 0  # the bank, where no call reads it or the devices have copies

    @property
    def parts(self) -> dict[str, int]:
        """{part: bytes on the devices}"""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "host"}

    @property
    def total(self) -> int:
        """Bytes on the devices."""
        return sum(self.parts.values())

    def together(self, other: "Residents") -> "Residents":
        """Merge the bytes of two strategies that one model may run by; count a shared part once."""
        parts = {name: max(size, other.parts[name]) for name, size in self.parts.items()}
        # the bank leaves host memory when one of the two has it on the device
        return Residents(**parts, host=min(self.host, other.host))


@dataclass(frozen=True)
class Storage:
    """A checkpoint as it is stored for running: everything that the bytes of a strategy depend on."""

    config: GlobeConfig
    item_size: int  # bytes of a weight
    palettes: Palettes
    cache_bytes: int = 0  # of the pool
    bank_atoms: int | None = None  # copies of atoms, both families, on several devices; None: one device has the bank

    @property
    def down_bytes(self) -> int:
        """Down matrices (E, D, P) of all layers, and the biases of gate, up and down."""
        base = self.config.base
        biases = 2 * base.intermediate_size + base.hidden_size if base.has_bias else 0
        return base.total_experts * (base.hidden_size * base.intermediate_size + biases) * self.item_size

    @property
    def atom_values(self) -> int:
        """Values of one atom (R, D)."""
        return self.config.rank * self.config.base.hidden_size

    @property
    def bank_bytes(self) -> int:
        """Bytes of the atoms that the devices hold."""
        whole = len(FAMILIES) * self.config.num_atoms
        return (whole if self.bank_atoms is None else self.bank_atoms) * self.atom_values * self.item_size

    @property
    def host_bank_bytes(self) -> int:
        """Bytes of the whole bank in the dtype of the checkpoint."""
        return len(FAMILIES) * self.config.num_atoms * self.atom_values * self.config.torch_dtype.itemsize

    def residents(self, *, needs_bank: bool, local_index: bool = False, **parts: int) -> Residents:
        """Return down, adapters, codes, the bank where calls need it, and the given `parts`.

        With `local_index` devices that hold copies of atoms also hold a second index, relative to the copies.
        """
        base, has_copies = self.config.base, self.bank_atoms is not None
        experts, code_bytes = base.total_experts, _CODE_BYTES
        if local_index and has_copies:
            code_bytes += INDEX_BYTES
        return Residents(
            self.down_bytes,
            adapters=2 * experts * base.intermediate_size * self.config.rank * self.item_size,
            codes=2 * experts * self.config.support * code_bytes,
            bank=self.bank_bytes if needs_bank else 0,
            host=self.host_bank_bytes if has_copies or not needs_bank else 0,
            **parts,
        )

    def row_bytes(self, tokens: int, top_k: int) -> int:
        """Temporaries of a call: h (S, 2R), y (S, P), the rows before the sum over a token's experts (S, D), (T, D)."""
        rows, base = tokens * top_k, self.config.base
        values = rows * (2 * self.config.rank + base.intermediate_size + base.hidden_size) + tokens * base.hidden_size
        return values * self.item_size


class DeviceTensors(Protocol):
    """The tensors that the layers on one device share: globe_kernels.model.bank.DeviceBank."""

    cache: Any  # globe_kernels.model.cache.BasisCache, of a strategy that takes a pool
    scratch: Any  # globe_kernels.model.scratch.ScratchBuffers, of a strategy that takes buffers

    @property
    def gate(self) -> torch.Tensor: ...  # (M, R, D), or copies of some atoms

    @property
    def up(self) -> torch.Tensor: ...

    @property
    def holds_copies(self) -> bool: ...

    def local_ids(self, family: str, ids: torch.Tensor) -> torch.Tensor: ...


class Layer(Protocol):
    """The experts of one layer in a live model, as a strategy sees them: globe_kernels.model.experts.GlobeMoEFFN."""

    layer: int
    phi: str
    activation: str

    @property
    def device_bank(self) -> DeviceTensors: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def from_rank(self) -> FromRank: ...

    def code(self, family: str) -> Code:
        """Return the codes over all atoms of the bank."""
        ...

    def keep(self, name: str, tensor: torch.Tensor, *, keeps_dtype: bool = False) -> None:
        """Hold a tensor that a strategy made; it follows the layer to a device, and `state_dict` leaves it out."""
        ...

    def keeps(self, name: str) -> bool:
        """Return whether `keep` was given a tensor of this name."""
        ...

    def kept(self, name: str) -> torch.Tensor:
        """Return a tensor that `keep` was given."""
        ...


class Strategy(ABC):
    """One way to run the experts of a checkpoint."""

    name: ClassVar[str]
    op: ClassVar[str]  # the name by which ops.counters counts its calls; on a CPU it ends in _ref
    holds_bases: ClassVar[bool] = False  # every basis stays on the device, and calls need no atoms
    composes: ClassVar[bool] = False  # a call composes bases
    takes_pool: ClassVar[bool] = False  # a device holds a BasisCache
    takes_buffers: ClassVar[bool] = False  # a device holds ScratchBuffers

    def refuses(self, config: GlobeConfig) -> str | None:
        """Return why a checkpoint cannot run by this strategy, as the start of a sentence; None when it can."""
        return None

    def wastes(self, config: GlobeConfig) -> str | None:
        """Return why `auto` leaves this strategy alone at the sizes of a checkpoint; None when it does not."""
        return None

    def warning(self, sizes: LayerSizes, machine: Any) -> str | None:
        """Return a warning for a user who names this strategy; `machine` is a cost.Machine."""
        return None

    @abstractmethod
    def resident(self, storage: Storage) -> Residents:
        """Return the bytes that stay in memory so that calls can run by this strategy."""

    def workspace(self, storage: Storage, tokens: int, top_k: int, *, on_gpu: bool) -> int:
        """Return the bytes of the largest temporaries of one layer's call with `tokens` tokens."""
        return storage.row_bytes(tokens, top_k)

    @abstractmethod
    def stages(self, sizes: LayerSizes, tokens: int, pool: Pool | None) -> list[Stage]:
        """Return the steps of one layer's call with `tokens` tokens, in order, for the cost model.

        A step reads each of its weights once. Rows that a step leaves for the next are written and read once.
        """

    def hold(self, layer: Layer) -> None:
        """Make the tensors that calls of `layer` need beside its weights; `layer.keep` holds them."""
        return

    @abstractmethod
    def run(self, layer: Layer, routed: Routed) -> torch.Tensor:
        """Compute the result (T, D) of one layer."""


def routing_stage(sizes: LayerSizes, tokens: int, *, prefix: str = "") -> Stage:
    """Count the routing plan, and on a CPU the torch calls of a layer and of its active experts.

    `prefix` names the constants of cost.References: "", "bank_first_" or "dense_".
    """
    calls = {f"{prefix}call": 1, f"{prefix}expert": sizes.active_experts(tokens)}
    return Stage(tokens * sizes.top_k, 0, calls)


def adapter_stage(sizes: LayerSizes, tokens: int) -> Stage:
    """Count S2: from h (S, 2R) through both adapters to y (S, P)."""
    rows, active, inner, rank = tokens * sizes.top_k, sizes.active_experts(tokens), sizes.intermediate, sizes.rank
    return Stage(2 * active * inner * rank + rows * (2 * rank + inner), 4 * rows * inner * rank)


def down_stages(sizes: LayerSizes, tokens: int) -> list[Stage]:
    """Count S3: from y (S, P) through down to rows (S, D), then their sum (T, D)."""
    rows, active = tokens * sizes.top_k, sizes.active_experts(tokens)
    inner, width = sizes.intermediate, sizes.hidden
    return [
        Stage(active * width * inner + rows * (inner + width), 2 * rows * inner * width),
        Stage((rows + tokens) * width, rows * width),
    ]
