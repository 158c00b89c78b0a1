"""Check the tensors of a call once, between strategies and ops."""

import torch

from globe_kernels.errors import RequestError
from globe_kernels.ops.cache_turns import Cache
from globe_kernels.ops.moe_ffn import ExpertWeights, FromRank
from globe_kernels.ops.moe_ffn import moe_ffn as _moe_ffn_op
from globe_kernels.ops.moe_ffn_bank_first import BankFirstWeights
from globe_kernels.ops.moe_ffn_bank_first import moe_ffn_bank_first as _moe_ffn_bank_first_op
from globe_kernels.ops.moe_ffn_cached import CachedWeights
from globe_kernels.ops.moe_ffn_cached import moe_ffn_cached as _moe_ffn_cached_op
from globe_kernels.ops.moe_ffn_scratch import ScratchWeights
from globe_kernels.ops.moe_ffn_scratch import moe_ffn_scratch as _moe_ffn_scratch_op


def moe_ffn(
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    weights: ExpertWeights,
    activation: str,
    deterministic: bool = True,
) -> torch.Tensor:
    """Run the routed experts of one layer from composed bases (formula: `globe_kernels.ops.moe_ffn`).

    hidden_states (T, D) in the dtype of the weights; top_k_index (T, K) of any integer dtype, where ids
    outside 0..E-1 contribute nothing; top_k_weights (T, K) of any float dtype. Any strides.
    Returns (T, D). Without `deterministic` a GPU sums the choices of a token in any order. Raises RequestError
    when shapes or dtypes do not fit.
    """
    routed = (hidden_states, top_k_index, top_k_weights)
    _check_inputs(*routed, weights.from_rank.down_proj)
    _check_bases(weights.basis, weights.from_rank)
    return _moe_ffn_op(*routed, weights.to_list(), activation, deterministic)


def moe_ffn_scratch(
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    weights: ScratchWeights,
    activation: str,
    deterministic: bool = True,
) -> torch.Tensor:
    """Run the experts as `moe_ffn` does, from bases that may be overwritten after the call."""
    routed = (hidden_states, top_k_index, top_k_weights)
    basis, (gate, up), banks, phi, from_rank = weights
    _check_inputs(*routed, from_rank.down_proj)
    _check_bases(basis, from_rank)
    mixtures = ([*gate, *up], list(banks), list(from_rank))
    return _moe_ffn_scratch_op(*routed, basis, *mixtures, phi, activation, deterministic)


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
    _check_weights(weights.from_rank, weights.rank)
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
    rank, num_experts = weights.mixtures.gate_bank.shape[1], weights.from_rank.down_proj.shape[0]
    _check_weights(weights.from_rank, rank)
    if {tensor.shape for tensor in weights.mixtures[2:]} != {(num_experts, weights.mixtures.gate_index.shape[1])}:
        raise RequestError(
            f"The codes {', '.join(str(tuple(tensor.shape)) for tensor in weights.mixtures[2:])} are not of the same "
            f"{num_experts} experts; put back the codes of this layer."
        )
    expected = (2 * rank, hidden_states.shape[1])
    if cache.pool.shape[1:] != expected or cache.pool.dtype != hidden_states.dtype:
        raise RequestError(
            f"The slots of the cache are {cache.pool.dtype} {tuple(cache.pool.shape[1:])} and the bases of the layer "
            f"{hidden_states.dtype} {expected}; build the cache for this model and cast both together."
        )
    if not 0 <= first_expert <= cache.slot_of.shape[0] - num_experts:
        raise RequestError(
            f"first_expert is {first_expert} with {num_experts} experts in the layer and {cache.slot_of.shape[0]} in "
            "the cache; take it from BasisCache.first_expert."
        )
    tensors = (list(weights.mixtures), list(weights.from_rank))
    return _moe_ffn_cached_op(*routed, cache.number, *tensors, first_expert, phi, activation, deterministic)


def _check_inputs(
    hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, down_proj: torch.Tensor
) -> None:
    """Raise RequestError when shapes or dtypes of a call do not fit the weights."""
    _, width, _ = down_proj.shape
    if hidden_states.ndim != 2 or hidden_states.shape[1] != width:
        raise RequestError(
            f"hidden_states has shape {tuple(hidden_states.shape)} and (tokens, {width}) was expected; flatten "
            "batch and sequence first."
        )
    if top_k_index.shape != top_k_weights.shape or top_k_index.shape[:1] != hidden_states.shape[:1]:
        raise RequestError(
            f"top_k_index {tuple(top_k_index.shape)} and top_k_weights {tuple(top_k_weights.shape)} must both be "
            f"(tokens, top_k) with {hidden_states.shape[0]} tokens."
        )
    if top_k_index.dtype.is_floating_point or top_k_index.dtype == torch.bool:
        raise RequestError(
            f"top_k_index is {top_k_index.dtype} and ids of experts are integers; pass the router's indices."
        )
    if hidden_states.dtype != down_proj.dtype:
        raise RequestError(
            f"hidden_states is {hidden_states.dtype} and the expert weights are {down_proj.dtype}; cast one "
            "of them, for example with model.to(dtype)."
        )


def _check_bases(basis: torch.Tensor, weights: FromRank) -> None:
    """Raise RequestError when bases (E, 2R, D) do not fit the other weights of the experts."""
    _check_weights(weights, basis.shape[1] // 2)
    down = weights.down_proj
    if basis.shape[::2] != down.shape[:2] or basis.dtype != down.dtype:
        raise RequestError(
            f"The bases {basis.dtype} {tuple(basis.shape)} are of other experts, width or dtype than down_proj "
            f"{down.dtype} {tuple(down.shape)}; compose them for these experts."
        )


def _check_weights(weights: FromRank, rank: int) -> None:
    """Raise RequestError when the weights of the experts are of different sizes: a kernel would read outside them."""
    (num_experts, width, inner), dtype = weights.down_proj.shape, weights.down_proj.dtype
    adapter, bias = (num_experts, inner, rank), (num_experts, inner)
    expected = (adapter, adapter, (num_experts, width, inner), bias, bias, (num_experts, width))
    for number, (tensor, shape) in enumerate(zip(weights, expected, strict=True)):
        if tensor is not None and (tensor.shape != shape or tensor.dtype != dtype):
            raise RequestError(
                f"{weights._fields[number]} is {tensor.dtype} {tuple(tensor.shape)} and {dtype} {shape} was expected "
                f"beside down_proj {tuple(weights.down_proj.shape)} and rank {rank}; put back such a tensor."
            )
