# pyright: reportInvalidTypeForm=false
"""Compose the bases that a cache misses into their slots of the pool, gate and up in one launch.

    pool[miss_slot[w]] = [basis_gate[e]; basis_up[e]]       e = miss_expert[w], for every w of the worklist
    basis_f[e] = phi(sum_c value_f[e, c] * bank_f[index_f[e, c]])

Shapes: E experts, W places of the worklist, C support, M atoms, R rank, D hidden size. Accumulates in fp32.
"""

from typing import NamedTuple

import torch

from globe_kernels.ops.compose_basis import compose_basis_ref, compose_values
from globe_kernels.ops.registration import register_op
from globe_kernels.ops.triton_import import tl, triton, use_triton

_BLOCK = 2048
_WARPS = 8
# About as many programs as the largest cards run at once; the length of the worklist is known on the device alone, and
# one launch for its longest would be thousands of programs that find nothing to do.
_PROGRAMS = 1024


class Mixtures(NamedTuple):
    """Banks and codes of one layer, from which its bases are mixed."""

    gate_bank: torch.Tensor  # (M, R, D)
    up_bank: torch.Tensor  # (M, R, D)
    gate_index: torch.Tensor  # (E, C) int32
    gate_value: torch.Tensor  # (E, C) float32
    up_index: torch.Tensor  # (E, C) int32
    up_value: torch.Tensor  # (E, C) float32

    def contiguous(self) -> "Mixtures":
        return Mixtures(*(tensor.contiguous() for tensor in self))


@triton.jit(do_not_specialize=["worklist"])
def _compose_slots_kernel(
    miss_expert_ptr,  # (W,) int32, -1 past the end
    miss_slot_ptr,  # (W,) int32
    pool_ptr,  # (slots, 2, num_values)
    gate_bank_ptr,  # (M, num_values)
    up_bank_ptr,  # (M, num_values)
    gate_index_ptr,  # (E, C) int32
    gate_value_ptr,  # (E, C) float32
    up_index_ptr,  # (E, C) int32
    up_value_ptr,  # (E, C) float32
    worklist,  # W
    num_values,  # R * D
    support,  # C
    PHI: tl.constexpr,
    BLOCK: tl.constexpr,
    W_PAD: tl.constexpr,
):
    """Grid: any number of programs, which take turns at blocks of BLOCK values of one basis.

    Places of the worklist vary fastest, so that programs that run together read the same slice of the atoms and the L2
    cache serves all but the first read of each.
    """
    places = tl.arange(0, W_PAD)
    misses = tl.sum((tl.load(miss_expert_ptr + places, mask=places < worklist, other=-1) >= 0).to(tl.int32), 0)
    blocks = tl.cdiv(num_values, BLOCK)
    for turn in range(tl.program_id(0), 2 * blocks * misses, tl.num_programs(0)):
        place, block = turn % misses, turn // misses
        expert = tl.load(miss_expert_ptr + place)
        values = block % blocks * BLOCK + tl.arange(0, BLOCK)
        out = pool_ptr + tl.load(miss_slot_ptr + place).to(tl.int64) * (2 * num_values)
        if block < blocks:
            compose_values(gate_index_ptr, gate_value_ptr, gate_bank_ptr, out, expert, values, num_values, support, PHI)
        else:
            out += num_values
            compose_values(up_index_ptr, up_value_ptr, up_bank_ptr, out, expert, values, num_values, support, PHI)


def launch_compose_slots(
    miss_expert: torch.Tensor, miss_slot: torch.Tensor, pool: torch.Tensor, mixtures: Mixtures, phi: str
) -> None:
    """Launch the kernel on contiguous inputs, without waiting for the device."""
    worklist, support = miss_expert.numel(), mixtures.gate_index.shape[1]
    num_values = mixtures.gate_bank[0].numel()
    _compose_slots_kernel[(min(_PROGRAMS, 2 * triton.cdiv(num_values, _BLOCK) * worklist),)](
        miss_expert,
        miss_slot,
        pool,
        *mixtures,
        worklist,
        num_values,
        support,
        PHI=phi,
        BLOCK=_BLOCK,
        W_PAD=max(16, triton.next_power_of_2(worklist)),
        num_warps=_WARPS,
    )


def _run(
    miss_expert: torch.Tensor, miss_slot: torch.Tensor, pool: torch.Tensor, mixtures: list[torch.Tensor], phi: str
) -> None:
    m = Mixtures(*mixtures)
    if use_triton(pool):
        launch_compose_slots(miss_expert.contiguous(), miss_slot.contiguous(), pool, m.contiguous(), phi)
    else:
        compose_slots_ref(miss_expert, miss_slot, pool, m, phi)


# Writes pool (slots, 2R, D) at miss_slot (W,), from Mixtures; a place with miss_expert -1 ends the worklist (W,).
compose_slots = register_op(
    "compose_slots(Tensor miss_expert, Tensor miss_slot, Tensor(a!) pool, Tensor[] mixtures, str phi) -> ()",
    _run,
    lambda *_: None,
)


def compose_mixtures(mixtures: Mixtures, phi: str) -> torch.Tensor:
    """Return all bases (E, 2R, D) of a layer."""
    num_experts, (_, rank, width) = mixtures.gate_index.shape[0], mixtures.gate_bank.shape
    every = torch.arange(num_experts, dtype=torch.int32, device=mixtures.gate_bank.device)
    bases = mixtures.gate_bank.new_empty(num_experts, 2 * rank, width)
    compose_slots(every, every, bases, list(mixtures), phi)
    return bases


def compose_slots_ref(
    miss_expert: torch.Tensor, miss_slot: torch.Tensor, pool: torch.Tensor, mixtures: Mixtures, phi: str
) -> None:
    """Compose as `launch_compose_slots` does; waits for the device."""
    m = mixtures
    families = ((m.gate_index, m.gate_value, m.gate_bank), (m.up_index, m.up_value, m.up_bank))
    for expert, slot in zip(miss_expert.tolist(), miss_slot.tolist(), strict=True):
        if expert < 0:
            return
        for half, (index, value, bank) in zip(pool[slot].chunk(2), families, strict=True):
            half.copy_(compose_basis_ref(index[expert, None], value[expert, None], bank, phi, pool.dtype)[0])
