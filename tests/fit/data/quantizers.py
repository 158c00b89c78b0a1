"""Quantise a tensor as each format stores it: small, slow, and independent of the readers.

Every function returns {end of the stored name: tensor} for one weight; `CASES` names the formats and the
`quantization_config` that their checkpoints have.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])


def blocks(weight: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Return the largest magnitude of each block; blocks at the edges are cut."""
    padded = torch.nn.functional.pad(weight.abs(), (0, -weight.shape[-1] % columns, 0, -weight.shape[-2] % rows))
    return padded.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows)).amax((-3, -1))


def spread(grid: torch.Tensor, like: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    full = grid.float().repeat_interleave(rows, -2).repeat_interleave(columns, -1)
    return full[..., : like.shape[-2], : like.shape[-1]]


def power_of_two(scale: torch.Tensor) -> torch.Tensor:
    """Return the E8M0 codes of the next powers of two."""
    return (torch.log2(scale.clamp_min(2.0**-127)).ceil() + 127).to(torch.uint8)


def pack(codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Pack four-bit codes, the first in the lowest bits."""
    low, high = codes.unflatten(-1, (-1, 2)).to(torch.uint8).unbind(-1)
    return (low | (high << 4)).contiguous().view(dtype)


def fp4_codes(values: torch.Tensor) -> torch.Tensor:
    """Return the nearest codes; few values at a time, because all are compared with all."""
    return (values[..., None] - FP4).abs().argmin(-1)


def fp8(weight: torch.Tensor, rows: int, columns: int, *, end: str, e8m0: bool = False, dtype=torch.float32):
    scale = (blocks(weight, rows, columns) / 448).clamp_min(1e-12)
    stored = power_of_two(scale) if e8m0 else scale.to(dtype)
    scale = torch.exp2(stored.float() - 127) if e8m0 else stored
    codes = (weight / spread(scale, weight, rows, columns)).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {"": codes, end: stored}


def fp8_tensor(weight: torch.Tensor, shape: tuple[int, ...] = (1,)):
    scale = weight.abs().max() / 448
    return {"": (weight / scale).to(torch.float8_e4m3fn), "_scale": scale.reshape(shape)}


def int8_rows(weight: torch.Tensor):
    scale = (weight.abs().amax(-1, keepdim=True) / 127).bfloat16()
    return {"": (weight / scale.float()).round().clamp(-128, 127).to(torch.int8), "_scale": scale}


def mxfp4(weight: torch.Tensor, *, end: str = "_scale", packed: str = "", dtype=torch.uint8, e8m0=torch.uint8):
    stored = power_of_two(blocks(weight, 1, 32) / 6)
    codes = fp4_codes(weight / spread(torch.exp2(stored.float() - 127), weight, 1, 32))
    return {packed: pack(codes, dtype), end: stored.view(e8m0)}


def mxfp4_blocks(weight: torch.Tensor):
    """As gpt-oss stores a weight (E, columns, rows) of the model."""
    parts = mxfp4(weight.mT.contiguous())
    return {"_blocks": parts[""].unflatten(-1, (-1, 16)), "_scales": parts["_scale"]}


def nvfp4(weight: torch.Tensor, *, compressed_tensors: bool):
    largest = weight.abs().max()
    factor = 6 * 448 / largest if compressed_tensors else largest / (6 * 448)
    multiplier = 1 / factor if compressed_tensors else factor
    scale = (blocks(weight, 1, 16) / 6 / multiplier).to(torch.float8_e4m3fn)
    used = (scale.float() * multiplier).clamp_min(1e-12)
    codes = pack(fp4_codes(weight / spread(used, weight, 1, 16)), torch.uint8)
    if compressed_tensors:
        return {"_packed": codes, "_scale": scale, "_global_scale": factor.reshape(1)}
    return {"": codes, "_scale": scale, "_scale_2": factor, ".input_scale": torch.tensor(0.5)}


def integers(weight: torch.Tensor, *, bits: int = 4, group: int | None = 32, symmetric: bool = True):
    group = group or weight.shape[-1]
    half = 2 ** (bits - 1)
    grouped = weight.unflatten(-1, (-1, group))
    if symmetric:
        scale, zero = (grouped.abs().amax(-1) / (half - 0.5)).bfloat16(), torch.zeros(grouped.shape[:-1])
    else:
        low, high = grouped.amin(-1).clamp_max(0), grouped.amax(-1).clamp_min(0)
        scale = ((high - low) / (2 * half - 1)).bfloat16()
        zero = (-low / scale.float()).round().clamp(0, 2 * half - 1) - half
    codes = (grouped / scale.float()[..., None]).round() + zero[..., None]
    codes = (codes.clamp(-half, half - 1) + half).flatten(-2).to(torch.uint8)
    packed = pack(codes, torch.int32) if bits == 4 else codes.contiguous().view(torch.int32)
    parts = {"_packed": packed, "_scale": scale, "_shape": torch.tensor(weight.shape)}
    if not symmetric:
        parts["_zero_point"] = pack((zero + half).to(torch.uint8).T.contiguous(), torch.int32).T.contiguous()
    return parts


def compressed_tensors(format: str, **weights) -> dict:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": format, "config_groups": groups, "ignore": ["lm_head"]}


@dataclass(frozen=True)
class Case:
    """One format: how it stores a weight, what config.json says, and whether a fused tensor may have it."""

    quantize: Callable[[torch.Tensor], dict[str, torch.Tensor]]
    config: dict = field(default_factory=dict)
    ndims: tuple[int, ...] = (2,)


BLOCK = (32, 16)
_FP8 = {"quant_method": "fp8", "weight_block_size": list(BLOCK)}
_INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
_E8M0 = torch.float8_e8m0fnu

CASES = {
    "fp8 in blocks": Case(lambda w: fp8(w, *BLOCK, end="_scale_inv"), _FP8, (2, 3)),
    "fp8 in blocks, E8M0": Case(lambda w: _e8m0(fp8(w, *BLOCK, end=".scale", e8m0=True)), _FP8),
    "fp8 per row": Case(
        lambda w: fp8(w, 1, w.shape[-1], end="_scale", dtype=torch.bfloat16),
        compressed_tensors("float-quantized", num_bits=8, type="float", strategy="channel"),
        (2, 3),
    ),
    "fp8 per tensor": Case(fp8_tensor, {"quant_method": "fp8"}, (2, 3)),
    "fp8 per tensor, a number": Case(
        lambda w: fp8_tensor(w, ()) | {".input_scale": torch.tensor(0.5)}, {"quant_method": "modelopt"}
    ),
    "int8 per row": Case(int8_rows, compressed_tensors("int-quantized", num_bits=8, type="int", strategy="channel")),
    "mxfp8": Case(
        lambda w: fp8(w, 1, 32, end="_scale_inv", e8m0=True),
        {"quant_method": "mxfp8", "weight_block_size": [1, 32]},
        (2, 3),
    ),
    "mxfp4 of gpt-oss": Case(mxfp4_blocks, {"quant_method": "mxfp4"}, (3,)),
    "fp4 with E8M0": Case(lambda w: mxfp4(w, end=".scale", dtype=torch.int8, e8m0=_E8M0), _FP8),
    "mxfp4 packed": Case(
        lambda w: mxfp4(w, packed="_packed"),
        compressed_tensors("mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32),
    ),
    "int4 packed": Case(integers, compressed_tensors("pack-quantized", symmetric=True, **_INT4)),
    "int4 packed, with zero points": Case(
        lambda w: integers(w, symmetric=False), compressed_tensors("pack-quantized", symmetric=False, **_INT4)
    ),
    "int4 packed, per row": Case(
        lambda w: integers(w, group=None), compressed_tensors("pack-quantized", num_bits=4, type="int", symmetric=True)
    ),
    "int8 packed": Case(
        lambda w: integers(w, bits=8), compressed_tensors("pack-quantized", **{**_INT4, "num_bits": 8})
    ),
    "nvfp4 of modelopt": Case(lambda w: nvfp4(w, compressed_tensors=False), {"quant_method": "modelopt"}),
    "nvfp4 of compressed-tensors": Case(
        lambda w: nvfp4(w, compressed_tensors=True),
        compressed_tensors("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16),
    ),
}


def _e8m0(parts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {end: part.view(_E8M0) if part.dtype == torch.uint8 else part for end, part in parts.items()}


def stored_names(key: str, parts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Name the parts of weight `key`; an end that begins with a dot stands beside `.weight`."""
    return {(key.removesuffix(".weight") if end.startswith(".") else key) + end: part for end, part in parts.items()}
