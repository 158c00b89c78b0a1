# pyright: reportInvalidTypeForm=false
"""Sort the routed rows of one layer by expert, once per layer, and cut them into the tiles of grouped kernels.

    order  = rows sorted by expert, in the order of rows within one expert
    starts = exclusive sum of the rows of each expert

Shapes: top_k_index (T, K) of any integer type, E experts, S = T * K rows. An id outside 0..E-1 belongs to no expert.
A call launches one kernel when all rows fit in one block, as in decoding; else four (count, tiles, place of each block,
scatter). A size that varies from call to call is never specialised: a new number of rows must not compile a kernel.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from globe_kernels.ops.triton_import import tl, triton

_BLOCK = 128  # rows that one program ranks by comparing all pairs
_TILE_BLOCK = 64
_PLACES_BLOCK = 1024


@dataclass(frozen=True)
class RoutingPlan:
    """The routed rows of one layer, grouped by expert, and the tiles in which kernels visit them.

    A routed row is one (token, choice) pair; row `t * K + k` is choice k of token t, S = T * K rows.

        top_k_index = [[2, 0], [0, 9]] with E = 3 (id 9 is a sentinel: no expert), block_m = 1
        order       = [1, 2, 0, .]       rows by expert, stable; values past starts[E] mean nothing
        starts      = [0, 2, 2, 3]       rows of expert e are order[starts[e]:starts[e + 1]]
        tile_expert = [0, 0, 2, -1, ...] a tile is block_m rows of one expert, the last of each may be ragged
        tile_first  = [0, 1, 2, 0, ...]  place in `order` of its first row

    The number of tiles is bounded on the host, so that no kernel waits for the device: tiles past the last are -1.
    """

    order: torch.Tensor  # (S,) int32
    starts: torch.Tensor  # (E + 1,) int32
    tile_expert: torch.Tensor  # (max_tiles(S, E, block_m),) int32
    tile_first: torch.Tensor  # likewise
    block_m: int
    top_k: int  # K

    @property
    def num_rows(self) -> int:
        """S"""
        return self.order.shape[0]

    @property
    def num_tiles(self) -> int:
        """Tiles to launch, used or not."""
        return self.tile_expert.shape[0]

    @property
    def schedule(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int]:
        """The tensors of a plan that every kernel takes: order, starts, tile_expert, tile_first, num_tiles."""
        return self.order, self.starts, self.tile_expert, self.tile_first, self.num_tiles

    def rows_by_expert(self) -> Iterator[tuple[int, slice]]:
        """Yield (expert, its places in `order`) of every expert that has rows; waits for the device."""
        starts = self.starts.tolist()
        for expert, (start, stop) in enumerate(zip(starts[:-1], starts[1:], strict=True)):
            if start < stop:
                yield expert, slice(start, stop)


def max_tiles(num_rows: int, num_experts: int, block_m: int) -> int:
    """Return the most tiles that any routing needs: all full tiles, and a ragged tile per expert that can have rows."""
    return num_rows // block_m + min(num_rows, num_experts)


@triton.jit
def _load_ids(index_ptr, rows, num_rows, num_experts):
    """Load the expert of each row; num_experts where a row has none."""
    ids = tl.load(index_ptr + rows, mask=rows < num_rows, other=0)
    # compared in their own type: an id past int32 must not wrap into an expert
    return tl.where((rows < num_rows) & (ids >= 0) & (ids < num_experts), ids, num_experts).to(tl.int32)


@triton.jit
def _write_tiles(
    tile_expert_ptr,
    tile_first_ptr,
    counts,  # (E_PAD,) rows of each expert
    first_tile,
    num_tiles,
    E_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE_BLOCK: tl.constexpr,
):
    """Write entries first_tile .. first_tile + TILE_BLOCK of the schedule."""
    experts = tl.arange(0, E_PAD)
    starts = tl.cumsum(counts, 0) - counts
    tiles = (counts + BLOCK_M - 1) // BLOCK_M
    ends = tl.cumsum(tiles, 0)
    tile = first_tile + tl.arange(0, TILE_BLOCK)
    expert = tl.sum((ends[None, :] <= tile[:, None]).to(tl.int32), 1)
    owns = experts[None, :] == expert[:, None]
    before = tl.sum(tl.where(owns, (ends - tiles)[None, :], 0), 1)
    start = tl.sum(tl.where(owns, starts[None, :], 0), 1)
    used = tile < tl.sum(tiles, 0)
    tl.store(tile_expert_ptr + tile, tl.where(used, expert, -1), mask=tile < num_tiles)
    tl.store(tile_first_ptr + tile, tl.where(used, start + (tile - before) * BLOCK_M, 0), mask=tile < num_tiles)


@triton.jit(do_not_specialize=["num_rows", "num_tiles"])
def _plan_in_one_block_kernel(
    index_ptr,  # (S,)
    order_ptr,  # (S,) int32
    starts_ptr,  # (E + 1,) int32
    tile_expert_ptr,  # (num_tiles,) int32
    tile_first_ptr,  # (num_tiles,) int32
    num_rows,
    num_experts,
    num_tiles,
    E_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE_BLOCK: tl.constexpr,
):
    """Grid: (1,). One program sorts all rows."""
    rows = tl.arange(0, BLOCK)
    ids = _load_ids(index_ptr, rows, num_rows, num_experts)
    experts = tl.arange(0, E_PAD)
    counts = tl.histogram(ids, E_PAD, mask=ids < num_experts)
    starts = tl.cumsum(counts, 0) - counts
    tl.store(starts_ptr + experts, starts, mask=experts < num_experts)
    tl.store(starts_ptr + num_experts, tl.sum(counts, 0))
    before = (ids[None, :] < ids[:, None]) | ((ids[None, :] == ids[:, None]) & (rows[None, :] < rows[:, None]))
    tl.store(order_ptr + tl.sum(before.to(tl.int32), 1), rows, mask=ids < num_experts)
    for first_tile in range(0, num_tiles, TILE_BLOCK):
        _write_tiles(tile_expert_ptr, tile_first_ptr, counts, first_tile, num_tiles, E_PAD, BLOCK_M, TILE_BLOCK)


@triton.jit(do_not_specialize=["num_rows"])
def _count_kernel(
    index_ptr,  # (S,)
    block_counts_ptr,  # (blocks, E) int32
    totals_ptr,  # (E,) int32, zero at launch
    num_rows,
    num_experts,
    E_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (blocks,). One program counts the rows of each expert in one block."""
    block = tl.program_id(0)
    ids = _load_ids(index_ptr, block * BLOCK + tl.arange(0, BLOCK), num_rows, num_experts)
    experts = tl.arange(0, E_PAD)
    counts = tl.histogram(ids, E_PAD, mask=ids < num_experts)
    mask = experts < num_experts
    tl.store(block_counts_ptr + block * num_experts + experts, counts, mask=mask)
    # integer sums: the same in any order
    tl.atomic_add(totals_ptr + experts, counts, mask=mask)


