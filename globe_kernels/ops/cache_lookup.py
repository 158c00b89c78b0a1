# pyright: reportInvalidTypeForm=false
"""Look up the bases of a layer's experts in the pool of a cache, and give slots to the missing bases: CLOCK.

An expert is active when it has rows in the plan. A pass takes the active experts number pass_number * slots to
(pass_number + 1) * slots - 1 of the layer, so that a pool of any size serves every layer, in one pass or more.

    hit      the slot is marked as referenced, and belongs to this pass miss     the hand walks the slots in a circle,
    past the slots of this pass: a referenced slot loses its mark and keeps
             its basis until the hand comes again, a slot without mark is the victim

Misses one after the other, as in the textbook, or all at once, as here, find the same victims: the first slots without
mark in the order of the walk. Where there are too few, all slots have lost their mark and the walk goes around again.

Shapes: E experts of the layer, n experts of all layers one after the other, W = min(E, slots).
"""

from typing import NamedTuple

import torch

from globe_kernels.ops.triton_import import tl, triton

_BLOCK = 512  # slots that the hand passes at once: more than a step misses, once the marks are spread
_WARPS = 8


class CacheMaps(NamedTuple):
    """The contents of the pool, on its device. A lookup writes all of these tensors."""

    slot_of: torch.Tensor  # (n,) int32, -1 for an expert that is not in the pool
    owner: torch.Tensor  # (slots,) int32, the number of the expert among all, or -1
    referenced: torch.Tensor  # (slots,) int32, 1 for a slot that gets a second chance
    pinned: torch.Tensor  # (slots,) int64, tick of the last pass that used the slot
    uses: torch.Tensor  # (n,) int64, how often each expert was active
    registers: torch.Tensor  # (5,) int64: tick, hand, hits, misses, evictions


class CacheState(NamedTuple):
    """The pool of bases and its CacheMaps. A slot holds the basis of one expert of one layer, gate rows first."""

    pool: torch.Tensor  # (slots, 2R, D)
    slot_of: torch.Tensor
    owner: torch.Tensor
    referenced: torch.Tensor
    pinned: torch.Tensor
    uses: torch.Tensor
    registers: torch.Tensor

    @property
    def maps(self) -> CacheMaps:
        return CacheMaps(*self[1:])


class Lookup(NamedTuple):
    """The slots of the experts of a pass, and the worklist that must be composed first."""

    slots: torch.Tensor  # (E,) int32, -1 for an expert that this pass leaves out
    miss_expert: torch.Tensor  # (W,) int32, the worklist: numbers within the layer, -1 past its end
    miss_slot: torch.Tensor  # (W,) int32, likewise


