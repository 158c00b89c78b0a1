"""bank_first: every token meets the atoms of the layer, and nothing is ever composed. For phi = identity.

    z = x B_palette^T -> mix by the codes -> adapters and activation -> down

Reads compressed bytes only. Suits batches of about 8 to 1024 tokens, and checkpoints that were fitted with a palette.
"""

from math import ceil

import torch

from globe_kernels.format.checkpoint import GlobeConfig
from globe_kernels.functional import moe_ffn_bank_first
from globe_kernels.ops.moe_ffn_bank_first import WORKSPACE_BYTES, BankFirstWeights
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
from globe_kernels.strategies.cost import Machine, predict
from globe_kernels.strategies.dense import Dense
from globe_kernels.strategies.palette_codes import hold_palette_codes, kept_palette_codes, palette_code_bytes

_SLOW = 1.5  # times the dense experts: a warning


class BankFirst(Strategy):
    """Hold the bank, and the codes as a matrix over the palette."""

    name = "bank_first"
    op = "moe_ffn_bank_first"

    def refuses(self, config: GlobeConfig) -> str | None:
        if config.phi == "identity":
            return None
        return f"strategy {self.name} needs phi identity and this checkpoint has phi {config.phi}"

    def warning(self, sizes: LayerSizes, machine: Machine) -> str | None:
        dense = Dense()
        ratios = {
            tokens: predict(self, sizes, tokens, machine).us / predict(dense, sizes, tokens, machine).us
            for tokens in (2**power for power in range(13))
        }
        tokens = min(ratios, key=ratios.__getitem__)
        if ratios[tokens] <= _SLOW:
            return None
        return (
            f"A layer of this checkpoint uses {sizes.palette:.0f} atoms per family, and {self.name} multiplies every "
            f"token with all of them: by the cost model at least {ratios[tokens]:.1f} times as long as the dense "
            f"experts, at {tokens} tokens; fit with --palette, or use another strategy."
        )

    def resident(self, storage: Storage) -> Residents:
        return storage.residents(needs_bank=True, palette_codes=palette_code_bytes(storage))

    def workspace(self, storage: Storage, tokens: int, top_k: int, *, on_gpu: bool) -> int:
        # z (T, 2U, R) of one chunk of tokens
        atoms = max(sum(palette.values()) for palette in storage.palettes.values())
        z_row = ceil(atoms) * storage.config.rank * storage.item_size
        return storage.row_bytes(tokens, top_k) + min(tokens, max(1, WORKSPACE_BYTES // z_row)) * z_row

    def stages(self, sizes: LayerSizes, tokens: int, pool: Pool | None) -> list[Stage]:
        rows, rank, width, palette = tokens * sizes.top_k, sizes.rank, sizes.hidden, sizes.palette
        z = 2 * tokens * palette * rank
        read = 2 * palette * rank * width + tokens * width
        product = Stage(read + z, 2 * z * width, {"atom": 2 * palette}, launches=2)
        mix = Stage(z + 2 * rows * rank, 4 * rows * palette * rank)
        routing = routing_stage(sizes, tokens, prefix="bank_first_")
        return [routing, product, mix, adapter_stage(sizes, tokens), *down_stages(sizes, tokens)]

    def hold(self, layer: Layer) -> None:
        hold_palette_codes(layer)

    def run(self, layer: Layer, routed: Routed) -> torch.Tensor:
        bank, (gate, up) = layer.device_bank, kept_palette_codes(layer)
        weights = BankFirstWeights(bank.gate, bank.up, *gate, *up, layer.from_rank)
        return moe_ffn_bank_first(*routed, weights, layer.activation)
