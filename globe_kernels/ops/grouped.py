# pyright: reportInvalidTypeForm=false
"""The parts that all GEMMs share: the grouped launch, the tile of a program, the accumulation over K.

A grouped GEMM multiplies the rows of each expert with that expert's matrix. Rows are in the order of a RoutingPlan
(sorted by expert, tiles of BLOCK_M rows that never span two experts); programs past the last tile exit.
"""

from typing import Any

from globe_kernels.ops.routing import RoutingPlan
from globe_kernels.ops.triton_import import tl, triton
from globe_kernels.ops.tuning import GemmConfig


def grouped_launch(
    plan: RoutingPlan, columns: int, depth: int, config: GemmConfig
) -> tuple[tuple[int], tuple, dict[str, Any]]:
    """Return (grid, arguments from order_ptr to depth, options) of a grouped GEMM over K = `depth`."""
    grid = (plan.num_tiles * triton.cdiv(columns, config.block_n),)
    options = {"EVEN_K": depth % config.block_k == 0, "BLOCK_M": plan.block_m, **config.launch()}
    return grid, (*plan.schedule, columns, depth), options


@triton.jit
def tile_of_program(num_tiles, num_columns, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Return (row tile, columns) of this program in a grid of num_tiles * cdiv(num_columns, BLOCK_N).

    GROUP_M row tiles share a column tile in turn, for L2.
    """
    pid = tl.program_id(0)
    in_group = GROUP_M * tl.cdiv(num_columns, BLOCK_N)
    first = (pid // in_group) * GROUP_M
    size = tl.minimum(num_tiles - first, GROUP_M)
    columns = (pid % in_group) // size * BLOCK_N + tl.arange(0, BLOCK_N)
    return first + (pid % in_group) % size, columns


@triton.jit
def program_tile(
    starts_ptr,  # (E + 1,) int32
    tile_expert_ptr,  # (num_tiles,) int32, -1 past the last tile
    tile_first_ptr,  # (num_tiles,) int32
    num_tiles,
    num_columns,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Return the tile of this program: (expert or -1, rows, mask of rows, columns, mask of columns).

    The expert is int64: it starts every weight address.
    """
    tile, columns = tile_of_program(num_tiles, num_columns, BLOCK_N, GROUP_M)
    expert = tl.load(tile_expert_ptr + tile).to(tl.int64)
    rows = tl.load(tile_first_ptr + tile) + tl.arange(0, BLOCK_M)
    return expert, rows, rows < tl.load(starts_ptr + expert + 1), columns, columns < num_columns


@triton.jit
def accumulate(
    acc,  # (BLOCK_M, BLOCK_N) float32
    rows_ptr,  # (BLOCK_M, 1) pointers to the first value of each row
    row_mask,  # (BLOCK_M, 1)
    weight_ptr,  # (1, BLOCK_N) pointers to the first value of each output's weights, which are `stride` values apart
    column_mask,  # (1, BLOCK_N)
    depth,  # K
    EVEN_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    stride=1,
):
    """Return acc + rows @ weights^T over K, in fp32; fp32 inputs are multiplied in full precision."""
    k = tl.arange(0, BLOCK_K)
    for start in range(0, depth, BLOCK_K):
        if EVEN_K:
            a = tl.load(rows_ptr + (start + k)[None, :], mask=row_mask, other=0.0)
            b = tl.load(weight_ptr + (start + k)[:, None] * stride, mask=column_mask, other=0.0)
        else:
            inside = start + k < depth
            a = tl.load(rows_ptr + (start + k)[None, :], mask=row_mask & inside[None, :], other=0.0)
            weights = weight_ptr + (start + k)[:, None] * stride
            b = tl.load(weights, mask=column_mask & inside[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc
