"""composed: every basis is composed when the model is loaded and stays on the device; the bank waits in host memory.

    x -> basis_e x -> adapters and activation -> down

Fewer bytes and less arithmetic than dense below rank P D / (P + D), at every number of tokens.
"""

import torch

from globe_kernels.format.checkpoint import GlobeConfig
from globe_kernels.format.names import FAMILIES
from globe_kernels.functional import moe_ffn
from globe_kernels.ops.compose_layer import LayerCode, compose_bases
from globe_kernels.ops.moe_ffn import ExpertWeights
from globe_kernels.strategies.base import (
    Layer,
    LayerSizes,
    Pool,
    Residents,
    Routed,
    Stage,
    Storage,
    Strategy,
    adapter_stage,
    down_stages,
    routing_stage,
)
from globe_kernels.strategies.palette_codes import make_palette_code


def break_even_rank(intermediate: int, hidden: int) -> int:
    """Return P D / (P + D): above this rank an adapter and its basis have more values than the dense matrix."""
    return intermediate * hidden // (intermediate + hidden)


class Composed(Strategy):
    """Hold every basis (E, 2R, D)."""

    name = "composed"
    op = "moe_ffn"
    holds_bases = True

    def wastes(self, config: GlobeConfig) -> str | None:
        inner, width, rank = config.base.intermediate_size, config.base.hidden_size, config.rank
        limit = break_even_rank(inner, width)
        if rank <= limit:
            return None
        dense, composed = 2 * inner * width, 2 * rank * (inner + width)
        return (
            f"composed at rank {rank} holds {composed / 1e6:.2f} M values for gate and up of an expert and computes "
            f"{2 * composed / 1e6:.2f} M floating point operations per row, the dense matrices {dense / 1e6:.2f} M and "
            f"{2 * dense / 1e6:.2f} M: it saves nothing above rank {limit}, so auto does not take it"
        )

    def resident(self, storage: Storage) -> Residents:
        bases = storage.config.base.total_experts * 2 * storage.atom_values * storage.item_size
        return storage.residents(needs_bank=False, bases=bases)

    def stages(self, sizes: LayerSizes, tokens: int, pool: Pool | None) -> list[Stage]:
        return [routing_stage(sizes, tokens), *stages_after_composing(sizes, tokens)]

    def hold(self, layer: Layer) -> None:
        gate, up = (make_palette_code(layer, family) for family in FAMILIES)
        layer.keep("basis", compose(layer, gate, up))

    def run(self, layer: Layer, routed: Routed) -> torch.Tensor:
        return moe_ffn(*routed, ExpertWeights(layer.kept("basis"), layer.from_rank), layer.activation)


def compose(layer: Layer, gate: LayerCode, up: LayerCode) -> torch.Tensor:
    """Compose the bases (E, 2R, D) of one layer from the atoms of its device."""
    bank = layer.device_bank
    return compose_bases([*gate, *up], [bank.gate, bank.up], layer.phi, layer.dtype)


def stages_after_composing(sizes: LayerSizes, tokens: int, *, passes: int = 1) -> list[Stage]:
    """Count S1 from composed bases, in `passes` launches, S2 and S3."""
    rows, active, rank, width = tokens * sizes.top_k, sizes.active_experts(tokens), sizes.rank, sizes.hidden
    values = 2 * active * rank * width + tokens * width + 2 * rows * rank
    bases = Stage(values, 4 * rows * rank * width, launches=passes)
    return [bases, adapter_stage(sizes, tokens), *down_stages(sizes, tokens)]
