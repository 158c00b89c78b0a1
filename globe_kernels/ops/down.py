# pyright: reportInvalidTypeForm=false
"""S3: the down projection, weighted by the router and summed over the choices of each token.

    out[t] = sum_k top_k_weights[t, k] * (down[e] y[s])      s the routed row of token t and choice k

Shapes: T tokens, K choices, S = T * K routed rows in the order of the plan, E experts, P intermediate size, D hidden
size. Two launches: every routed row writes its own output row, then K rows are summed in fp32 in the order of k, so
the result does not depend on the order in which programs run. A choice that names no expert is left out of the sum.
"""

import torch
import torch.nn.functional as F

from globe_kernels.ops.grouped import accumulate, program_tile
from globe_kernels.ops.triton_import import tl, triton
from globe_kernels.ops.tuning import GemmConfig
from globe_kernels.routing import RoutingPlan

_SUM_BLOCK = 1024


@triton.jit
def _down_kernel(
    y_ptr,  # (S, P) in the order of the plan
    down_ptr,  # (E, D, P)
    out_ptr,  # (S, D) in the order of tokens and choices
    row_weight_ptr,  # (S,) in the order of tokens and choices
    order_ptr,  # (S,) int32
    starts_ptr,  # (E + 1,) int32
    tile_expert_ptr,  # (num_tiles,) int32, -1 past the last tile
    tile_first_ptr,  # (num_tiles,) int32
    num_tiles,
    num_columns,  # D
    depth,  # P
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Grid: (num_tiles * cdiv(D, BLOCK_N),). One program owns BLOCK_M rows of one expert and BLOCK_N columns."""
    expert, rows, row_mask, columns, column_mask = program_tile(
        starts_ptr, tile_expert_ptr, tile_first_ptr, num_tiles, num_columns, BLOCK_M, BLOCK_N, GROUP_M
    )
    if expert < 0:
        return
    acc = accumulate(
        tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32),
        y_ptr + rows.to(tl.int64)[:, None] * depth,
        row_mask[:, None],
        down_ptr + (expert * num_columns + columns)[None, :] * depth,
        column_mask[None, :],
        depth,
        EVEN_K,
        BLOCK_K,
    )
    target = tl.load(order_ptr + rows, mask=row_mask, other=0)
    scale = tl.load(row_weight_ptr + target, mask=row_mask, other=0.0).to(tl.float32)
    out = out_ptr + target.to(tl.int64)[:, None] * num_columns + columns[None, :]
    tl.store(out, (acc * scale[:, None]).to(out_ptr.dtype.element_ty), mask=row_mask[:, None] & column_mask[None, :])


@triton.jit
def _sum_choices_kernel(
    rows_ptr,  # (S, D)
    index_ptr,  # (T, K)
    out_ptr,  # (T, D)
    width,  # D
    num_experts,
    num_choices,
    BLOCK: tl.constexpr,
):
    """Grid: (T, cdiv(D, BLOCK)). One program owns BLOCK values of one token."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for choice in range(num_choices):
        row = token * num_choices + choice
        expert = tl.load(index_ptr + row)
        routed = (expert >= 0) & (expert < num_experts)
        # a row without expert was never written
        total += tl.load(rows_ptr + row * width + columns, mask=mask & routed, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * width + columns, total.to(out_ptr.dtype.element_ty), mask=mask)


def down(
    y: torch.Tensor,
    plan: RoutingPlan,
    down_proj: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    config: GemmConfig,
) -> torch.Tensor:
    """(T, D) in the dtype of `y`, from y (S, P), down_proj (E, D, P) and the routing (T, K), all contiguous."""
    num_experts, columns, depth = down_proj.shape
    rows = y.new_empty(plan.num_rows, columns)
    grid = (plan.num_tiles * triton.cdiv(columns, config.block_n),)
    _down_kernel[grid](
        y,
        down_proj,
        rows,
        top_k_weights,
        *plan.schedule,
        columns,
        depth,
        EVEN_K=depth % config.block_k == 0,
        BLOCK_M=plan.block_m,
        **config.launch(),
    )
    num_tokens = top_k_index.shape[0]
    out = y.new_empty(num_tokens, columns)
    _sum_choices_kernel[(num_tokens, triton.cdiv(columns, _SUM_BLOCK))](
        rows, top_k_index, out, columns, num_experts, plan.num_choices, BLOCK=_SUM_BLOCK, num_warps=4
    )
    return out


def down_ref(y: torch.Tensor, plan: RoutingPlan, down_proj: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
    """As `down`. The weighted rows stay fp32: a sum of K bf16 terms of alternating sign loses the low bits."""
    out = y.new_zeros(plan.num_rows, down_proj.shape[1], dtype=torch.float32)
    row_weights = top_k_weights.flatten().float()
    for expert, rows in plan.rows_by_expert():
        target = plan.order[rows]
        out[target] = F.linear(y[rows], down_proj[expert]).float() * row_weights[target, None]
    return out.view(-1, plan.num_choices, down_proj.shape[1]).sum(1).to(y.dtype)
