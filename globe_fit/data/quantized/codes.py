"""Decode the codes of quantised weights to float32.

A format packs several values into one stored item: two FP4 codes into a byte, eight int4 codes into an int32. The first
value is in the lowest bits.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

# E2M1: a sign, two bits of exponent, one bit of mantissa
_FP4_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
FP4_VALUES = (*_FP4_MAGNITUDES, *(-value for value in _FP4_MAGNITUDES))
INT4_VALUES = tuple(float(code - 8) for code in range(16))


@dataclass(frozen=True)
class Packing:
    """The number of values in an item of the last axis, and the function that unpacks (.., items) to (.., values)."""

    values: int
    unpack: Callable[[torch.Tensor], torch.Tensor]


@lru_cache
def _pairs(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """Return (256,) int64: for each byte two float32, of its low and of its high four bits."""
    high, low = torch.meshgrid(torch.tensor(values), torch.tensor(values), indexing="ij")
    return torch.stack((low, high), -1).flatten(0, 1).view(torch.int64).flatten().to(device)


def _from_nibbles(codes: torch.Tensor, values: tuple[float, ...]) -> torch.Tensor:
    # one look-up per byte, of both values at once
    pairs = _pairs(values, codes.device).index_select(0, _bytes(codes).int())
    return pairs.view(torch.float32).view(*codes.shape[:-1], -1)


def _bytes(codes: torch.Tensor) -> torch.Tensor:
    # a copy, because a slice of a single item keeps the strides of the file, which contiguous() takes as they are
    return codes.clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8)


def _from_fp8(codes: torch.Tensor) -> torch.Tensor:
    if codes.is_cuda:
        return codes.float()
    # a CPU converts value by value, which takes five times as long as a table
    table = torch.arange(256, dtype=torch.uint8).view(codes.dtype).float()
    return table.index_select(0, _bytes(codes).int()).view(codes.shape)


FP8 = Packing(1, _from_fp8)
INT8 = Packing(1, lambda codes: codes.float())
FP4 = Packing(2, lambda codes: _from_nibbles(codes, FP4_VALUES))
# int32 is little-endian on every platform of torch with safetensors, so the order of the bytes is the order of values
INT4 = Packing(8, lambda codes: _from_nibbles(codes, INT4_VALUES))
INT8_PACKED = Packing(4, lambda codes: (_bytes(codes).float() - 128).view(*codes.shape[:-1], -1))


def fp4_blocks(block: int) -> Packing:
    """Pack FP4 as (.., blocks, bytes of a block): an item is a block."""
    return Packing(block, lambda codes: _from_nibbles(codes.flatten(-2), FP4_VALUES))