@triton.jit(do_not_specialize=["num_tiles"])
def _tiles_kernel(
    totals_ptr,  # (E,) int32
    starts_ptr,  # (E + 1,) int32
    tile_expert_ptr,  # (num_tiles,) int32
    tile_first_ptr,  # (num_tiles,) int32
    num_experts,
    num_tiles,
    E_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE_BLOCK: tl.constexpr,
):
    """Grid: (cdiv(num_tiles, TILE_BLOCK),). One program writes TILE_BLOCK tiles, the first also the starts."""
    experts = tl.arange(0, E_PAD)
    counts = tl.load(totals_ptr + experts, mask=experts < num_experts, other=0)
    if tl.program_id(0) == 0:
        tl.store(starts_ptr + experts, tl.cumsum(counts, 0) - counts, mask=experts < num_experts)
        tl.store(starts_ptr + num_experts, tl.sum(counts, 0))
    first_tile = tl.program_id(0) * TILE_BLOCK
    _write_tiles(tile_expert_ptr, tile_first_ptr, counts, first_tile, num_tiles, E_PAD, BLOCK_M, TILE_BLOCK)


@triton.jit(do_not_specialize=["num_blocks"])
def _places_kernel(
    block_counts_ptr,  # (blocks, E) int32, becomes the place of each block's first row of each expert
    starts_ptr,  # (E + 1,) int32
    num_blocks,
    num_experts,
    BLOCK: tl.constexpr,
):
    """Grid: (E,). One program sums the counts of one expert over the blocks before each."""
    expert = tl.program_id(0)
    place = tl.load(starts_ptr + expert)
    for first in range(0, num_blocks, BLOCK):
        block = first + tl.arange(0, BLOCK)
        ptr = block_counts_ptr + block * num_experts + expert
        counts = tl.load(ptr, mask=block < num_blocks, other=0)
        tl.store(ptr, place + tl.cumsum(counts, 0) - counts, mask=block < num_blocks)
        place += tl.sum(counts, 0)