@triton.jit(do_not_specialize=["first_expert", "pass_number"])
def _cache_lookup_kernel(
    starts_ptr,  # (E + 1,) int32
    slot_of_ptr,  # (n,) int32
    owner_ptr,  # (slots,) int32
    referenced_ptr,  # (slots,) int32
    pinned_ptr,  # (slots,) int64
    uses_ptr,  # (n,) int64
    registers_ptr,  # (5,) int64
    slots_ptr,  # (E,) int32
    miss_expert_ptr,  # (W,) int32
    miss_slot_ptr,  # (W,) int32
    first_expert,
    pass_number,
    num_experts,  # E
    num_slots,
    worklist,  # W
    E_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (1,). One program answers for all experts; threads hold copies of a block, hence the barriers."""
    tick = tl.load(registers_ptr) + 1
    hand = tl.load(registers_ptr + 1).to(tl.int32)
    experts = tl.arange(0, E_PAD)
    known = experts < num_experts
    start = tl.load(starts_ptr + experts, mask=known, other=0)
    active = tl.load(starts_ptr + experts + 1, mask=known, other=0) > start
    rank = tl.cumsum(active.to(tl.int32), 0) - 1
    chosen = active & (rank // num_slots == pass_number)
    held = tl.load(slot_of_ptr + first_expert + experts, mask=chosen, other=-1)
    hit = held >= 0
    missed = (chosen & (held < 0)).to(tl.int32)
    miss_rank = tl.cumsum(missed, 0) - missed
    misses = tl.sum(missed, 0)
    tl.store(referenced_ptr + held, 1, mask=hit)
    tl.store(pinned_ptr + held, tick, mask=hit)
    tl.debug_barrier()

    taken = 0
    evictions = 0
    first = 0
    last = -1
    while taken < misses:
        steps = first + tl.arange(0, BLOCK)
        inside = steps < num_slots
        slot = hand + steps
        slot -= tl.where(slot < num_slots, 0, num_slots)
        marked = tl.load(referenced_ptr + slot, mask=inside, other=0)
        free = inside & (tl.load(pinned_ptr + slot, mask=inside, other=0) != tick)
        tl.debug_barrier()
        candidate = (free & (marked == 0)).to(tl.int32)
        place = taken + tl.cumsum(candidate, 0) - candidate
        passed = free & (place < misses)
        victim = passed & (marked == 0)
        # a victim is marked for its new owner, the other slots that the hand passed lose their mark
        tl.store(referenced_ptr + slot, victim.to(tl.int32), mask=passed)
        tl.store(pinned_ptr + slot, tick, mask=victim)
        tl.store(miss_slot_ptr + place, slot, mask=victim)
        evicted = tl.load(owner_ptr + slot, mask=victim, other=-1)
        tl.store(slot_of_ptr + evicted, -1, mask=evicted >= 0)
        evictions += tl.sum((evicted >= 0).to(tl.int32), 0)
        found = tl.sum(victim.to(tl.int32), 0)
        last = tl.where(found > 0, tl.max(tl.where(victim, steps, -1), 0), last)
        taken += found
        first = tl.where(first + BLOCK < num_slots, first + BLOCK, 0)
        tl.debug_barrier()

    new = tl.load(miss_slot_ptr + miss_rank, mask=missed > 0, other=-1)
    tl.store(slot_of_ptr + first_expert + experts, new, mask=missed > 0)
    tl.store(owner_ptr + new, first_expert + experts, mask=missed > 0)
    tl.store(slots_ptr + experts, tl.where(hit, held, new), mask=known)
    tl.store(miss_expert_ptr + miss_rank, experts, mask=missed > 0)
    past = (experts >= misses) & (experts < worklist)
    tl.store(miss_expert_ptr + experts, -1, mask=past)
    tl.store(miss_slot_ptr + experts, -1, mask=past)
    uses = tl.load(uses_ptr + first_expert + experts, mask=chosen, other=0)
    tl.store(uses_ptr + first_expert + experts, uses + 1, mask=chosen)
    tl.store(registers_ptr, tick)
    tl.store(registers_ptr + 1, ((hand + last + 1) % num_slots).to(tl.int64))
    tl.store(registers_ptr + 2, tl.load(registers_ptr + 2) + tl.sum(hit.to(tl.int32), 0))
    tl.store(registers_ptr + 3, tl.load(registers_ptr + 3) + misses)
    tl.store(registers_ptr + 4, tl.load(registers_ptr + 4) + evictions)


def launch_cache_lookup(starts: torch.Tensor, first_expert: int, pass_number: int, maps: CacheMaps) -> Lookup:
    """Launch the kernel on contiguous inputs, without waiting for the device."""
    (num_experts, worklist, _), num_slots = _sizes(starts, maps.owner), maps.owner.numel()
    lookup = Lookup(*(starts.new_empty(size) for size in _sizes(starts, maps.owner)))
    _cache_lookup_kernel[(1,)](
        starts,
        *maps,
        *lookup,
        first_expert,
        pass_number,
        num_experts,
        num_slots,
        worklist,
        E_PAD=max(16, triton.next_power_of_2(num_experts)),
        BLOCK=max(16, min(_BLOCK, triton.next_power_of_2(num_slots))),
        num_warps=_WARPS,
    )
    return lookup


def _sizes(starts: torch.Tensor, owner: torch.Tensor) -> tuple[int, int, int]:
    """Return the sizes of the tensors of a Lookup."""
    num_experts = starts.shape[0] - 1
    worklist = min(num_experts, owner.shape[0])
    return num_experts, worklist, worklist


def cache_lookup_ref(starts: torch.Tensor, first_expert: int, pass_number: int, maps: CacheMaps) -> Lookup:
    """Compute what `launch_cache_lookup` computes, without waiting for a device."""
    (num_experts, worklist, _), num_slots = _sizes(starts, maps.owner), maps.owner.numel()
    tick, hand = maps.registers[0] + 1, maps.registers[1]
    slot_of, uses = (t[first_expert : first_expert + num_experts] for t in (maps.slot_of, maps.uses))
    active = starts[1:] > starts[:-1]
    chosen = active & ((active.cumsum(0) - 1) // num_slots == pass_number)
    held = torch.where(chosen, slot_of, -1)
    hit, missed = held >= 0, chosen & (held < 0)
    misses = missed.sum()

    slots = (hand + torch.arange(num_slots, device=starts.device)) % num_slots  # in the order of the walk
    pinned = _written(torch.zeros_like(maps.owner), hit, held, 1)[slots] > 0
    candidate = ~pinned & (maps.referenced[slots] == 0)
    second = ~pinned & ~candidate
    before = candidate.cumsum(0)
    place = torch.where(candidate, before, before[-1] + second.cumsum(0)) - 1
    victim = ~pinned & (place < misses)
    cleared = second & (before < misses)
    evicted = torch.where(victim, maps.owner[slots], -1)

    miss_rank = missed.cumsum(0) - 1
    numbers = torch.arange(num_experts, dtype=torch.int32, device=starts.device)
    empty = numbers.new_full((worklist,), -1)
    lookup = Lookup(
        held, _written(empty, missed, miss_rank, numbers), _written(empty, victim, place, slots.to(torch.int32))
    )
    new = lookup.miss_slot[miss_rank.clamp(min=0)]
    torch.where(missed, new, held, out=lookup.slots)
    maps.slot_of.copy_(_written(maps.slot_of, evicted >= 0, evicted, -1))
    slot_of.copy_(torch.where(missed, new, slot_of))
    maps.owner.copy_(_written(maps.owner, missed, new, first_expert + numbers))
    used = pinned | victim
    maps.referenced[slots] = torch.where(used, 1, torch.where(cleared, 0, maps.referenced[slots]))
    maps.pinned[slots] = torch.where(used, tick, maps.pinned[slots])
    uses += chosen
    last = torch.where(victim & (place == misses - 1), slots + 1, 0).sum()
    maps.registers[0] = tick
    maps.registers[1] = torch.where(misses > 0, last % num_slots, hand)
    maps.registers[2:] += torch.stack([hit.sum(), misses, (evicted >= 0).sum()])
    return lookup


def _written(base: torch.Tensor, mask: torch.Tensor, index: torch.Tensor, value: torch.Tensor | int) -> torch.Tensor:
    """Return a copy of `base` with value[i] at index[i] wherever mask[i]; other writes go past the end."""
    longer = torch.cat([base, base[:1]])
    values = torch.as_tensor(value, dtype=base.dtype, device=base.device).expand(index.shape)
    longer.scatter_(0, torch.where(mask, index, base.numel()).long(), values)
    return longer[:-1]
