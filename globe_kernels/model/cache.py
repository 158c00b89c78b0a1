"""A bounded pool of composed bases that all layers of a device share, and its statistics.

The experts of all layers are numbered, one layer after the other. `globe_kernels.ops.cache_lookup` changes the state
while a model runs.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from threading import Lock
from typing import Any

import torch
from torch import nn

from globe_kernels.errors import RequestError
from globe_kernels.locks import make_locks
from globe_kernels.ops.cache_lookup import CacheState
from globe_kernels.ops.cache_turns import LastUse, give_number
from globe_kernels.ops.compose_slots import compose_slots
from globe_kernels.ops.moe_ffn_cached import CachedWeights


@dataclass(frozen=True)
class CacheStats:
    """Hits and misses of a cache since its last `reset_stats`."""

    hits: int  # active experts whose basis was in the pool
    misses: int  # active experts whose basis was composed
    evictions: int  # bases that gave way to composed bases
    slots: int
    slot_bytes: int  # of one basis, gate and up
    uses: dict[int, torch.Tensor]  # layer -> (E,) int64 on the CPU, how often each expert was active

    @property
    def hit_rate(self) -> float:
        """Share of active experts whose basis was in the pool; 0 before the first token."""
        return self.hits / max(1, self.hits + self.misses)

    @property
    def bytes_composed(self) -> int:
        """Bytes of all bases that were composed."""
        return self.misses * self.slot_bytes


def sum_stats(stats: Sequence[CacheStats]) -> CacheStats:
    """Add up the statistics of the caches of several devices."""
    return CacheStats(
        *(sum(getattr(device, name) for device in stats) for name in ("hits", "misses", "evictions", "slots")),
        slot_bytes=stats[0].slot_bytes,
        uses={layer: counts for device in stats for layer, counts in device.uses.items()},
    )


class BasisCache(nn.Module):
    """The state of `globe_kernels.functional.moe_ffn_cached`, one for the layers on a device.

    Its tensors follow the model to a device. A cast of the model casts the pool, whose contents stay valid.
    `state_dict` has none of them: all are made from the codes and the bank. Its users take turns, each for the length
    of one layer. A copy starts with an empty pool: another thread may have been writing while the pool was copied.
    """

    number: int

    pool: torch.Tensor
    slot_of: torch.Tensor
    owner: torch.Tensor
    referenced: torch.Tensor
    pinned: torch.Tensor
    uses: torch.Tensor
    registers: torch.Tensor

    def __init__(
        self, num_experts: Mapping[int, int], slots: int, rank: int, width: int, dtype: torch.dtype, device=None
    ):
        """Make an empty cache of `slots` bases (2 * rank, width) for layers {layer id: number of experts}.

        `globe_kernels.strategies.cached.pool_slots` counts the slots that fit into a number of bytes. Raises
        RequestError for less than one slot.
        """
        super().__init__()
        if slots < 1:
            raise RequestError(
                f"A cache of bases at rank {rank}, hidden size {width} and {dtype} would have {slots} slots; give it "
                "the bytes of at least one."
            )
        self.num_experts = dict(num_experts)
        *firsts, n = accumulate(self.num_experts.values(), initial=0)
        self._first_expert = dict(zip(self.num_experts, firsts, strict=True))
        shapes = {
            "pool": ((slots, 2 * rank, width), dtype),
            "slot_of": ((n,), torch.int32),
            "owner": ((slots,), torch.int32),
            "referenced": ((slots,), torch.int32),
            "pinned": ((slots,), torch.int64),
            "uses": ((n,), torch.int64),
            "registers": ((5,), torch.int64),
        }
        with torch.inference_mode(False):  # tensors of inference mode cannot be written outside of it
            for name, (shape, kind) in shapes.items():
                self.register_buffer(name, torch.empty(shape, dtype=kind, device=device), persistent=False)
        self._begin()
        self.reset_stats()

    def _begin(self) -> None:
        """Start with an empty pool, as a cache that no call knows yet."""
        make_locks(self)
        self.number = give_number(self)
        self._last_use, self._is_torn = LastUse(), True

    def make_locks(self) -> None:
        """Make a lock that nobody holds."""
        self._lock = Lock()

    @contextmanager
    def turn(self) -> Iterator[CacheState]:
        """Wait for the other users of the cache, and be the only user until the end of the block.

        A block that fails may leave a slot that is said to hold a basis and does not: the next user clears the cache.
        """
        with self._lock, self._last_use.before(self.pool.device):
            was_torn, self._is_torn = self._is_torn, True
            if was_torn:
                self._clear()
            yield self.state
            # a capture only notes the clearing down: its replays do it
            self._is_torn = was_torn and self.pool.is_cuda and torch.cuda.is_current_stream_capturing()

    @property
    def state(self) -> CacheState:
        """The tensors that a call changes; `turn` gives them to one user at a time."""
        return CacheState(self.pool, self.slot_of, self.owner, self.referenced, self.pinned, self.uses, self.registers)

    def first_expert(self, layer: int) -> int:
        """Return the number of the layer's first expert among the experts of all layers."""
        return self._first_expert[layer]

    def clear(self) -> None:
        """Forget all bases; call this when banks or codes have changed. Statistics stay."""
        with self.turn():
            self._clear()

    def _clear(self) -> None:
        self.slot_of.fill_(-1)
        self.owner.fill_(-1)
        self.referenced.zero_()
        self.pinned.zero_()
        self.registers[:2].zero_()

    def stats(self) -> CacheStats:
        """Return the statistics; waits for the device."""
        with self.turn():
            hits, misses, evictions = self.registers[2:].tolist()
            uses = self.uses.to("cpu", copy=True).split(list(self.num_experts.values()))
        return CacheStats(
            hits,
            misses,
            evictions,
            slots=self.pool.shape[0],
            slot_bytes=self.pool.nbytes // self.pool.shape[0],
            uses={layer: counts.clone() for layer, counts in zip(self.num_experts, uses, strict=True)},
        )

    def reset_stats(self) -> None:
        """Count from zero again."""
        with self.turn():
            self.registers[2:].zero_()
            self.uses.zero_()

    @torch.no_grad()
    def warm(self, weights: Mapping[int, CachedWeights], uses: Mapping[int, torch.Tensor], phi: str) -> None:
        """Fill the pool with the most used experts, from `CacheStats.uses` of an earlier run; statistics stay.

        weights {layer: its CachedWeights}; uses {layer: (E,)}, where a layer may be missing; an expert that was never
        used is left out. The pool forgets its earlier bases. Raises RequestError for uses of another model.
        """
        for layer, counts in uses.items():
            if counts.shape != (self.num_experts.get(layer),):
                raise RequestError(
                    f"The uses of layer {layer} have shape {tuple(counts.shape)} and the model has "
                    f"{self.num_experts.get(layer, 'no')} experts there; give the uses of a run of this model."
                )
        unused = {layer: torch.zeros(size, dtype=torch.int64) for layer, size in self.num_experts.items()}
        counts = torch.cat([uses.get(layer, zeros).cpu() for layer, zeros in unused.items()])
        most = counts.argsort(descending=True, stable=True)[: self.owner.numel()]
        most = most[counts[most] > 0]
        # the hand starts at slot 0: empty slots go first, then the slots of the least used experts
        slots = self.owner.numel() - 1 - torch.arange(most.numel())
        most, slots = most.int().to(self.pool.device), slots.int().to(self.pool.device)
        with self.turn():
            self._clear()
            for layer, size in self.num_experts.items():
                number = most - self.first_expert(layer)
                here = (number >= 0) & (number < size)
                compose_slots(number[here], slots[here], self.pool, list(weights[layer].mixtures), phi)
            self.owner[slots] = most
            self.slot_of[most] = slots

    def _apply(self, fn, recurse=True):
        was_meta = self.pool.is_meta
        with torch.inference_mode(False):
            super()._apply(fn, recurse)
        self._last_use = LastUse()  # of another device
        if was_meta:
            # to_empty allocates memory with any content
            self._is_torn = True
            self.reset_stats()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_lock", "_last_use", "number")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        with torch.inference_mode(False):
            for name, tensor in self.named_buffers():
                setattr(self, name, tensor.clone() if tensor.is_inference() else tensor)
        self._begin()

    def extra_repr(self) -> str:
        slots, rows, width = self.pool.shape
        return f"slots={slots}, rank={rows // 2}, hidden={width}, experts={self.slot_of.numel()}"
