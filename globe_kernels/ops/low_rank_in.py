# pyright: reportInvalidTypeForm=false
"""S1: project the routed rows of each expert into its rank, gate and up in one launch.

    h[s] = basis[e(s)] x[t(s)]       s in the order of the plan, e(s) its expert, t(s) its token

Shapes: T tokens, S = T * K routed rows, E experts, N = 2R (gate rows first, then up), D hidden size.
Rows past the last routed one (sentinels) are not written.

With `slots` (E,) the matrix of expert e is basis[slots[e]], of a pool of any size; rows of an expert with slot -1 are
not written, so that several calls fill one result.
"""

import torch
import torch.nn.functional as F

from globe_kernels.ops.grouped import accumulate, grouped_launch, program_tile
from globe_kernels.ops.routing import RoutingPlan
from globe_kernels.ops.triton_import import tl, triton
from globe_kernels.ops.tuning import GemmConfig


@triton.jit(do_not_specialize=["num_tiles"])
def _low_rank_in_kernel(
    x_ptr,  # (T, D)
    basis_ptr,  # (E, N, D); with slots (slots, N, D)
    slots_ptr,  # (E,) int32, or None
    out_ptr,  # (S, N)
    order_ptr,  # (S,) int32
    starts_ptr,  # (E + 1,) int32
    tile_expert_ptr,  # (num_tiles,) int32, -1 past the last tile
    tile_first_ptr,  # (num_tiles,) int32
    num_tiles,
    num_columns,  # N
    depth,  # D
    top_k,  # K
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Grid: (num_tiles * cdiv(N, BLOCK_N),). One program owns BLOCK_M rows of one expert and BLOCK_N columns."""
    expert, rows, row_mask, columns, column_mask = program_tile(
        starts_ptr, tile_expert_ptr, tile_first_ptr, num_tiles, num_columns, BLOCK_M, BLOCK_N, GROUP_M
    )
    matrix = expert
    if slots_ptr is not None:
        matrix = tl.load(slots_ptr + expert, mask=expert >= 0, other=-1).to(tl.int64)
    if matrix < 0:
        return
    token = tl.load(order_ptr + rows, mask=row_mask, other=0) // top_k
    acc = accumulate(
        tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32),
        x_ptr + token.to(tl.int64)[:, None] * depth,
        row_mask[:, None],
        basis_ptr + (matrix * num_columns + columns)[None, :] * depth,
        column_mask[None, :],
        depth,
        EVEN_K,
        BLOCK_K,
    )
    out = out_ptr + rows.to(tl.int64)[:, None] * num_columns + columns[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=row_mask[:, None] & column_mask[None, :])


def launch_low_rank_in(
    x: torch.Tensor,
    plan: RoutingPlan,
    basis: torch.Tensor,
    config: GemmConfig,
    slots: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Launch the kernel on contiguous inputs in `config`, into `out` (S, N) where it is given."""
    depth, columns = x.shape[1], basis.shape[1]
    out = x.new_empty(plan.num_rows, columns) if out is None else out
    grid, schedule, options = grouped_launch(plan, columns, depth, config)
    _low_rank_in_kernel[grid](x, basis, slots, out, *schedule, plan.top_k, **options)
    return out


def low_rank_in_ref(
    x: torch.Tensor,
    plan: RoutingPlan,
    basis: torch.Tensor,
    slots: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute what `launch_low_rank_in` computes; in a new result, rows that belong to no expert are zero."""
    out = x.new_zeros(plan.num_rows, basis.shape[1]) if out is None else out
    matrices = range(plan.starts.numel() - 1) if slots is None else slots.tolist()
    for expert, rows in plan.rows_by_expert():
        if matrices[expert] >= 0:
            token = plan.order[rows] // plan.top_k
            out[rows] = F.linear(x[token], basis[matrices[expert]])
    return out
