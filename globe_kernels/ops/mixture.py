# pyright: reportInvalidTypeForm=false
"""Mixtures of a few atoms of the bank, and their gradients, for a fit of banks that are large.

    mixture[e]   = sum_c value[e, c] * bank[index[e, c]]
    d value[e, c] = <d mixture[e], bank[index[e, c]]>
    d bank[j]    += sum over (e, c) with index[e, c] = j of value[e, c] * d mixture[e]

Shapes: E experts, C places of each, M atoms, R rank, D hidden size; index (E, C) int32, value (E, C), bank (M, R, D),
mixture (E, R, D). Kernels take float32 and sum in it, each in one order: the same call gives the same bits.

An atom may be at several places of one expert. A place that is not used holds any index and the value 0; an atom that
has no other value anywhere gets no gradient, and neither do its values.
"""

from collections.abc import Callable
from functools import partial

import torch

from globe_kernels.ops.compose_basis import launch_compose_basis
from globe_kernels.ops.triton_import import on_its_device, tl, triton, use_triton

# (d mixture, d bank or None): adds to d bank where there is one, returns d value
Backward = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]

_BLOCK = 2048


@triton.jit(do_not_specialize=["num_places", "places_each"])
def _mixture_backward_kernel(
    atom_ptr,  # (E * C,) int32, ascending
    place_ptr,  # (E * C,) int64: e * C + c of each, ascending within an atom
    end_ptr,  # (E * C,) int32: where the places of the same atom end
    value_ptr,  # (E, C) float32
    gradient_ptr,  # (E, num_values) float32
    bank_ptr,  # (M, num_values) float32
    bank_gradient_ptr,  # (M, num_values) float32, added to; or None
    partial_ptr,  # (chunks, E * C) float32, zero at launch
    num_values,  # R * D
    num_places,  # E * C
    places_each,  # C
    BLOCK: tl.constexpr,
):
    """Grid: (E * C, cdiv(R * D, BLOCK)). The program at the first place of an atom owns BLOCK of its values.

    It reads the atom once for the gradients of all its values. Places vary fastest, so that programs that run together
    read the same slice of d mixture and the L2 cache serves all but the first read of each.
    """
    first, chunk = tl.program_id(0), tl.program_id(1)
    atom = tl.load(atom_ptr + first)
    if tl.load(atom_ptr + first - 1, mask=first > 0, other=-1) == atom:
        return
    end = tl.load(end_ptr + first)
    used = 0
    for number in range(first, end):
        used += (tl.load(value_ptr + tl.load(place_ptr + number)) != 0).to(tl.int32)
    if used == 0:
        return
    values = chunk * BLOCK + tl.arange(0, BLOCK)
    mask = values < num_values
    own = atom.to(tl.int64) * num_values + values
    weights = tl.load(bank_ptr + own, mask=mask, other=0.0)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for number in range(first, end):
        place = tl.load(place_ptr + number)
        gradient = tl.load(gradient_ptr + place // places_each * num_values + values, mask=mask, other=0.0)
        total += tl.load(value_ptr + place) * gradient
        tl.store(partial_ptr + chunk.to(tl.int64) * num_places + place, tl.sum(gradient * weights))
    if bank_gradient_ptr is not None:
        tl.store(bank_gradient_ptr + own, tl.load(bank_gradient_ptr + own, mask=mask, other=0.0) + total, mask=mask)


@on_its_device
def launch_mixture_backward(
    index: torch.Tensor,
    value: torch.Tensor,
    bank: torch.Tensor,
    gradient: torch.Tensor,
    bank_gradient: torch.Tensor | None,
) -> torch.Tensor:
    """d value (E, C), by the kernel on contiguous inputs; nobody waits for the device."""
    num_values = bank.shape[1] * bank.shape[2]
    atoms, places = index.flatten().sort(stable=True)
    ends = torch.searchsorted(atoms, atoms, right=True, out_int32=True)
    chunks = triton.cdiv(num_values, _BLOCK)
    sums = torch.zeros(chunks, index.numel(), device=bank.device)
    _mixture_backward_kernel[(index.numel(), chunks)](
        atoms,
        places,
        ends,
        value,
        gradient,
        bank,
        bank_gradient,
        sums,
        num_values,
        index.numel(),
        index.shape[1],
        BLOCK=_BLOCK,
        num_warps=8,
    )
    return sums.sum(0).view_as(value)


@on_its_device
def mixture(index: torch.Tensor, value: torch.Tensor, bank: torch.Tensor) -> tuple[torch.Tensor, Backward]:
    """(E, R, D), and what its gradient makes of those of `value` and `bank`. On a GPU all are contiguous float32."""
    if not use_triton(bank):
        return mixture_ref(index, value, bank)
    assert value.is_contiguous() and bank.is_contiguous() and bank.dtype == value.dtype == torch.float32
    index = index.contiguous()
    forward = launch_compose_basis(index, value, bank, "identity", torch.float32)
    return forward, partial(launch_mixture_backward, index, value, bank)


def mixture_ref(index: torch.Tensor, value: torch.Tensor, bank: torch.Tensor) -> tuple[torch.Tensor, Backward]:
    """As `mixture`, in any dtype: dense products with the atoms that are used, which are copied.

    Where more than half are used it is all of them, without a copy.
    """
    codes = value.new_zeros(len(value), len(bank)).scatter_add_(1, index.long(), value)
    atoms = (codes != 0).any(0).nonzero().flatten()
    own, part = codes, bank.flatten(1)
    if 2 * len(atoms) > len(bank):
        atoms = torch.arange(len(bank), device=bank.device)
    else:
        own, part = codes[:, atoms], part[atoms]

    def backward(gradient: torch.Tensor, bank_gradient: torch.Tensor | None) -> torch.Tensor:
        flat = gradient.flatten(1)
        if bank_gradient is not None:
            bank_gradient.index_add_(0, atoms, (own.T @ flat).view(-1, *bank.shape[1:]))
        return torch.zeros_like(codes).index_copy_(1, atoms, flat @ part.T).gather(1, index.long())

    return (own @ part).view(-1, *bank.shape[1:]), backward
