"""The experts of one layer from composed bases, all tokens at once: three grouped GEMMs behind one op.

For routed row s = (token t, choice k) with expert e = top_k_index[t, k] and x = hidden[t]:

    S1   h_f = basis_f[e] x                                    f in gate, up       (ops/low_rank_in.py)
    S2   y   = act(adapter_gate[e] h_gate) * (adapter_up[e] h_up)                  (ops/gate_up.py)
    S3   out[t] = sum_k top_k_weights[t, k] * down[e] y                            (ops/down.py)

Shapes: T tokens, K choices, E experts, P intermediate size, D hidden size, R rank; basis (E, 2R, D) with gate first.
A choice whose id names no expert contributes nothing. Deterministic.

Why not one kernel: with one token there are K programs for the whole card, with many the two intermediate tiles fill
the shared memory; three launches read every weight once in both cases.
"""

import torch

from globe_kernels.ops.counters import count_call
from globe_kernels.ops.down import down, down_ref
from globe_kernels.ops.gate_up import gate_up, gate_up_ref
from globe_kernels.ops.low_rank_in import low_rank_in, low_rank_in_ref
from globe_kernels.ops.routing_plan import routing_plan, routing_plan_ref
from globe_kernels.ops.triton_import import use_triton
from globe_kernels.ops.tuning import GemmConfig, choose, shared_limit


@torch.library.custom_op("globe::moe_ffn", mutates_args=())
def moe_ffn(
    hidden: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    basis: torch.Tensor,
    gate_adapter: torch.Tensor,
    up_adapter: torch.Tensor,
    down_proj: torch.Tensor,
    activation: str,
) -> torch.Tensor:
    """(T, D) in the dtype of hidden (T, D): kernels on a GPU, the reference elsewhere.

    top_k_index, top_k_weights (T, K); basis (E, 2R, D); adapters (E, P, R); down_proj (E, D, P). Weights have the
    dtype of `hidden`. Shapes are checked by globe_kernels.functional.
    """
    inputs = (hidden, top_k_index, top_k_weights, basis, gate_adapter, up_adapter, down_proj)
    if not use_triton(hidden):
        count_call("moe_ffn_ref")
        return moe_ffn_ref(*inputs, activation=activation)
    count_call("moe_ffn")
    config = choose(top_k_index.numel(), basis.shape[0], hidden.element_size(), shared_limit(hidden.device))
    return launch_moe_ffn(*(tensor.contiguous() for tensor in inputs), activation=activation, config=config)


@moe_ffn.register_fake
def _(hidden, top_k_index, top_k_weights, basis, gate_adapter, up_adapter, down_proj, activation):
    return torch.empty_like(hidden, memory_format=torch.contiguous_format)


def launch_moe_ffn(
    hidden: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    basis: torch.Tensor,
    gate_adapter: torch.Tensor,
    up_adapter: torch.Tensor,
    down_proj: torch.Tensor,
    activation: str,
    config: GemmConfig,
) -> torch.Tensor:
    """The kernels on contiguous inputs, without waiting for the device."""
    if hidden.shape[0] == 0:
        return torch.empty_like(hidden)
    plan = routing_plan(top_k_index, basis.shape[0], config.block_m)
    h = low_rank_in(hidden, plan, basis, config)
    y = gate_up(h, plan, gate_adapter, up_adapter, activation, config)
    return down(y, plan, down_proj, top_k_index, top_k_weights, config)


def moe_ffn_ref(
    hidden: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    basis: torch.Tensor,
    gate_adapter: torch.Tensor,
    up_adapter: torch.Tensor,
    down_proj: torch.Tensor,
    activation: str,
) -> torch.Tensor:
    """As `moe_ffn`: the references of the three stages, one pass over the experts that have rows in each."""
    plan = routing_plan_ref(top_k_index, basis.shape[0], block_m=16)
    h = low_rank_in_ref(hidden, plan, basis)
    y = gate_up_ref(h, plan, gate_adapter, up_adapter, activation)
    return down_ref(y, plan, down_proj, top_k_weights)
