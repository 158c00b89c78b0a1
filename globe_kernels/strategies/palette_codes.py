"""The codes of a layer as a matrix over its palette: bank_first mixes with it, scratch composes with it."""

from math import ceil

from globe_kernels.format.checkpoint import Code
from globe_kernels.format.names import FAMILIES
from globe_kernels.ops.compose_layer import PALETTE_PADDING, LayerCode, layer_code
from globe_kernels.strategies.base import INDEX_BYTES, Layer, Storage

_FLOAT_BYTES = 4


def palette_code_bytes(storage: Storage) -> int:
    """Bytes of (U,) int32, (E, U rounded up to PALETTE_PADDING) float32 and (E,) float32, all layers and families."""
    total = 0
    for layer, palette in storage.palettes.items():
        experts = storage.config.base.num_experts[layer]
        for used in map(ceil, palette.values()):
            padded = -(-used // PALETTE_PADDING) * PALETTE_PADDING
            total += INDEX_BYTES * used + experts * _FLOAT_BYTES * (padded + 1)
    return total


def device_code(layer: Layer, family: str) -> Code:
    """Return the codes of `layer` over the atoms that its device holds."""
    code = layer.code(family)
    return Code(layer.device_bank.local_ids(family, code.index), code.value)


def make_palette_code(layer: Layer, family: str) -> LayerCode:
    """Build the matrix from the sparse codes; waits for the device."""
    code = device_code(layer, family)
    return layer_code(code.index, code.value)


def hold_palette_codes(layer: Layer) -> None:
    """Keep the matrices of both families on `layer`, once for all strategies that read them."""
    if layer.keeps("gate_palette"):
        return
    for family in FAMILIES:
        for part, tensor in make_palette_code(layer, family)._asdict().items():
            layer.keep(f"{family}_{part}", tensor, keeps_dtype=True)


def kept_palette_codes(layer: Layer) -> tuple[LayerCode, LayerCode]:
    """Return the matrices of gate and up that `hold_palette_codes` keeps."""
    gate, up = (LayerCode(*(layer.kept(f"{family}_{part}") for part in LayerCode._fields)) for family in FAMILIES)
    return gate, up
