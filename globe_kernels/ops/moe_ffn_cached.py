"""Run the experts of one layer from a bounded pool of bases, and from the bank where the pool lacks a basis.

As `ops/moe_ffn.py`, with S1 in passes over the active experts, as many at a time as the pool has slots:

    lookup    which experts of the pass are in the pool, slots for the others       (ops/cache_lookup.py)
    compose   the others, from the bank into their slots                            (ops/compose_slots.py)
    S1        the rows of the experts of the pass                                   (ops/low_rank_in.py)

The result does not depend on the size or the earlier contents of the pool; the time does. A call takes one pass, unless
the pool has fewer slots than T * K routed rows may activate experts.

Shapes: T tokens, K experts per token, E experts, C support, M atoms, P intermediate size, D hidden size, R rank.
Deterministic. Calls of the op that share a cache follow each other, whatever thread and stream they come from
(ops/cache_turns.py).
"""

from typing import NamedTuple

import torch

from globe_kernels.ops.cache_lookup import CacheState, cache_lookup_ref, launch_cache_lookup
from globe_kernels.ops.cache_turns import turn_of
from globe_kernels.ops.compose_slots import Mixtures, compose_mixtures, compose_slots_ref, launch_compose_slots
from globe_kernels.ops.counters import count_call
from globe_kernels.ops.down import down_ref, launch_down
from globe_kernels.ops.gate_up import gate_up_ref, launch_gate_up
from globe_kernels.ops.low_rank_in import launch_low_rank_in, low_rank_in_ref
from globe_kernels.ops.moe_ffn import FromRank, differentiate, fake_like_hidden
from globe_kernels.ops.registration import register_op
from globe_kernels.ops.routing import launch_routing_plan, routing_plan_ref
from globe_kernels.ops.triton_import import use_triton
from globe_kernels.ops.tuning import FfnConfig, choose


class CachedWeights(NamedTuple):
    """All weights of the experts of one layer beside the pool, on one device, in one dtype except for the codes."""

    mixtures: Mixtures
    from_rank: FromRank

    def contiguous(self) -> "CachedWeights":
        return CachedWeights(self.mixtures.contiguous(), self.from_rank.contiguous())


def _run(
    hidden: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    cache: int,
    mixtures: list[torch.Tensor],
    from_rank: list[torch.Tensor | None],
    first_expert: int,
    phi: str,
    activation: str,
    deterministic: bool,
) -> torch.Tensor:
    w = CachedWeights(Mixtures(*mixtures), FromRank(*from_rank))  # pyright: ignore[reportArgumentType]
    if not use_triton(hidden):
        count_call("moe_ffn_cached_ref")
        with turn_of(cache) as state:
            return moe_ffn_cached_ref(hidden, top_k_index, top_k_weights, w, state, first_expert, phi, activation)
    count_call("moe_ffn_cached")
    config = choose(w.from_rank.shape, top_k_index.numel(), hidden.element_size(), hidden.device)
    case = (hidden.contiguous(), top_k_index.contiguous(), top_k_weights.contiguous(), w.contiguous())
    with turn_of(cache) as state:
        return launch_moe_ffn_cached(*case, state, first_expert, phi, activation, config, deterministic)


def _backward(
    gradient: torch.Tensor,
    hidden: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    mixtures: list[torch.Tensor],
    from_rank: list[torch.Tensor | None],
    phi: str,
    activation: str,
) -> dict[str, torch.Tensor]:
    basis = compose_mixtures(Mixtures(*mixtures), phi)  # the pool may have other bases by now
    return differentiate(gradient, hidden, top_k_index, top_k_weights, [basis, *from_rank], activation)


# (T, D) in the dtype of hidden (T, D): kernels on a GPU, the reference elsewhere. top_k_index and top_k_weights (T, K);
# cache: the number of the cache, whose state the op brings up to date; mixtures: Mixtures; from_rank: FromRank. The
# experts of the layer are first_expert .. first_expert + E - 1 of the cache. globe_kernels.functional checks shapes.
moe_ffn_cached = register_op(
    "moe_ffn_cached(Tensor hidden, Tensor top_k_index, Tensor top_k_weights, int cache, Tensor[] mixtures, "
    "Tensor?[] from_rank, int first_expert, str phi, str activation, bool deterministic) -> Tensor",
    _run,
    fake_like_hidden,
    _backward,
)


def num_passes(num_rows: int, num_experts: int, num_slots: int) -> int:
    """Return how many passes serve the most experts that `num_rows` routed rows can activate."""
    return -(-min(num_rows, num_experts) // num_slots)


def launch_moe_ffn_cached(
    hidden: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    w: CachedWeights,
    state: CacheState,
    first_expert: int,
    phi: str,
    activation: str,
    config: FfnConfig,
    deterministic: bool = True,
) -> torch.Tensor:
    """Launch the kernels on contiguous inputs in `config`, without waiting for the device."""
    if hidden.shape[0] == 0:
        return torch.empty_like(hidden)
    num_experts = w.from_rank.shape.experts
    plan = launch_routing_plan(top_k_index, num_experts, config.block_m)
    h = hidden.new_empty(plan.num_rows, state.pool.shape[1])
    for number in range(num_passes(plan.num_rows, num_experts, state.pool.shape[0])):
        lookup = launch_cache_lookup(plan.starts, first_expert, number, state.maps)
        launch_compose_slots(lookup.miss_expert, lookup.miss_slot, state.pool, w.mixtures, phi)
        launch_low_rank_in(hidden, plan, state.pool, config.low_rank_in, lookup.slots, h)
    y = launch_gate_up(h, plan, w.from_rank.adapters, activation, config.gate_up)
    return launch_down(y, plan, w.from_rank.down, (top_k_index, top_k_weights), config.down, deterministic)


def moe_ffn_cached_ref(
    hidden: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    w: CachedWeights,
    state: CacheState,
    first_expert: int,
    phi: str,
    activation: str,
) -> torch.Tensor:
    """Run the references of the stages."""
    num_experts = w.from_rank.shape.experts
    plan = routing_plan_ref(top_k_index, num_experts, block_m=16)
    h = hidden.new_zeros(plan.num_rows, state.pool.shape[1])
    for number in range(num_passes(plan.num_rows, num_experts, state.pool.shape[0])):
        lookup = cache_lookup_ref(plan.starts, first_expert, number, state.maps)
        compose_slots_ref(lookup.miss_expert, lookup.miss_slot, state.pool, w.mixtures, phi)
        low_rank_in_ref(hidden, plan, state.pool, lookup.slots, h)
    y = gate_up_ref(h, plan, w.from_rank.adapters, activation)
    return down_ref(y, plan, w.from_rank.down, top_k_weights)
