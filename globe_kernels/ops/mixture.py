# pyright: reportInvalidTypeForm=false
"""Mix a few atoms of the bank for each expert, with gradients, for a fit whose bank is large.

    mixture[e]   = sum_c value[e, c] * bank[index[e, c]]
    d value[e, c] = <d mixture[e], bank[index[e, c]]>
    d bank[j]    += sum over (e, c) with index[e, c] = j of value[e, c] * d mixture[e]

Shapes: E experts, C entries of each, M atoms, R rank, D hidden size; index (E, C) int32, value (E, C), bank (M, R, D),
mixture (E, R, D). Kernels take float32 and sum in it, each in one order: the same call gives the same bits.

An entry is a pair (e, c). An atom may be in several entries of an expert. An unused entry holds any index and the value
0; an atom that has only the value 0 gets no gradient, and neither do its entries.
"""

from collections.abc import Callable
from functools import partial

import torch

from globe_kernels.ops.compose_basis import launch_compose_basis
from globe_kernels.ops.triton_import import on_its_device, tl, triton, use_triton

# (d mixture, d bank or None): adds to d bank unless it is None, returns d value
Backward = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]

_BLOCK = 2048
_WARPS = 8


@triton.jit(do_not_specialize=["num_entries", "entries_each"])
def _mixture_backward_kernel(
    atom_ptr,  # (E * C,) int32, ascending
    entry_ptr,  # (E * C,) int64: e * C + c, ascending within an atom
    end_ptr,  # (E * C,) int32: where the entries of the same atom end
    value_ptr,  # (E, C) float32
    gradient_ptr,  # (E, num_values) float32
    bank_ptr,  # (M, num_values) float32
    bank_gradient_ptr,  # (M, num_values) float32, added to; or None
    partial_ptr,  # (chunks, E * C) float32, zero at launch
    num_values,  # R * D
    num_entries,  # E * C
    entries_each,  # C
    BLOCK: tl.constexpr,
):
    """Grid: (E * C, cdiv(R * D, BLOCK)). The program at the first entry of an atom owns BLOCK of its values.

    The program reads the atom once for the gradients of all its entries. Entries vary fastest, so that programs that
    run together read the same slice of d mixture, and the L2 cache serves all reads of a slice but the first.
    """
    first, chunk = tl.program_id(0), tl.program_id(1)
    atom = tl.load(atom_ptr + first)
    if tl.load(atom_ptr + first - 1, mask=first > 0, other=-1) == atom:
        return
    end = tl.load(end_ptr + first)
    used = 0
    for number in range(first, end):
        used += (tl.load(value_ptr + tl.load(entry_ptr + number)) != 0).to(tl.int32)
    if used == 0:
        return
    values = chunk * BLOCK + tl.arange(0, BLOCK)
    mask = values < num_values
    in_bank = atom.to(tl.int64) * num_values + values
    atom_values = tl.load(bank_ptr + in_bank, mask=mask, other=0.0)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for number in range(first, end):
        entry = tl.load(entry_ptr + number)
        gradient = tl.load(gradient_ptr + entry // entries_each * num_values + values, mask=mask, other=0.0)
        total += tl.load(value_ptr + entry) * gradient
        tl.store(partial_ptr + chunk.to(tl.int64) * num_entries + entry, tl.sum(gradient * atom_values))
    if bank_gradient_ptr is not None:
        before = tl.load(bank_gradient_ptr + in_bank, mask=mask, other=0.0)
        tl.store(bank_gradient_ptr + in_bank, before + total, mask=mask)


@on_its_device
def launch_mixture_backward(
    index: torch.Tensor,
    value: torch.Tensor,
    bank: torch.Tensor,
    gradient: torch.Tensor,
    bank_gradient: torch.Tensor | None,
) -> torch.Tensor:
    """Return d value (E, C) and add to `bank_gradient`, on contiguous inputs; nobody waits for the device."""
    num_values = bank.shape[1] * bank.shape[2]
    atoms, entries = index.flatten().sort(stable=True)
    ends = torch.searchsorted(atoms, atoms, right=True, out_int32=True)
    chunks = triton.cdiv(num_values, _BLOCK)
    sums = torch.zeros(chunks, index.numel(), device=bank.device)
    _mixture_backward_kernel[(index.numel(), chunks)](
        atoms,
        entries,
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
        num_warps=_WARPS,
    )
    return sums.sum(0).view_as(value)


@on_its_device
def mixture(index: torch.Tensor, value: torch.Tensor, bank: torch.Tensor) -> tuple[torch.Tensor, Backward]:
    """Return the mixtures (E, R, D) and their backward function. On a GPU all tensors are contiguous float32."""
    if not use_triton(bank):
        return mixture_ref(index, value, bank)
    assert value.is_contiguous() and bank.is_contiguous() and bank.dtype == value.dtype == torch.float32
    index = index.contiguous()
    forward = launch_compose_basis(index, value, bank, "identity", torch.float32)
    return forward, partial(launch_mixture_backward, index, value, bank)


def mixture_ref(index: torch.Tensor, value: torch.Tensor, bank: torch.Tensor) -> tuple[torch.Tensor, Backward]:
    """Return the same in any dtype, by dense products with the atoms in use.

    The atoms in use are copied; where they are more than half of the bank, the products are with the bank itself.
    """
    codes = value.new_zeros(len(value), len(bank)).scatter_add_(1, index.long(), value)
    atoms = (codes != 0).any(0).nonzero().flatten()
    used_codes, used_bank = codes, bank.flatten(1)
    if 2 * len(atoms) > len(bank):
        atoms = torch.arange(len(bank), device=bank.device)
    else:
        used_codes, used_bank = codes[:, atoms], used_bank[atoms]

    def backward(gradient: torch.Tensor, bank_gradient: torch.Tensor | None) -> torch.Tensor:
        flat = gradient.flatten(1)
        if bank_gradient is not None:
            bank_gradient.index_add_(0, atoms, (used_codes.T @ flat).view(-1, *bank.shape[1:]))
        return torch.zeros_like(codes).index_copy_(1, atoms, flat @ used_bank.T).gather(1, index.long())

    return (used_codes @ used_bank).view(-1, *bank.shape[1:]), backward
