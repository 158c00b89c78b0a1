# pyright: reportInvalidTypeForm=false
"""Compose the bases of some experts from the bank, each by itself; ops/compose_layer.py composes whole layers.

    basis[e] = phi(sum_c code_value[e, c] * bank[code_index[e, c]])

Shapes: E experts, C support, M atoms, R rank, D hidden size. Accumulates in fp32; codes stay fp32.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from globe_kernels.ops.triton_import import tl, triton

PHI_FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "identity": lambda mixture: mixture,
    "silu": F.silu,
    "tanh": torch.tanh,
}
_BLOCK = 2048
_WARPS = 8
# Values of an atom that the reference mixes at a time: few fit the cache of a CPU, many mean few launches on a GPU.
_CPU_VALUES, _GPU_VALUES = 2**14, 2**20


@triton.jit
def apply_phi(mixture, PHI: tl.constexpr):
    """Apply phi to a float32 block."""
    if PHI == "silu":
        y = mixture * tl.sigmoid(mixture)
    elif PHI == "tanh":
        y = 2 * tl.sigmoid(2 * mixture) - 1
    else:
        tl.static_assert(PHI == "identity", "a phi without kernel")
        y = mixture
    return y


@triton.jit
def compose_values(
    index_ptr,  # (E, C) int32
    value_ptr,  # (E, C) float32
    bank_ptr,  # (M, num_values)
    out_ptr,  # (num_values,), the basis of this expert
    expert,
    values,  # the places to compute
    num_values,  # R * D
    support,  # C
    PHI: tl.constexpr,
):
    """Compose some values of the basis of one expert."""
    mask = values < num_values
    mixture = tl.zeros(values.shape, dtype=tl.float32)
    for place in range(support):
        atom = tl.load(index_ptr + expert * support + place).to(tl.int64)
        alpha = tl.load(value_ptr + expert * support + place)
        mixture += alpha * tl.load(bank_ptr + atom * num_values + values, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + values, apply_phi(mixture, PHI).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _compose_basis_kernel(
    index_ptr,  # (E, C) int32
    value_ptr,  # (E, C) float32
    bank_ptr,  # (M, num_values)
    out_ptr,  # (E, num_values)
    num_values,  # R * D
    support,  # C
    PHI: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (E, cdiv(R * D, BLOCK)). One program owns BLOCK values of one expert.

    Experts vary fastest, so that programs that run together read the same slice of the atoms and the L2 cache serves
    all but the first read of each.
    """
    expert = tl.program_id(0)
    values = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    out = out_ptr + expert.to(tl.int64) * num_values
    compose_values(index_ptr, value_ptr, bank_ptr, out, expert, values, num_values, support, PHI)


def launch_compose_basis(
    code_index: torch.Tensor, code_value: torch.Tensor, bank: torch.Tensor, phi: str, out_dtype: torch.dtype
) -> torch.Tensor:
    """Launch the kernel on contiguous inputs; return (E, R, D) in `out_dtype`."""
    num_experts, support = code_index.shape
    out = torch.empty(num_experts, *bank.shape[1:], dtype=out_dtype, device=bank.device)
    num_values = bank.shape[1] * bank.shape[2]
    _compose_basis_kernel[(num_experts, triton.cdiv(num_values, _BLOCK))](
        code_index, code_value, bank, out, num_values, support, PHI=phi, BLOCK=_BLOCK, num_warps=_WARPS
    )
    return out


def compose_basis_ref(
    code_index: torch.Tensor,  # (E, C) int32
    code_value: torch.Tensor,  # (E, C) float32
    bank: torch.Tensor,  # (M, R, D)
    phi: str,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Compose (E, R, D) in `out_dtype`, by default the dtype of the bank: one expert at a time, from C atoms."""
    out = torch.empty(code_index.shape[0], *bank.shape[1:], dtype=out_dtype or bank.dtype, device=bank.device)
    flat, bases = bank.flatten(1), out.flatten(1)
    for expert, index in enumerate(code_index):
        mix_atoms(code_value[expert, None].float(), index, flat, phi, bases[expert, None])
    return out


def mix_atoms(value: torch.Tensor, atoms: torch.Tensor, bank: torch.Tensor, phi: str, out: torch.Tensor) -> None:
    """Write phi of value (E, U) float32 times the atoms (U,) of `bank` (M, V) into `out` (E, V).

    Multiplies in fp32, atoms of fp64 in fp64.
    """
    value = value.to(torch.promote_types(bank.dtype, torch.float32))
    step = _CPU_VALUES if bank.device.type == "cpu" else _GPU_VALUES
    for start in range(0, bank.shape[1], step):
        part = slice(start, start + step)
        out[:, part] = PHI_FUNCTIONS[phi](value @ bank[:, part].index_select(0, atoms).to(value.dtype))
