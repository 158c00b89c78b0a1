"""Compose the basis of every expert of one layer from the bank.

    basis[e] = phi(sum_c code_value[e, c] * bank[code_index[e, c]])

Shapes: E experts, C support, M atoms, R rank, D hidden size. Accumulates in fp32.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

PHI_FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "identity": lambda mixture: mixture,
    "silu": F.silu,
    "tanh": torch.tanh,
}


def compose_basis_ref(
    code_index: torch.Tensor,  # (E, C) int32
    code_value: torch.Tensor,  # (E, C) float32
    bank: torch.Tensor,  # (M, R, D)
    phi: str,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """(E, R, D) in `out_dtype`, by default the bank's. One expert at a time: holds C atoms in fp32."""
    num_experts = code_index.shape[0]
    out = torch.empty(num_experts, *bank.shape[1:], dtype=out_dtype or bank.dtype, device=bank.device)
    apply_phi = PHI_FUNCTIONS[phi]
    for expert in range(num_experts):
        atoms = bank[code_index[expert]].flatten(1).float()
        mixture = code_value[expert].float() @ atoms
        out[expert] = apply_phi(mixture).view(out.shape[1:])
    return out
