# pyright: reportInvalidTypeForm=false
"""S2: project from the rank to the intermediate size, gate and up at once, and apply the gated activation.

    y[s] = act(adapter_gate[e(s)] h_gate[s] + bias_gate[e(s)], adapter_up[e(s)] h_up[s] + bias_up[e(s)])

Shapes: S routed rows in the order of the plan, E experts, P intermediate size, R rank, h (S, 2R) with gate first.
`act` joins gate and up (ops/activations.py); biases (E, P) are optional.
Accumulators and activation are fp32. The activation is non-linear, so one program sums all of K = R.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from globe_kernels.ops.activations import apply_gated, gated_activation, parse_activation
from globe_kernels.ops.grouped import accumulate, grouped_launch, program_tile
from globe_kernels.ops.routing import RoutingPlan
from globe_kernels.ops.triton_import import tl, triton
from globe_kernels.ops.tuning import GemmConfig


class GatedAdapters(NamedTuple):
    """The weights of one layer from the rank to the intermediate size. Both biases or neither."""

    gate: torch.Tensor  # (E, P, R)
    up: torch.Tensor  # (E, P, R)
    gate_bias: torch.Tensor | None = None  # (E, P)
    up_bias: torch.Tensor | None = None  # (E, P)

    def contiguous(self) -> "GatedAdapters":
        return GatedAdapters(*(w if w is None else w.contiguous() for w in self))  # pyright: ignore[reportArgumentType]


@triton.jit
def adapter_outputs(
    gate_in_ptr,
    up_in_ptr,
    source,  # (BLOCK_M, 1) places of the rows
    row_mask,  # (BLOCK_M,)
    gate_ptr,  # (E, P, R)
    up_ptr,  # (E, P, R)
    gate_bias_ptr,  # (E, P) or None
    up_bias_ptr,  # (E, P) or None
    expert,
    columns,  # (BLOCK_N,)
    column_mask,  # (BLOCK_N,)
    num_columns,  # P
    depth,  # R
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Return the outputs of the gate and the up adapter of an expert, before the activation, in fp32."""
    weight = (expert * num_columns + columns)[None, :] * depth
    rows_in, columns_in = row_mask[:, None], column_mask[None, :]
    gate = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if gate_bias_ptr is not None:
        bias = expert * num_columns + columns
        gate += tl.load(gate_bias_ptr + bias, mask=column_mask, other=0.0).to(tl.float32)[None, :]
        up += tl.load(up_bias_ptr + bias, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    gate = accumulate(gate, gate_in_ptr + source, rows_in, gate_ptr + weight, columns_in, depth, EVEN_K, BLOCK_K)
    up = accumulate(up, up_in_ptr + source, rows_in, up_ptr + weight, columns_in, depth, EVEN_K, BLOCK_K)
    return gate, up


@triton.jit(do_not_specialize=["num_tiles"])
def _gate_up_kernel(
    gate_in_ptr,  # (S, ...) rows of `row_stride` values; with GATHER, row order[s] // top_k belongs to s
    up_in_ptr,
    gate_ptr,  # (E, P, R)
    up_ptr,  # (E, P, R)
    gate_bias_ptr,  # (E, P) or None
    up_bias_ptr,  # (E, P) or None
    out_ptr,  # (S, P)
    order_ptr,  # (S,) int32
    starts_ptr,  # (E + 1,) int32
    tile_expert_ptr,  # (num_tiles,) int32, -1 past the last tile
    tile_first_ptr,  # (num_tiles,) int32
    num_tiles,
    num_columns,  # P
    depth,  # R
    row_stride,
    top_k,
    GATHER: tl.constexpr,
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
    source = rows
    if GATHER:
        source = tl.load(order_ptr + rows, mask=row_mask, other=0) // top_k
    source = source.to(tl.int64)[:, None] * row_stride
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
    y = apply_gated(gate, up, ACTIVATION, ALPHA, LIMIT)
    out = out_ptr + rows.to(tl.int64)[:, None] * num_columns + columns[None, :]
    tl.store(out, y.to(out_ptr.dtype.element_ty), mask=row_mask[:, None] & column_mask[None, :])


def launch_gate_up(
    h: torch.Tensor,
    plan: RoutingPlan,
    adapters: GatedAdapters,
    activation: str,
    config: GemmConfig,
    gather: int | None = None,
) -> torch.Tensor:
    """Launch the kernel on contiguous inputs in `config`; return (S, P).

    With `gather`, h is not in the order of the plan: row order[s] // gather of it belongs to routed row s. Gate takes
    the first R columns and up the last R.
    """
    _, columns, depth = adapters.gate.shape
    out = h.new_empty(plan.num_rows, columns)
    grid, schedule, options = grouped_launch(plan, columns, depth, config)
    _gate_up_kernel[grid](
        h,
        h[:, -depth:],
        *adapters,
        out,
        *schedule,
        h.stride(0),
        gather or 1,
        GATHER=gather is not None,
        **parse_activation(activation).constexprs,
        **options,
    )
    return out


def adapter_outputs_ref(source: torch.Tensor, adapters: GatedAdapters, expert: int) -> list[torch.Tensor]:
    """Return the outputs of both adapters of an expert for rows whose first R columns are of gate, the last R of up."""
    rank = adapters.gate.shape[2]
    return [
        F.linear(half, adapter[expert], None if bias is None else bias[expert])
        for half, adapter, bias in (
            (source[:, :rank], adapters.gate, adapters.gate_bias),
            (source[:, -rank:], adapters.up, adapters.up_bias),
        )
    ]


def gate_up_ref(
    h: torch.Tensor, plan: RoutingPlan, adapters: GatedAdapters, activation: str, gather: int | None = None
) -> torch.Tensor:
    """Compute what `launch_gate_up` computes; rows that belong to no expert are zero."""
    act, out = gated_activation(activation), h.new_zeros(plan.num_rows, adapters.gate.shape[1])
    for expert, rows in plan.rows_by_expert():
        source = h[rows] if gather is None else h[plan.order[rows] // gather]
        out[rows] = act(*adapter_outputs_ref(source, adapters, expert))
    return out
