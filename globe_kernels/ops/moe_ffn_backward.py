"""Carry gradients back through the experts of one layer, to hidden states and router weights; factors stay frozen.

For routed row s = (token t, choice k) with expert e = top_k_index[t, k], from the gradient d out (T, D):

    h             = basis[e] hidden[t]                                  again     (ops/low_rank_in.py)
    q             = down[e]^T d out[t]                                            (ops/project_back.py)
    d weight[t,k] = <y, q> + <bias_down[e], d out[t]>                             (ops/gate_up_backward.py)
    d gate, d up  = weight[t, k] q times the derivatives of the activation
    d h           = [adapter_gate[e]^T d gate; adapter_up[e]^T d up]              (ops/project_back.py)
    d hidden[t]   = sum_k basis[e]^T d h                                          (ops/project_back.py)

Shapes and letters as in ops/moe_ffn.py. Every layer op differentiates by this op: from the bases that it has, or from
bases that it composes again. Between forward and backward only the input of the layer is kept. Deterministic.
"""

from typing import Any

import torch

from globe_kernels.ops.counters import count_call
from globe_kernels.ops.down import Down, sum_choices
from globe_kernels.ops.gate_up import GatedAdapters
from globe_kernels.ops.gate_up_backward import gate_up_backward_ref, launch_gate_up_backward
from globe_kernels.ops.low_rank_in import launch_low_rank_in, low_rank_in_ref
from globe_kernels.ops.project_back import launch_project_back, project_back_ref
from globe_kernels.ops.registration import register_op
from globe_kernels.ops.routing import launch_routing_plan, routing_plan_ref
from globe_kernels.ops.triton_import import use_triton
from globe_kernels.ops.tuning import FfnConfig, FfnShape, choose

Gradients = tuple[torch.Tensor, torch.Tensor]  # of hidden (T, D) and of top_k_weights (T, K), each in its dtype


def _run(
    gradient: torch.Tensor,
    hidden: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    weights: list[Any],
    activation: str,
) -> Gradients:
    basis, gate, up, down_proj, gate_bias, up_bias, down_bias = weights
    adapters, down = GatedAdapters(gate, up, gate_bias, up_bias), Down(down_proj, down_bias)
    routed = (hidden, top_k_index, top_k_weights)
    if not use_triton(hidden):
        count_call("moe_ffn_backward_ref")
        return moe_ffn_backward_ref(gradient, *routed, basis, adapters, down, activation)
    count_call("moe_ffn_backward")
    num_experts, width, inner = down_proj.shape
    shape = FfnShape(num_experts, width, inner, rank=gate.shape[2])
    config = choose(shape, top_k_index.numel(), hidden.element_size(), hidden.device)
    routed = (hidden.contiguous(), top_k_index.contiguous(), top_k_weights.contiguous())
    factors = (basis.contiguous(), adapters.contiguous(), down.contiguous())
    return launch_moe_ffn_backward(gradient.contiguous(), *routed, *factors, activation, config)


# Gradients from the gradient (T, D) of the result of a layer. weights: ExpertWeights.to_list of ops/moe_ffn.py, in the
# dtype of hidden.
moe_ffn_backward = register_op(
    "moe_ffn_backward(Tensor gradient, Tensor hidden, Tensor top_k_index, Tensor top_k_weights, Tensor?[] weights, "
    "str activation) -> (Tensor, Tensor)",
    _run,
    lambda gradient, hidden, top_k_index, top_k_weights, *_: (
        torch.empty_like(hidden, memory_format=torch.contiguous_format),
        torch.empty_like(top_k_weights, memory_format=torch.contiguous_format),
    ),
)


def launch_moe_ffn_backward(
    gradient: torch.Tensor,
    hidden: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    basis: torch.Tensor,
    adapters: GatedAdapters,
    down: Down,
    activation: str,
    config: FfnConfig,
) -> Gradients:
    """Launch the kernels on contiguous inputs in `config`, without waiting for the device."""
    if hidden.shape[0] == 0:
        return torch.empty_like(hidden), torch.empty_like(top_k_weights)
    num_experts, inner, rank = adapters.gate.shape
    plan = launch_routing_plan(top_k_index, num_experts, config.block_m)

    def rows(columns: int) -> torch.Tensor:
        return hidden.new_empty(plan.num_rows, columns)

    h = launch_low_rank_in(hidden, plan, basis, config.low_rank_in)
    q = launch_project_back(gradient, plan, down.weight, config.low_rank_in, rows(inner), by_token=True)
    both, weight = launch_gate_up_backward(h, plan, adapters, q, top_k_weights, activation, config.gate_up)
    for inward, adapter, outward in zip(both.chunk(2, 1), (adapters.gate, adapters.up), h.chunk(2, 1), strict=True):
        launch_project_back(inward, plan, adapter, config.down, outward)
    x = launch_project_back(h, plan, basis, config.down, rows(hidden.shape[1]), in_order_of_tokens=True)
    weight = _with_bias(weight.view_as(top_k_weights), gradient, top_k_index, down)
    return sum_choices(x, top_k_index, num_experts), weight.to(top_k_weights.dtype)


def moe_ffn_backward_ref(
    gradient: torch.Tensor,
    hidden: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    basis: torch.Tensor,
    adapters: GatedAdapters,
    down: Down,
    activation: str,
) -> Gradients:
    """Run the references of the stages; rows of tokens are summed in fp32 or fp64."""
    plan = routing_plan_ref(top_k_index, basis.shape[0], block_m=16)
    width = hidden.shape[1]

    def rows(columns: int, dtype: torch.dtype = hidden.dtype) -> torch.Tensor:
        return hidden.new_zeros(plan.num_rows, columns, dtype=dtype)

    h = low_rank_in_ref(hidden, plan, basis)
    q = project_back_ref(gradient, plan, down.weight, rows(down.weight.shape[2]), by_token=True)
    both, weight = gate_up_backward_ref(h, plan, adapters, q, top_k_weights, activation)
    for inward, adapter, outward in zip(both.chunk(2, 1), (adapters.gate, adapters.up), h.chunk(2, 1), strict=True):
        project_back_ref(inward, plan, adapter, outward)
    x = rows(width, torch.promote_types(hidden.dtype, torch.float32))
    project_back_ref(h, plan, basis, x, in_order_of_tokens=True)
    weight = _with_bias(weight.view_as(top_k_weights), gradient, top_k_index, down)
    return x.view(-1, plan.top_k, width).sum(1).to(hidden.dtype), weight.to(top_k_weights.dtype)


def _with_bias(weight: torch.Tensor, gradient: torch.Tensor, top_k_index: torch.Tensor, down: Down) -> torch.Tensor:
    """Add <bias[e], gradient[t]> to `weight` (T, K), of choices that name an expert."""
    if down.bias is None:
        return weight
    routed = (top_k_index >= 0) & (top_k_index < down.bias.shape[0])
    by_expert = gradient.to(weight.dtype) @ down.bias.to(weight.dtype).T
    return weight + torch.where(routed, by_expert.gather(1, torch.where(routed, top_k_index, 0).long()), 0.0)
