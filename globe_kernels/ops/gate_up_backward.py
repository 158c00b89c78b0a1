# pyright: reportInvalidTypeForm=false
"""Carry gradients back through S2, from y to the outputs of both adapters, and to the weights of the router.

    gate, up          as ops/gate_up.py computes them from h, and y = a(gate) b(up)
    d weight[t, k]  = <y[s], q[s]>                       q[s] = down[e(s)]^T d out[t], s the routed row of t and k
    d gate[s]       = weight[t, k] q[s] a'(gate) b(up)
    d up[s]         = weight[t, k] q[s] a(gate) b'(up)

Shapes: S routed rows in the order of the plan, E experts, P intermediate size, R rank, h (S, 2R) and q (S, P).
Gate and up are computed again: they would be 2 S P values to keep. Accumulators and derivatives are fp32.
"""

from dataclasses import replace

import torch

from globe_kernels.ops.activations import gated_activation, gated_factors, gated_slopes, parse_activation
from globe_kernels.ops.gate_up import GatedAdapters, adapter_outputs, adapter_outputs_ref
from globe_kernels.ops.grouped import grouped_launch, program_tile
from globe_kernels.ops.routing import RoutingPlan
from globe_kernels.ops.triton_import import tl, triton
from globe_kernels.ops.tuning import GemmConfig


@triton.jit(do_not_specialize=["num_tiles", "num_rows"])
def _gate_up_backward_kernel(
    gate_in_ptr,  # (S, ...) rows of `row_stride` values
    up_in_ptr,
    gate_ptr,  # (E, P, R)
    up_ptr,  # (E, P, R)
    gate_bias_ptr,  # (E, P) or None
    up_bias_ptr,  # (E, P) or None
    q_ptr,  # (S, P)
    row_weight_ptr,  # (S,) in the order of tokens and choices
    out_ptr,  # (S, 2P)
    partial_ptr,  # (cdiv(P, BLOCK_N), S) float32, in the order of tokens and choices
    order_ptr,  # (S,) int32
    starts_ptr,  # (E + 1,) int32
    tile_expert_ptr,  # (num_tiles,) int32, -1 past the last tile
    tile_first_ptr,  # (num_tiles,) int32
    num_tiles,
    num_columns,  # P
    depth,  # R
    row_stride,
    num_rows,  # S
    ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Grid: (num_tiles * cdiv(P, BLOCK_N),). One program owns BLOCK_M rows of one expert and BLOCK_N columns."""
    expert, rows, row_mask, columns, column_mask = program_tile(
        starts_ptr, tile_expert_ptr, tile_first_ptr, num_tiles, num_columns, BLOCK_M, BLOCK_N, GROUP_M
    )
    if expert < 0:
        return
    source = rows.to(tl.int64)[:, None] * row_stride
    gate, up = adapter_outputs(
        gate_in_ptr,
        up_in_ptr,
        source,
        row_mask,
        gate_ptr,
        up_ptr,
        gate_bias_ptr,
        up_bias_ptr,
        expert,
        columns,
        column_mask,
        num_columns,
        depth,
        EVEN_K,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    mask = row_mask[:, None] & column_mask[None, :]
    place = rows.to(tl.int64)[:, None] * num_columns + columns[None, :]
    q = tl.load(q_ptr + place, mask=mask, other=0.0).to(tl.float32)
    a, a_slope, b, b_slope = gated_factors(gate, up, ACTIVATION, ALPHA, LIMIT)
    target = tl.load(order_ptr + rows, mask=row_mask, other=0)
    column_tile = tl.min(columns, 0).to(tl.int64) // BLOCK_N
    tl.store(partial_ptr + column_tile * num_rows + target, tl.sum(a * b * q, 1), mask=row_mask)
    q *= tl.load(row_weight_ptr + target, mask=row_mask, other=0.0).to(tl.float32)[:, None]
    out = out_ptr + rows.to(tl.int64)[:, None] * (2 * num_columns) + columns[None, :]
    tl.store(out, (q * a_slope * b).to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(out + num_columns, (q * a * b_slope).to(out_ptr.dtype.element_ty), mask=mask)


def backward_config(config: GemmConfig) -> GemmConfig:
    """Narrow the tile of S2: beside its two accumulators a program holds q and the derivatives."""
    return replace(config, block_n=min(64, config.block_n))


def launch_gate_up_backward(
    h: torch.Tensor,
    plan: RoutingPlan,
    adapters: GatedAdapters,
    q: torch.Tensor,
    top_k_weights: torch.Tensor,
    activation: str,
    config: GemmConfig,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the kernel on contiguous inputs; return d gate beside d up (S, 2P), and d weight (S,) in fp32.

    d weight is in the order of tokens and choices, and 0 where a choice names no expert.
    """
    _, columns, depth = adapters.gate.shape
    config = backward_config(config)
    out = h.new_empty(plan.num_rows, 2 * columns)
    partial = torch.zeros(triton.cdiv(columns, config.block_n), plan.num_rows, device=h.device)
    grid, schedule, options = grouped_launch(plan, columns, depth, config)
    _gate_up_backward_kernel[grid](
        h,
        h[:, -depth:],
        *adapters,
        q,
        top_k_weights,
        out,
        partial,
        *schedule,
        h.stride(0),
        plan.num_rows,
        **parse_activation(activation).constexprs,
        **options,
    )
    return out, partial.sum(0)


def gate_up_backward_ref(
    h: torch.Tensor,
    plan: RoutingPlan,
    adapters: GatedAdapters,
    q: torch.Tensor,
    top_k_weights: torch.Tensor,
    activation: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the result of `launch_gate_up_backward`, from fp64 in fp64; rows that belong to no expert are zero."""
    dtype = torch.promote_types(h.dtype, torch.float32)
    act, slopes = gated_activation(activation), gated_slopes(activation)
    out = h.new_zeros(plan.num_rows, 2 * adapters.gate.shape[1])
    weight = h.new_zeros(plan.num_rows, dtype=dtype)
    row_weights = top_k_weights.flatten().to(dtype)
    for expert, rows in plan.rows_by_expert():
        target = plan.order[rows]
        gate, up = (output.to(dtype) for output in adapter_outputs_ref(h[rows], adapters, expert))
        gradient = q[rows].to(dtype)
        weight[target] = (act(gate, up) * gradient).sum(1)
        gradient = gradient * row_weights[target, None]
        out[rows] = torch.cat([slope * gradient for slope in slopes(gate, up)], dim=1).to(h.dtype)
    return out, weight