@triton.jit(do_not_specialize=["num_rows"])
def _scatter_kernel(
    index_ptr,  # (S,)
    places_ptr,  # (blocks, E) int32
    order_ptr,  # (S,) int32
    num_rows,
    num_experts,
    BLOCK: tl.constexpr,
):
    """Grid: (blocks,). One program puts the rows of one block in their places."""
    block = tl.program_id(0)
    rows = block * BLOCK + tl.arange(0, BLOCK)
    ids = _load_ids(index_ptr, rows, num_rows, num_experts)
    routed = ids < num_experts
    place = tl.load(places_ptr + block * num_experts + ids, mask=routed, other=0)
    earlier = (ids[None, :] == ids[:, None]) & (rows[None, :] < rows[:, None])
    tl.store(order_ptr + place + tl.sum(earlier.to(tl.int32), 1), rows, mask=routed)


def launch_routing_plan(top_k_index: torch.Tensor, num_experts: int, block_m: int) -> RoutingPlan:
    """Build the plan of top_k_index (T, K), contiguous, without waiting for the device."""
    num_rows, top_k = top_k_index.numel(), top_k_index.shape[1]
    num_tiles = max_tiles(num_rows, num_experts, block_m)

    def integers(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device=top_k_index.device)

    plan = RoutingPlan(
        integers(num_rows), integers(num_experts + 1), integers(num_tiles), integers(num_tiles), block_m, top_k
    )
    e_pad = max(2, triton.next_power_of_2(num_experts))  # tl.histogram takes two bins or more
    if num_rows <= _BLOCK:
        _plan_in_one_block_kernel[(1,)](
            top_k_index,
            plan.order,
            plan.starts,
            plan.tile_expert,
            plan.tile_first,
            num_rows,
            num_experts,
            num_tiles,
            E_PAD=e_pad,
            BLOCK=max(16, triton.next_power_of_2(num_rows)),
            BLOCK_M=block_m,
            TILE_BLOCK=_TILE_BLOCK,
            num_warps=warps(e_pad),
        )
        return plan
    blocks = triton.cdiv(num_rows, _BLOCK)
    places = integers(blocks, num_experts)
    totals = torch.zeros(num_experts, dtype=torch.int32, device=top_k_index.device)
    _count_kernel[(blocks,)](top_k_index, places, totals, num_rows, num_experts, E_PAD=e_pad, BLOCK=_BLOCK)
    _tiles_kernel[(triton.cdiv(num_tiles, _TILE_BLOCK),)](
        totals,
        plan.starts,
        plan.tile_expert,
        plan.tile_first,
        num_experts,
        num_tiles,
        E_PAD=e_pad,
        BLOCK_M=block_m,
        TILE_BLOCK=_TILE_BLOCK,
        num_warps=warps(e_pad),
    )
    _places_kernel[(num_experts,)](places, plan.starts, blocks, num_experts, BLOCK=_PLACES_BLOCK)
    _scatter_kernel[(blocks,)](top_k_index, places, plan.order, num_rows, num_experts, BLOCK=_BLOCK)
    return plan


def warps(e_pad: int) -> int:
    """Return the warps of the kernels that hold a table of rows or tiles by experts in registers."""
    return 4 if e_pad <= 128 else 8


def routing_plan_ref(top_k_index: torch.Tensor, num_experts: int, block_m: int) -> RoutingPlan:
    """Compute what `launch_routing_plan` computes; rows without expert follow the others in `order`."""
    ids = top_k_index.flatten().long()
    ids = torch.where((ids >= 0) & (ids < num_experts), ids, num_experts)
    order = torch.argsort(ids, stable=True)
    counts = torch.bincount(ids, minlength=num_experts + 1)[:num_experts]
    starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    tiles = (counts + block_m - 1) // block_m
    num_tiles = max_tiles(ids.numel(), num_experts, block_m)
    tile = torch.arange(num_tiles, device=ids.device)
    ends = tiles.cumsum(0)
    expert = torch.searchsorted(ends, tile, right=True)
    used = expert < num_experts
    owner = expert.clamp_max(num_experts - 1)
    first = starts[owner] + (tile - (ends - tiles)[owner]) * block_m
    return RoutingPlan(
        order.int(),
        starts.int(),
        torch.where(used, expert, -1).int(),
        torch.where(used, first, 0).int(),
        block_m,
        top_k_index.shape[1],
    )
