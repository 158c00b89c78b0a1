"""Launch configurations: which exist, which a card can run, which one a call gets.

Nothing is tuned while a user waits: a configuration follows from the rows per expert alone, and `supports` decides
whether the card has the shared memory for it. One predicate serves the launcher, the checks and the tests.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

# Shared memory that one program may use, in bytes, by compute capability; the smallest for a card not listed.
SHARED_LIMITS = {
    (8, 0): 163 * 1024,
    (8, 6): 99 * 1024,
    (8, 7): 163 * 1024,
    (8, 9): 99 * 1024,
    (9, 0): 227 * 1024,
    (10, 0): 227 * 1024,
    (12, 0): 99 * 1024,
}
SMALLEST_LIMIT = 64 * 1024  # AMD gfx942


@dataclass(frozen=True)
class GemmConfig:
    """One launch of a grouped GEMM. The rows of a tile belong to the RoutingPlan, which all stages share."""

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    num_warps: int
    num_stages: int

    def launch(self) -> dict[str, int]:
        """Keyword arguments of a launch, without BLOCK_M."""
        return {
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "GROUP_M": self.group_m,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }

    def shared_bytes(self, item_size: int) -> int:
        """Shared memory of the software pipeline: a tile of rows and one of weights per stage."""
        return self.num_stages * (self.block_m + self.block_n) * self.block_k * item_size


# By rows per expert, fewest first: (up to this many rows, configuration). Few rows are bound by reading weights: narrow
# row tiles and several loads in flight. Many are bound by arithmetic: from 64 rows a tile is one wgmma on sm_90.
CONFIGS = (
    (16, GemmConfig(block_m=16, block_n=64, block_k=128, group_m=1, num_warps=4, num_stages=4)),
    (32, GemmConfig(block_m=32, block_n=64, block_k=128, group_m=1, num_warps=4, num_stages=4)),
    (64, GemmConfig(block_m=64, block_n=128, block_k=64, group_m=4, num_warps=4, num_stages=4)),
    (None, GemmConfig(block_m=128, block_n=128, block_k=64, group_m=8, num_warps=8, num_stages=4)),
)


def supports(config: GemmConfig, item_size: int, shared_limit: int) -> bool:
    """Whether a card with `shared_limit` bytes of shared memory can run `config` on values of `item_size` bytes."""
    return config.shared_bytes(item_size) <= shared_limit


def fit_to(config: GemmConfig, item_size: int, shared_limit: int) -> GemmConfig:
    """`config` with as many stages, then as deep a tile, as the card has shared memory for."""
    while not supports(config, item_size, shared_limit):
        if config.num_stages > 2:
            config = replace(config, num_stages=config.num_stages - 1)
        else:
            config = replace(config, block_k=config.block_k // 2)
    return config


@lru_cache
def shared_limit(device: torch.device) -> int:
    """Bytes of shared memory that a program may use on `device`."""
    if device.type != "cuda" or torch.version.hip is not None:
        return SMALLEST_LIMIT
    return SHARED_LIMITS.get(torch.cuda.get_device_capability(device), SMALLEST_LIMIT)


def choose(num_rows: int, num_experts: int, item_size: int, limit: int) -> GemmConfig:
    """The configuration for `num_rows` routed rows over `num_experts` experts."""
    rows_per_expert = -(-num_rows // num_experts)
    config = next(config for rows, config in CONFIGS if rows is None or rows_per_expert <= rows)
    return fit_to(config, item_size, limit)
