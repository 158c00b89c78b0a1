"""Check the tensors of a call once, between strategies and ops."""

import torch

from globe_kernels.ops.cache_turns import Cache
from globe_kernels.ops.moe_ffn import ExpertWeights
from globe_kernels.ops.moe_ffn import moe_ffn as _moe_ffn_op
from globe_kernels.ops.moe_ffn_bank_first import BankFirstWeights
from globe_kernels.ops.moe_ffn_bank_first import moe_ffn_bank_first as _moe_ffn_bank_first_op
from globe_kernels.ops.moe_ffn_cached import CachedWeights
from globe_kernels.ops.moe_ffn_cached import moe_ffn_cached as _moe_ffn_cached_op


def moe_ffn(
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    weights: ExpertWeights,
    activation: str,
    deterministic: bool = True,
) -> torch.Tensor:
    """Run the routed experts of one layer from composed bases (formula: `globe_kernels.ops.moe_ffn`).

    hidden_states (T, D) in the dtype of the weights; top_k_index (T, K) of any integer dtype, where ids outside 0..E-1
    contribute nothing; top_k_weights (T, K) of any float dtype. Any strides.
    Returns (T, D). Without `deterministic` a GPU sums the choices of a token in any order. Raises ValueError when
    shapes or dtypes do not fit.
    """
    routed = (hidden_states, top_k_index, top_k_weights)
    _check_inputs(*routed, weights.from_rank.down_proj)
    return _moe_ffn_op(*routed, weights.to_list(), activation, deterministic)


def moe_ffn_bank_first(
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    weights: BankFirstWeights,
    activation: str,
    deterministic: bool = True,
) -> torch.Tensor:
    """Run the experts as `moe_ffn` does, from the bank and the palette (`globe_kernels.ops.moe_ffn_bank_first`)."""
    routed = (hidden_states, top_k_index, top_k_weights)
    _check_inputs(*routed, weights.from_rank.down_proj)
    return _moe_ffn_bank_first_op(*routed, list(weights.mixtures), list(weights.from_rank), activation, deterministic)


def moe_ffn_cached(
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    weights: CachedWeights,
    cache: Cache,
    first_expert: int,
    phi: str,
    activation: str,
    deterministic: bool = True,
) -> torch.Tensor:
    """Run the experts as `moe_ffn` does, from a cache of bases and the bank (`globe_kernels.ops.moe_ffn_cached`).

    `cache` is a globe_kernels.model.cache.BasisCache, whose pool has the dtype of hidden_states; threads and streams
    that share it wait for each other. The experts of this layer are first_expert .. first_expert + E - 1 of the cache.
    """
    routed = (hidden_states, top_k_index, top_k_weights)
    _check_inputs(*routed, weights.from_rank.down_proj)
    num_experts, _, rank = weights.from_rank.gate_adapter.shape
    expected = (2 * rank, hidden_states.shape[1])
    if cache.pool.shape[1:] != expected or cache.pool.dtype != hidden_states.dtype:
        raise ValueError(
            f"The slots of the cache are {cache.pool.dtype} {tuple(cache.pool.shape[1:])} and the bases of the layer "
            f"{hidden_states.dtype} {expected}; build the cache for this model and cast both together."
        )
    if not 0 <= first_expert <= cache.slot_of.shape[0] - num_experts:
        raise ValueError(
            f"first_expert is {first_expert} with {num_experts} experts in the layer and {cache.slot_of.shape[0]} in "
            "the cache; take it from BasisCache.first_expert."
        )
    tensors = (list(weights.mixtures), list(weights.from_rank))
    return _moe_ffn_cached_op(*routed, cache.number, *tensors, first_expert, phi, activation, deterministic)


def _check_inputs(
    hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, down_proj: torch.Tensor
) -> None:
    """Raise ValueError when shapes or dtypes of a call do not fit the weights."""
    _, width, _ = down_proj.shape
    if hidden_states.ndim != 2 or hidden_states.shape[1] != width:
        raise ValueError(
            f"hidden_states has shape {tuple(hidden_states.shape)} and (tokens, {width}) was expected; flatten "
            "batch and sequence first."
        )
    if top_k_index.shape != top_k_weights.shape or top_k_index.shape[:1] != hidden_states.shape[:1]:
        raise ValueError(
            f"top_k_index {tuple(top_k_index.shape)} and top_k_weights {tuple(top_k_weights.shape)} must both be "
            f"(tokens, top_k) with {hidden_states.shape[0]} tokens."
        )
    if top_k_index.dtype.is_floating_point or top_k_index.dtype == torch.bool:
        raise ValueError(
            f"top_k_index is {top_k_index.dtype} and ids of experts are integers; pass the router's indices."
        )
    if hidden_states.dtype != down_proj.dtype:
        raise ValueError(
            f"hidden_states is {hidden_states.dtype} and the expert weights are {down_proj.dtype}; cast one "
            "of them, for example with model.to(dtype)."
        )
