# pyright: reportInvalidTypeForm=false
"""Carry the gradient of the routed rows of each expert back through a matrix of that expert.

    out[s] = W[e(s)]^T rows[s]       s in the order of the plan, e(s) its expert

Shapes: S routed rows, E experts, W (E, N, M), rows (S, N), out (S, M). Accumulates in fp32.

The grouped GEMM of the forward (ops/down.py, ops/low_rank_in.py), with weights that lie the other way round in memory.
Rows that belong to no expert are not written.
"""

import torch

from globe_kernels.ops.grouped import accumulate, grouped_launch, program_tile
from globe_kernels.ops.routing import RoutingPlan
from globe_kernels.ops.triton_import import tl, triton
from globe_kernels.ops.tuning import GemmConfig


@triton.jit(do_not_specialize=["num_tiles"])
def _project_back_kernel(
    rows_ptr,  # (S, N), rows of `row_stride` values; with GATHER (T, N), where row order[s] // top_k belongs to s
    weight_ptr,  # (E, N, M)
    out_ptr,  # (S, M), rows of `out_stride` values; with SCATTER row order[s] belongs to s
    order_ptr,  # (S,) int32
    starts_ptr,  # (E + 1,) int32
    tile_expert_ptr,  # (num_tiles,) int32, -1 past the last tile
    tile_first_ptr,  # (num_tiles,) int32
    num_tiles,
    num_columns,  # M
    depth,  # N
    row_stride,
    out_stride,
    top_k,  # K
    GATHER: tl.constexpr,
    SCATTER: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Grid: (num_tiles * cdiv(M, BLOCK_N),). One program owns BLOCK_M rows of one expert and BLOCK_N columns."""
    expert, rows, row_mask, columns, column_mask = program_tile(
        starts_ptr, tile_expert_ptr, tile_first_ptr, num_tiles, num_columns, BLOCK_M, BLOCK_N, GROUP_M
    )
    if expert < 0:
        return
    source, target = rows, rows
    if GATHER:
        source = tl.load(order_ptr + rows, mask=row_mask, other=0) // top_k
    if SCATTER:
        target = tl.load(order_ptr + rows, mask=row_mask, other=0)
    acc = accumulate(
        tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32),
        rows_ptr + source.to(tl.int64)[:, None] * row_stride,
        row_mask[:, None],
        weight_ptr + expert * depth * num_columns + columns[None, :],
        column_mask[None, :],
        depth,
        EVEN_K,
        BLOCK_K,
        num_columns,
    )
    out = out_ptr + target.to(tl.int64)[:, None] * out_stride + columns[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=row_mask[:, None] & column_mask[None, :])


def launch_project_back(
    rows: torch.Tensor,
    plan: RoutingPlan,
    weight: torch.Tensor,
    config: GemmConfig,
    out: torch.Tensor,
    *,
    by_token: bool = False,
    in_order_of_tokens: bool = False,
) -> torch.Tensor:
    """Launch the kernel in `config`, into `out` (S, M); rows and out are contiguous within a row, weight as a whole.

    With `by_token`, `rows` (T, N) has one row per token. With `in_order_of_tokens`, row t * K + k of `out` is that of
    choice k of token t.
    """
    _, depth, columns = weight.shape
    grid, schedule, options = grouped_launch(plan, columns, depth, config)
    _project_back_kernel[grid](
        rows,
        weight,
        out,
        *schedule,
        rows.stride(0),
        out.stride(0),
        plan.top_k,
        GATHER=by_token,
        SCATTER=in_order_of_tokens,
        **options,
    )
    return out


def project_back_ref(
    rows: torch.Tensor,
    plan: RoutingPlan,
    weight: torch.Tensor,
    out: torch.Tensor,
    *,
    by_token: bool = False,
    in_order_of_tokens: bool = False,
) -> torch.Tensor:
    """Compute the result of `launch_project_back`, into `out`, whose dtype may be wider."""
    for expert, places in plan.rows_by_expert():
        target = plan.order[places]
        source = rows[target // plan.top_k] if by_token else rows[places]
        out[target if in_order_of_tokens else places] = (source @ weight[expert]).to(out.dtype)
    return out
