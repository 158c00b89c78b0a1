"""Recognise the format of one quantised weight by the dtypes, names and shapes of its stored tensors.

| format | codes | scales |
|---|---|---|
| FP8 or int8, by blocks, rows, tensor | `weight` F8_E4M3 or I8 | float or E8M0, one per block, per row, or one |
| MXFP8 | `weight` F8_E4M3 | E8M0, one per 32 columns |
| MXFP4 of gpt-oss | `*_blocks` U8 (E, 2P, D / 32, 16) | `*_scales` E8M0 (E, 2P, D / 32) |
| FP4 with E8M0 scales | `weight` or `weight_packed` I8 or U8 (P, D / 2) | E8M0 (P, D / 32) |
| NVFP4 | `weight` or `weight_packed` U8 (P, D / 2) | F8_E4M3 (P, D / 16), and one float |
| packed integers | `weight_packed` I32 (P, D / 8) | float (P, D / group) |

E8M0 is a power of two, 2^(code - 127), as F8_E8M0 or U8. A fused FP8 tensor has one more axis, the experts, in front.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from globe_fit.data.quantized.codes import FP4, FP8, INT4, INT8, INT8_PACKED, Packing, fp4_blocks
from globe_fit.data.quantized.weight import Factor, Files, QuantizedWeight
from globe_kernels.errors import GlobeError, RequestError

Shape = tuple[int, ...]

_FLOATS = ("F32", "BF16", "F16")
_E8M0 = ("F8_E8M0", "U8")
_MX_BLOCK, _NV_BLOCK = 32, 16
_INTEGERS = {4: INT4, 8: INT8_PACKED}


@dataclass(frozen=True)
class Stored:
    """The stored tensors of one quantised weight: its codes, its scales, and the others by the end of their name."""

    codes: str
    scales: str
    others: Mapping[str, str]
    files: Files
    config: dict  # quantization_config of config.json; empty when there is none

    def dtype(self, name: str) -> str:
        return self.files.view(name).get_dtype()

    def shape(self, name: str) -> Shape:
        return tuple(self.files.view(name).get_shape())

    @property
    def schemes(self) -> list[dict]:
        """Return the `weights` of the config groups of compressed-tensors."""
        groups = self.config.get("config_groups") or {}
        return [group["weights"] for group in groups.values() if group.get("weights")]

    def configured_blocks(self) -> list[tuple[int, int]]:
        """Return the blocks, (rows, columns), that config.json names."""
        named = [self.config.get("weight_block_size"), *(scheme.get("block_structure") for scheme in self.schemes)]
        groups = [(1, size) for scheme in self.schemes if (size := scheme.get("group_size") or 0) > 0]
        return [(block[0], block[1]) for block in named if block] + groups

    def require(self, ending: str) -> str:
        """Return the tensor whose name ends with `ending`. Raises GlobeError when the checkpoint lacks it."""
        if ending not in self.others:
            raise GlobeError(
                f"{self.codes} has scales of {self.dtype(self.scales)} and no tensor *{ending} beside them; the "
                "checkpoint is incomplete, download it again."
            )
        return self.others[ending]

    def make(
        self,
        packing: Packing,
        shape: Shape,
        blocks: Shape,
        *,
        factor: Factor | None = None,
        zeros: str | None = None,
        transposed: bool = False,
    ) -> QuantizedWeight:
        used = {zeros, factor.name if factor else None}
        return QuantizedWeight(
            codes=self.codes,
            scales=self.scales,
            packing=packing,
            shape=shape,
            blocks=blocks,
            dtype=torch.float16 if self.dtype(self.scales) == "F16" else torch.bfloat16,
            factor=factor,
            zeros=zeros,
            others=tuple(name for name in self.others.values() if name not in used),
            transposed=transposed,
        )

    def require_scales(self, shape: Shape, block: int) -> Shape:
        """Return the blocks of scales for each row and `block` columns. Raises GlobeError for other scales."""
        expected = (*shape[:-1], shape[-1] // block)
        if shape[-1] % block or self.shape(self.scales) != expected:
            raise self.unfit(shape, f"one for each {block} columns of a row, {expected}")
        return (*(1 for _ in shape[:-1]), block)

    def require_zeros(self, packing: Packing) -> str:
        """Return the tensor of zero points, which are packed along the rows. Raises GlobeError for other tensors."""
        name, (*leading, rows, columns) = self.require("_zero_point"), self.shape(self.scales)
        expected = (*leading, -(-rows // packing.values), columns)
        if leading or self.dtype(name) != "I32" or self.shape(name) != expected:
            raise GlobeError(
                f"{name} is {self.dtype(name)} of shape {self.shape(name)} and {self.scales} is "
                f"{self.shape(self.scales)}, whose zero points are I32 of shape {expected} in a matrix; download it "
                "again."
            )
        return name

    def unfit(self, shape: Shape, expected: str) -> GlobeError:
        return GlobeError(
            f"{self.scales} is {self.shape(self.scales)} and {self.codes} holds {shape} values, whose scales are "
            f"expected as {expected}; the checkpoint is damaged or its config.json is of another, download it again."
        )


def _plain(stored: Stored) -> QuantizedWeight | None:
    """Read codes that are numbers, FP8 or int8, with a scale per block, per row or per tensor."""
    codes, scales = stored.dtype(stored.codes), stored.dtype(stored.scales)
    if not (codes == "F8_E4M3" and scales in (*_FLOATS, *_E8M0)) and not (codes == "I8" and scales in _FLOATS):
        return None
    shape, grid = stored.shape(stored.codes), stored.shape(stored.scales)
    grid = (*grid, *(1 for _ in shape[len(grid) :]))
    configured = stored.configured_blocks()
    candidates = [*configured, (1, shape[-1]), shape[-2:], *([(1, _MX_BLOCK)] if scales in _E8M0 else [])]
    blocks = _blocks(shape, grid, candidates if configured else [*candidates, _even_block(shape, grid)])
    if blocks is None:
        said = " or ".join(map(str, configured)) or "a size that config.json lacks (weight_block_size)"
        raise stored.unfit(shape, f"one in all, one per row, or one per block of {said}")
    return stored.make(FP8 if codes == "F8_E4M3" else INT8, shape, blocks)


def _blocks(shape: Shape, grid: Shape, candidates: Iterable[Shape]) -> Shape | None:
    """Return how many values along each axis share a scale, by the first candidate (rows, columns) that fits."""
    if len(grid) != len(shape) or len(shape) < 2:
        return None
    leading = [1 if scales == size else size for size, scales in zip(shape[:-2], grid, strict=False)]
    fitting = ((*leading, *block) for block in candidates if all(block))
    return next((b for b in fitting if all(-(-n // m) == k for n, m, k in zip(shape, b, grid, strict=True))), None)


def _even_block(shape: Shape, grid: Shape) -> Shape:
    """Return the block that the grid alone says, where it divides the axes into powers of two; else zeros.

    Two scales of 192 rows may be of 96 rows each, or of 128 and 64.
    """
    sizes = tuple(n // k if k and n % k == 0 else 0 for n, k in zip(shape[-2:], grid[-2:], strict=False))
    return sizes if all(size & (size - 1) == 0 for size in sizes) else (0, 0)


def _mxfp4(stored: Stored) -> QuantizedWeight | None:
    """Read FP4 with a power of two for each 32 values; fused `*_blocks` are of a model with the columns first."""
    if stored.dtype(stored.codes) not in ("U8", "I8") or stored.dtype(stored.scales) not in _E8M0:
        return None
    if fused := stored.codes.endswith("_blocks"):
        *leading, blocks, item = stored.shape(stored.codes)
        packing, shape = fp4_blocks(2 * item), (*leading, 2 * item * blocks)
    else:
        *leading, columns = stored.shape(stored.codes)
        packing, shape = FP4, (*leading, 2 * columns)
    return stored.make(packing, shape, stored.require_scales(shape, _MX_BLOCK), transposed=fused)


def _nvfp4(stored: Stored) -> QuantizedWeight | None:
    """Read FP4 with an FP8 scale for each 16 values, and one float: ModelOpt multiplies, compressed-tensors divides."""
    if stored.dtype(stored.codes) != "U8" or stored.dtype(stored.scales) != "F8_E4M3":
        return None
    divides = stored.codes.endswith("_packed")
    factor = Factor(stored.require("_global_scale" if divides else "_scale_2"), divides)
    if stored.dtype(factor.name) not in _FLOATS or math.prod(stored.shape(factor.name)) != 1:
        raise GlobeError(
            f"{factor.name} is {stored.dtype(factor.name)} of shape {stored.shape(factor.name)} and must be one float; "
            "download the checkpoint again."
        )
    *leading, columns = stored.shape(stored.codes)
    shape = (*leading, 2 * columns)
    return stored.make(FP4, shape, stored.require_scales(shape, _NV_BLOCK), factor=factor)


def _packed_integers(stored: Stored) -> QuantizedWeight | None:
    """Read integers of 4 or 8 bits, as config.json says, with a scale and perhaps a zero point per row or group."""
    if stored.dtype(stored.codes) != "I32" or stored.dtype(stored.scales) not in _FLOATS:
        return None
    *leading, items = stored.shape(stored.codes)
    for scheme in stored.schemes:
        bits = scheme.get("num_bits")
        if not isinstance(bits, int) or bits not in _INTEGERS or scheme.get("type", "int") != "int":
            continue
        packing = _INTEGERS[bits]
        shape = (*leading, packing.values * items)
        group = max(scheme.get("group_size") or 0, 0) or shape[-1]
        if stored.shape(stored.scales) == (*leading, shape[-1] // group) and shape[-1] % group == 0:
            zeros = None if scheme.get("symmetric", True) else stored.require_zeros(packing)
            return stored.make(packing, shape, (*(1 for _ in leading), group), zeros=zeros)
    raise RequestError(
        f"{stored.codes} holds packed integers and {stored.scales} is {stored.shape(stored.scales)}, which fits no "
        "config group of config.json: GloBE reads int4 and int8 with a scale per row or group of columns; give the "
        "unquantised model."
    )


FORMATS: tuple[Callable[[Stored], QuantizedWeight | None], ...] = (_plain, _mxfp4, _nvfp4, _packed_integers)
