"""cached: a bounded pool of composed bases that all layers of a device share; a call composes the bases it misses.

    lookup -> compose the misses -> x -> basis_e x -> adapters and activation -> down

Suits few tokens per call and routing that comes back to the same experts. globe_kernels.model.cache owns the pool.
"""

from math import ceil

import torch

from globe_kernels.format.checkpoint import GlobeConfig
from globe_kernels.format.names import FAMILIES
from globe_kernels.functional import moe_ffn_cached
from globe_kernels.ops.compose_slots import Mixtures
from globe_kernels.ops.moe_ffn_cached import CachedWeights
from globe_kernels.strategies.base import (
    Layer,
    LayerSizes,
    Pool,
    Residents,
    Routed,
    Stage,
    Storage,
    Strategy,
    routing_stage,
)
from globe_kernels.strategies.composed import stages_after_composing
from globe_kernels.strategies.palette_codes import device_code

_SLOT_MAP_BYTES = 4 + 4 + 8  # owner, referenced, pinned
_EXPERT_MAP_BYTES = 4 + 8  # slot_of, uses
_REGISTER_BYTES = 5 * 8


def pool_bytes(config: GlobeConfig, slots: int, item_size: int) -> int:
    """Return the bytes of a pool of `slots` bases (2R, D) and of the maps of its cache."""
    slot = 2 * config.rank * config.base.hidden_size * item_size + _SLOT_MAP_BYTES
    return slots * slot + config.base.total_experts * _EXPERT_MAP_BYTES + _REGISTER_BYTES


def pool_slots(config: GlobeConfig, cache_bytes: int, item_size: int) -> int:
    """Return the slots of a pool of at most `cache_bytes`, no more than there are experts."""
    empty = pool_bytes(config, 0, item_size)
    slots = (cache_bytes - empty) // (pool_bytes(config, 1, item_size) - empty)
    return max(0, min(slots, config.base.total_experts))


class Cached(Strategy):
    """Hold the bank and a pool of bases."""

    name = "cached"
    op = "moe_ffn_cached"
    composes = True
    takes_pool = True

    def resident(self, storage: Storage) -> Residents:
        slots = pool_slots(storage.config, storage.cache_bytes, storage.item_size)
        pool = pool_bytes(storage.config, slots, storage.item_size)
        return storage.residents(needs_bank=True, local_index=True, pool=pool)

    def stages(self, sizes: LayerSizes, tokens: int, pool: Pool | None) -> list[Stage]:
        assert pool is not None, "the cost of a cache depends on its slots"
        active = sizes.active_experts(tokens)
        passes = ceil(min(tokens * sizes.top_k, sizes.experts) / pool.slots)
        misses = active * pool.misses(active / sizes.experts)
        composed = 2 * misses * sizes.rank * sizes.hidden
        compose = Stage(
            composed * (sizes.support + 1),
            2 * composed * sizes.support,
            {"lookup": passes, "miss": misses},
            launches=2 * passes,
            is_gathered=True,
        )
        return [routing_stage(sizes, tokens), compose, *stages_after_composing(sizes, tokens, passes=passes)]

    def hold(self, layer: Layer) -> None:
        if layer.device_bank.holds_copies:
            for family in FAMILIES:
                layer.keep(f"{family}_local_index", device_code(layer, family).index)

    def run(self, layer: Layer, routed: Routed) -> torch.Tensor:
        cache = layer.device_bank.cache
        first = cache.first_expert(layer.layer)
        return moe_ffn_cached(*routed, cached_weights(layer), cache, first, layer.phi, layer.activation)


def cached_weights(layer: Layer) -> CachedWeights:
    """Return everything that a call of `layer` takes beside the pool."""
    bank, gate, up = layer.device_bank, layer.code("gate"), layer.code("up")
    indices = [gate.index, up.index]
    if bank.holds_copies:
        indices = [layer.kept(f"{family}_local_index") for family in FAMILIES]
    mixtures = Mixtures(bank.gate, bank.up, indices[0], gate.value, indices[1], up.value)
    return CachedWeights(mixtures, layer.from_rank)
