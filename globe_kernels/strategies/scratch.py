"""scratch: a call composes all bases of its layer, runs from them as `composed` does, and forgets them.

    compose the layer -> x -> basis_e x -> adapters and activation -> down

Suits long prefills. On a GPU the next layer is composed meanwhile on a side stream: globe_kernels.model.scratch.
"""

import torch

from globe_kernels.functional import moe_ffn_scratch
from globe_kernels.ops.compose_layer import compose_bases_into
from globe_kernels.ops.moe_ffn_scratch import ScratchWeights
from globe_kernels.strategies.base import (
    Layer,
    LayerSizes,
    Pool,
    Residents,
    Routed,
    Stage,
    Storage,
    Strategy,
    routing_stage,
)
from globe_kernels.strategies.composed import compose, stages_after_composing
from globe_kernels.strategies.palette_codes import hold_palette_codes, kept_palette_codes, palette_code_bytes


class Scratch(Strategy):
    """Hold the bank, and for the length of a call the bases of one layer."""

    name = "scratch"
    op = "moe_ffn"
    composes = True
    takes_buffers = True

    def resident(self, storage: Storage) -> Residents:
        return storage.residents(needs_bank=True, palette_codes=palette_code_bytes(storage))

    def workspace(self, storage: Storage, tokens: int, top_k: int, *, on_gpu: bool) -> int:
        buffers = 2 if on_gpu else 1  # one layer runs while the next is composed
        experts = max(storage.config.base.num_experts.values())
        bases = buffers * experts * 2 * storage.atom_values * storage.item_size
        return storage.row_bytes(tokens, top_k) + bases

    def stages(self, sizes: LayerSizes, tokens: int, pool: Pool | None) -> list[Stage]:
        values = 2 * (sizes.palette + sizes.experts) * sizes.rank * sizes.hidden
        products = 1 if sizes.item_size == 4 else 2  # 16-bit atoms are multiplied twice (ops/compose_layer.py)
        mixed = 4 * products * sizes.experts * sizes.palette * sizes.rank * sizes.hidden
        composing = Stage(values, mixed, {"layer": 1}, launches=2)
        return [composing, routing_stage(sizes, tokens), *stages_after_composing(sizes, tokens)]

    def hold(self, layer: Layer) -> None:
        hold_palette_codes(layer)

    def run(self, layer: Layer, routed: Routed) -> torch.Tensor:
        bank, codes = layer.device_bank, kept_palette_codes(layer)

        def experts(basis: torch.Tensor) -> torch.Tensor:
            weights = ScratchWeights(basis, codes, (bank.gate, bank.up), layer.phi, layer.from_rank)
            return moe_ffn_scratch(*routed, weights, layer.activation)

        if bank.scratch.can_run(routed.hidden_states):
            return bank.scratch.run(layer, routed.hidden_states, experts)
        return experts(compose(layer, *codes))


def compose_into(layer: Layer, out: torch.Tensor) -> None:
    """Compose the bases of `layer` into `out` (E, 2R, D), on the stream of the caller."""
    bank = layer.device_bank
    compose_bases_into(out, kept_palette_codes(layer), (bank.gate, bank.up), layer.phi)
