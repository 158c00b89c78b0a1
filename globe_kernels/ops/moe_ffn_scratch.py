"""Run the experts of one layer from bases that do not outlive the call.

As ops/moe_ffn.py, whose gradient keeps the bases until the backward. Here the caller may overwrite them after the call:
the backward composes them again, from the codes and the bank.
"""

from typing import NamedTuple

import torch

from globe_kernels.ops.compose_layer import LayerCode, compose_bases
from globe_kernels.ops.moe_ffn import FromRank, differentiate, fake_like_hidden, run_moe_ffn
from globe_kernels.ops.registration import register_op


class ScratchWeights(NamedTuple):
    """The bases (E, 2R, D) of one layer, the codes and atoms from which they are composed, and all other weights."""

    basis: torch.Tensor
    codes: tuple[LayerCode, LayerCode]  # of gate and of up
    banks: tuple[torch.Tensor, torch.Tensor]  # (M, R, D) of gate and of up
    phi: str
    from_rank: FromRank


def _run(
    hidden: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    basis: torch.Tensor,
    codes: list[torch.Tensor],
    banks: list[torch.Tensor],
    from_rank: list[torch.Tensor | None],
    phi: str,
    activation: str,
    deterministic: bool,
) -> torch.Tensor:
    return run_moe_ffn(hidden, top_k_index, top_k_weights, [basis, *from_rank], activation, deterministic)


def _backward(
    gradient: torch.Tensor,
    hidden: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    codes: list[torch.Tensor],
    banks: list[torch.Tensor],
    from_rank: list[torch.Tensor | None],
    phi: str,
    activation: str,
) -> dict[str, torch.Tensor]:
    basis = compose_bases(codes, banks, phi, hidden.dtype)
    return differentiate(gradient, hidden, top_k_index, top_k_weights, [basis, *from_rank], activation)


# (T, D) in the dtype of hidden (T, D): as moe_ffn from `basis`, which compose_bases made from codes, banks and phi.
moe_ffn_scratch = register_op(
    "moe_ffn_scratch(Tensor hidden, Tensor top_k_index, Tensor top_k_weights, Tensor basis, Tensor[] codes, "
    "Tensor[] banks, Tensor?[] from_rank, str phi, str activation, bool deterministic) -> Tensor",
    _run,
    fake_like_hidden,
    _backward,
)
