# pyright: reportInvalidTypeForm=false
"""S3: project down, weight by the router, and sum over the experts of each token.

    out[t] = sum_k top_k_weights[t, k] * (down[e] y[s] + bias[e])     s the routed row of token t and choice k

Shapes: T tokens, K experts per token, S = T * K routed rows in the order of the plan, E experts, P intermediate size, D
hidden size; the bias (E, D) is optional. A choice that names no expert is left out of the sum. Two sums, both in fp32:

    deterministic   every routed row writes an output row, then K rows are summed in the order of k
    atomic          every routed row adds to its token: no rows to write and read again, and the last bits of the
                    result depend on the order in which programs run
"""

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F

from globe_kernels.ops.grouped import accumulate, grouped_launch, program_tile
from globe_kernels.ops.routing import RoutingPlan
from globe_kernels.ops.triton_import import tl, triton
from globe_kernels.ops.tuning import GemmConfig

_SUM_BLOCK = 1024
_SUM_WARPS = 4


class Down(NamedTuple):
    """The weights of one layer from the intermediate size to the hidden size."""

    weight: torch.Tensor  # (E, D, P)
    bias: torch.Tensor | None = None  # (E, D)

    def contiguous(self) -> "Down":
        return Down(self.weight.contiguous(), None if self.bias is None else self.bias.contiguous())


@triton.jit(do_not_specialize=["num_tiles"])
def _down_kernel(
    y_ptr,  # (S, P) in the order of the plan
    down_ptr,  # (E, D, P)
    bias_ptr,  # (E, D) or None
    out_ptr,  # (S, D) in the order of tokens and choices; ATOMIC: (T, D) float32, zero at launch
    row_weight_ptr,  # (S,) in the order of tokens and choices
    order_ptr,  # (S,) int32
    starts_ptr,  # (E + 1,) int32
    tile_expert_ptr,  # (num_tiles,) int32, -1 past the last tile
    tile_first_ptr,  # (num_tiles,) int32
    num_tiles,
    num_columns,  # D
    depth,  # P
    top_k,  # K
    ATOMIC: tl.constexpr,
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
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + expert * num_columns + columns, mask=column_mask, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    target = tl.load(order_ptr + rows, mask=row_mask, other=0)
    acc *= tl.load(row_weight_ptr + target, mask=row_mask, other=0.0).to(tl.float32)[:, None]
    mask = row_mask[:, None] & column_mask[None, :]
    if ATOMIC:
        token = (target // top_k).to(tl.int64)
        tl.atomic_add(out_ptr + token[:, None] * num_columns + columns[None, :], acc, mask=mask, sem="relaxed")
    else:
        out = out_ptr + target.to(tl.int64)[:, None] * num_columns + columns[None, :]
        tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _sum_choices_kernel(
    rows_ptr,  # (S, D)
    index_ptr,  # (T, K)
    out_ptr,  # (T, D)
    width,  # D
    num_experts,
    top_k,
    BLOCK: tl.constexpr,
):
    """Grid: (T, cdiv(D, BLOCK)). One program owns BLOCK values of one token."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for choice in range(top_k):
        row = token * top_k + choice
        expert = tl.load(index_ptr + row)
        routed = (expert >= 0) & (expert < num_experts)
        # a row without expert was never written
        total += tl.load(rows_ptr + row * width + columns, mask=mask & routed, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * width + columns, total.to(out_ptr.dtype.element_ty), mask=mask)


def atomic_config(config: GemmConfig) -> GemmConfig:
    """Narrow the tile of a GEMM that ends in atomics: 256 columns leave no registers for their addresses."""
    return replace(config, block_n=min(128, config.block_n))


def launch_down(
    y: torch.Tensor,
    plan: RoutingPlan,
    down: Down,
    routing: tuple[torch.Tensor, torch.Tensor],  # top_k_index and top_k_weights, (T, K) each
    config: GemmConfig,
    deterministic: bool = True,
) -> torch.Tensor:
    """Launch the kernels on contiguous inputs in `config`; return (T, D)."""
    num_experts, columns, depth = down.weight.shape
    top_k_index, top_k_weights = routing
    num_tokens = top_k_index.shape[0]
    if deterministic:
        rows = y.new_empty(plan.num_rows, columns)
    else:
        rows = torch.zeros(num_tokens, columns, dtype=torch.float32, device=y.device)
        config = atomic_config(config)
    grid, schedule, options = grouped_launch(plan, columns, depth, config)
    _down_kernel[grid](y, *down, rows, top_k_weights, *schedule, plan.top_k, ATOMIC=not deterministic, **options)
    if not deterministic:
        return rows.to(y.dtype)
    return sum_choices(rows, top_k_index, num_experts)


def sum_choices(rows: torch.Tensor, top_k_index: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Sum the rows (S, D) of each token in fp32, without choices that name no expert; return (T, D)."""
    (num_tokens, top_k), columns = top_k_index.shape, rows.shape[1]
    out = rows.new_empty(num_tokens, columns)
    _sum_choices_kernel[(num_tokens, triton.cdiv(columns, _SUM_BLOCK))](
        rows, top_k_index, out, columns, num_experts, top_k, BLOCK=_SUM_BLOCK, num_warps=_SUM_WARPS
    )
    return out


def down_ref(y: torch.Tensor, plan: RoutingPlan, down: Down, top_k_weights: torch.Tensor) -> torch.Tensor:
    """Compute the result of `launch_down`, with weighted rows in fp32, of fp64 in fp64."""
    width, dtype = down.weight.shape[1], torch.promote_types(y.dtype, torch.float32)
    out = y.new_zeros(plan.num_rows, width, dtype=dtype)
    row_weights = top_k_weights.flatten().to(dtype)
    for expert, rows in plan.rows_by_expert():
        target = plan.order[rows]
        bias = None if down.bias is None else down.bias[expert]
        out[target] = F.linear(y[rows], down.weight[expert], bias).to(dtype) * row_weights[target, None]
    return out.view(-1, plan.top_k, width).sum(1).to(y.dtype)
