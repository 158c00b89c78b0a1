"""Round every gate and up matrix to codes of few bits, to the nearest value that a code has.

A group is a piece of a row, of G columns. Its codes q stand for the values s (q - z):

    symmetric, a group is the whole row      s = max |w| / (2^(bits - 1) - 1)             z = 0
    asymmetric, groups along the input       s = (max(w, 0) - min(w, 0)) / (2^bits - 1)   z = round(-min(w, 0) / s)

s is stored in fp16, z in as many bits as a code. Where G does not divide the width, the last group of a row is shorter.
"""

from dataclasses import dataclass

import torch

from globe_kernels.format.checkpoint import BaseModel
from globe_kernels.format.names import FAMILIES

_SCALE = torch.float16
_LEAST_SCALE = 2.0**-24  # of fp16


@dataclass(frozen=True)
class CodeFormat:
    """Codes of `bits` bits with a scale and a zero point per `group` columns; without `group` a scale per row."""

    bits: int
    group: int | None = None

    def split(self, weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """View weights (..., D) as their groups (..., G)."""
        return weights.split(self.group or weights.shape[-1], dim=-1)

    def grid(self, group: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the scale and the zero point (..., 1), float32, of the weights (..., G) of a group."""
        if self.group is None:
            scale = _stored(group.abs().amax(-1, keepdim=True) / (2 ** (self.bits - 1) - 1))
            return scale, torch.zeros_like(scale)
        low, high = group.amin(-1, keepdim=True).clamp(max=0), group.amax(-1, keepdim=True).clamp(min=0)
        scale = _stored((high - low) / (2**self.bits - 1))
        return scale, (-low / scale).round().clamp(0, 2**self.bits - 1)

    def nearest(self, weights: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """Return the value of the code nearest to each weight."""
        half = 2 ** (self.bits - 1) - 1
        low, high = (-half, half) if self.group is None else (0, 2**self.bits - 1)
        return ((weights / scale).round().add_(zero).clamp_(low, high).sub_(zero)).mul_(scale)

    def num_bytes(self, rows: int, width: int) -> int:
        """Count the bytes of codes, scales and zero points of `rows` rows of `width` columns."""
        scale = torch.finfo(_SCALE).bits
        if self.group is None:
            return -(-rows * (width * self.bits + scale) // 8)
        groups = -(-width // self.group)
        return -(-rows * (width * self.bits + groups * (scale + self.bits)) // 8)

    def bytes_of(self, base: BaseModel) -> int:
        """Count the bytes of all gate and up experts of a model."""
        return len(FAMILIES) * base.total_experts * self.num_bytes(base.intermediate_size, base.hidden_size)


def _stored(scale: torch.Tensor) -> torch.Tensor:
    return scale.clamp(_LEAST_SCALE, torch.finfo(_SCALE).max).to(_SCALE).float()


# As weights are rounded in practice: the fewer bits, the smaller the groups.
FORMATS = {
    "int8": CodeFormat(8),
    "int4_g128": CodeFormat(4, 128),
    "int4_g32": CodeFormat(4, 32),
    "int3_g64": CodeFormat(3, 64),
    "int2_g32": CodeFormat(2, 32),
}


def rounded(weights: torch.Tensor, codes: CodeFormat) -> torch.Tensor:
    """Return the values (..., D) float32 of the codes nearest to weights (..., D)."""
    return torch.cat([codes.nearest(group, *codes.grid(group)) for group in codes.split(weights.float())], dim=-1)
