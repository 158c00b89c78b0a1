"""Which token goes to which expert, sorted by expert: computed once per layer and passed whole."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RoutingPlan:
    """The routed rows of one layer, grouped by expert, and the tiles in which kernels visit them.

    A routed row is one (token, choice) pair; row `t * K + k` is choice k of token t, S = T * K rows.

        top_k_index = [[2, 0], [0, 9]] with E = 3 (id 9 is a sentinel: no expert), block_m = 1
        order       = [1, 2, 0, .]       rows by expert, stable; what follows starts[E] means nothing
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
    num_choices: int  # K

    @property
    def num_rows(self) -> int:
        """S"""
        return self.order.shape[0]

    @property
    def num_tiles(self) -> int:
        """Tiles to launch, used or not."""
        return self.tile_expert.shape[0]

    @property
    def arguments(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int, int]:
        """A plan as an op takes it: RoutingPlan(*plan.arguments) is the plan again."""
        return self.order, self.starts, self.tile_expert, self.tile_first, self.block_m, self.num_choices

    @property
    def schedule(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int]:
        """What every kernel takes of a plan: order, starts, tile_expert, tile_first, num_tiles."""
        return self.order, self.starts, self.tile_expert, self.tile_first, self.num_tiles

    def rows_by_expert(self) -> Iterator[tuple[int, slice]]:
        """(expert, its places in `order`) of every expert that has rows; waits for the device."""
        starts = self.starts.tolist()
        for expert, (start, stop) in enumerate(zip(starts[:-1], starts[1:], strict=True)):
            if start < stop:
                yield expert, slice(start, stop)


def max_tiles(num_rows: int, num_experts: int, block_m: int) -> int:
    """The most tiles that any routing needs: every full tile, and a ragged one for each expert that can have rows."""
    return num_rows // block_m + min(num_rows, num_experts)
