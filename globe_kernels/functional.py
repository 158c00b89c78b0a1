"""Validates what a module passes and picks the backend."""

import torch

from globe_kernels.ops.counters import count_call
from globe_kernels.ops.moe_ffn import ExpertWeights, moe_ffn_ref
from globe_kernels.routing import build_routing_plan_ref


def moe_ffn(
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    weights: ExpertWeights,
    activation: str,
) -> torch.Tensor:
    """The routed experts of one layer (formula and shapes: `globe_kernels.ops.moe_ffn`).

    hidden_states (T, D) in the dtype of `weights`; top_k_index (T, K) of any integer dtype, where ids
    outside 0..E-1 contribute nothing; top_k_weights (T, K) of any float dtype. Returns (T, D).
    Raises ValueError when shapes or dtypes do not fit.
    """
    num_experts, width, _ = weights.down.shape
    if hidden_states.ndim != 2 or hidden_states.shape[1] != width:
        raise ValueError(
            f"hidden_states has shape {tuple(hidden_states.shape)} and (tokens, {width}) was expected; flatten "
            "batch and sequence first."
        )
    if top_k_index.shape != top_k_weights.shape or top_k_index.shape[:1] != hidden_states.shape[:1]:
        raise ValueError(
            f"top_k_index {tuple(top_k_index.shape)} and top_k_weights {tuple(top_k_weights.shape)} must both be "
            f"(tokens, choices) with {hidden_states.shape[0]} tokens."
        )
    if hidden_states.dtype != weights.down.dtype:
        raise ValueError(
            f"hidden_states is {hidden_states.dtype} and the expert weights are {weights.down.dtype}; cast one of "
            "them, for example with model.to(dtype)."
        )
    plan = build_routing_plan_ref(top_k_index, num_experts)
    count_call("moe_ffn_ref")
    return moe_ffn_ref(hidden_states, plan, top_k_weights, weights, activation)
