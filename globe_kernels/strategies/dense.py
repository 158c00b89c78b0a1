"""dense: the experts as transformers runs them, beside which every strategy stands. No checkpoint runs by it.

gate and up in one product, the activation, down
"""

import torch

from globe_kernels.format.checkpoint import GlobeConfig
from globe_kernels.strategies.base import (
    Layer,
    LayerSizes,
    Pool,
    Residents,
    Routed,
    Stage,
    Storage,
    Strategy,
    down_stages,
    routing_stage,
)


class Dense(Strategy):
    """The dense model, for comparisons of bytes and time."""

    name = "dense"

    def refuses(self, config: GlobeConfig) -> str | None:
        return "strategy dense is the model without GloBE"

    def resident(self, storage: Storage) -> Residents:
        base = storage.config.base
        values = 2 * base.total_experts * base.intermediate_size * base.hidden_size
        return Residents(storage.down_bytes, dense=values * storage.item_size)

    def workspace(self, storage: Storage, tokens: int, top_k: int, *, on_gpu: bool) -> int:
        # per routed row: x, gate and up, their product, the output
        rows, base = tokens * top_k, storage.config.base
        values = rows * (2 * base.hidden_size + 3 * base.intermediate_size) + tokens * base.hidden_size
        return values * storage.item_size

    def stages(self, sizes: LayerSizes, tokens: int, pool: Pool | None) -> list[Stage]:
        rows, inner, width = tokens * sizes.top_k, sizes.intermediate, sizes.hidden
        values = 2 * sizes.active_experts(tokens) * inner * width + tokens * width + rows * inner
        gate_up = Stage(values, 4 * rows * inner * width)
        return [routing_stage(sizes, tokens, prefix="dense_"), gate_up, *down_stages(sizes, tokens)]

    def run(self, layer: Layer, routed: Routed) -> torch.Tensor:
        raise NotImplementedError("transformers runs dense experts")
