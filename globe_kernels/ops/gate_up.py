# pyright: reportInvalidTypeForm=false
"""S2: from the rank back to the intermediate size, gate and up at once, with the gated activation.

    y[s] = act(adapter_gate[e(s)] h_gate[s]) * (adapter_up[e(s)] h_up[s])

Shapes: S routed rows in the order of the plan, E experts, P intermediate size, R rank, h (S, 2R) with gate first.
Accumulators and activation are fp32. The activation is non-linear, so one program sums all of K = R.
"""

import torch
import torch.nn.functional as F

from globe_kernels.ops.activations import ACTIVATIONS, apply_activation
from globe_kernels.ops.grouped import accumulate, program_tile
from globe_kernels.ops.triton_import import tl, triton
from globe_kernels.ops.tuning import GemmConfig
from globe_kernels.routing import RoutingPlan


@triton.jit
def _gate_up_kernel(
    gate_in_ptr,  # (S, ...) rows of `row_stride` values; with GATHER (T, ...)
    up_in_ptr,
    gate_ptr,  # (E, P, R)
    up_ptr,  # (E, P, R)
    out_ptr,  # (S, P)
    order_ptr,  # (S,) int32
    starts_ptr,  # (E + 1,) int32
    tile_expert_ptr,  # (num_tiles,) int32, -1 past the last tile
    tile_first_ptr,  # (num_tiles,) int32
    num_tiles,
    num_columns,  # P
    depth,  # R
    row_stride,
    num_choices,
    GATHER: tl.constexpr,
    ACTIVATION: tl.constexpr,
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
    source = rows
    if GATHER:
        source = tl.load(order_ptr + rows, mask=row_mask, other=0) // num_choices
    source = source.to(tl.int64)[:, None] * row_stride
    weight = (expert * num_columns + columns)[None, :] * depth
    rows_in, columns_in = row_mask[:, None], column_mask[None, :]
    gate = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    gate = accumulate(gate, gate_in_ptr + source, rows_in, gate_ptr + weight, columns_in, depth, EVEN_K, BLOCK_K)
    up = accumulate(up, up_in_ptr + source, rows_in, up_ptr + weight, columns_in, depth, EVEN_K, BLOCK_K)
    y = apply_activation(gate, ACTIVATION) * up
    out = out_ptr + rows.to(tl.int64)[:, None] * num_columns + columns[None, :]
    tl.store(out, y.to(out_ptr.dtype.element_ty), mask=row_mask[:, None] & column_mask[None, :])


def gate_up(
    h: torch.Tensor,
    plan: RoutingPlan,
    gate_adapter: torch.Tensor,
    up_adapter: torch.Tensor,
    activation: str,
    config: GemmConfig,
) -> torch.Tensor:
    """(S, P) in the dtype of `h`, from h (S, 2R) and adapters (E, P, R), all contiguous."""
    _, columns, depth = gate_adapter.shape
    out = h.new_empty(plan.num_rows, columns)
    launch = {**config.launch(), "BLOCK_N": block_n(config)}
    grid = (plan.num_tiles * triton.cdiv(columns, launch["BLOCK_N"]),)
    _gate_up_kernel[grid](
        h,
        h[:, depth:],
        gate_adapter,
        up_adapter,
        out,
        *plan.schedule,
        columns,
        depth,
        h.stride(0),
        plan.num_choices,
        GATHER=False,
        ACTIVATION=activation,
        EVEN_K=depth % config.block_k == 0,
        BLOCK_M=plan.block_m,
        **launch,
    )
    return out


def block_n(config: GemmConfig) -> int:
    """Two accumulators share the registers that the other stages have for one."""
    return min(config.block_n, 64)


def gate_up_ref(
    h: torch.Tensor, plan: RoutingPlan, gate_adapter: torch.Tensor, up_adapter: torch.Tensor, activation: str
) -> torch.Tensor:
    """As `gate_up`; rows that belong to no expert are zero."""
    rank, act = gate_adapter.shape[2], ACTIVATIONS[activation]
    out = h.new_zeros(plan.num_rows, gate_adapter.shape[1])
    for expert, rows in plan.rows_by_expert():
        gate = F.linear(h[rows, :rank], gate_adapter[expert])
        out[rows] = act(gate) * F.linear(h[rows, rank:], up_adapter[expert])
    return out
