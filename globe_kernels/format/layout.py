"""The layouts of fused expert weights, in a live module and on disk, beside the layout of GlobeMoEFFN.

Canonical is (E, 2P, D) with the gate rows first, and (E, D, P) of down. Symbols: E experts, P intermediate size,
D hidden size.
"""

from dataclasses import dataclass

import torch

from globe_kernels.format.names import FAMILIES

# The fused weights of an experts module of transformers, and their biases.
GATE_UP, DOWN = "gate_up_proj", "down_proj"
BIASES = {GATE_UP: "gate_up_proj_bias", DOWN: "down_proj_bias"}


@dataclass(frozen=True)
class ExpertsLayout:
    """The layout of fused weights, and whether they come with biases."""

    transposed: bool = False  # the input dimension first: (E, D, 2P) and (E, P, D)
    interleaved: bool = False  # the outputs are g0, u0, g1, u1, ... instead of gate first
    has_bias: bool = False

    def shapes(self, num_experts: int, inner: int, width: int) -> dict[str, tuple[int, ...]]:
        """Return {name: shape} of one layer's fused tensors."""
        shapes: dict[str, tuple[int, ...]] = {
            GATE_UP: (num_experts, 2 * inner, width),
            DOWN: (num_experts, width, inner),
        }
        if self.transposed:
            shapes = {name: (num_experts, columns, rows) for name, (_, rows, columns) in shapes.items()}
        if self.has_bias:
            shapes |= {BIASES[GATE_UP]: (num_experts, 2 * inner), BIASES[DOWN]: (num_experts, width)}
        return shapes

    def canonical(self, weights: torch.Tensor) -> torch.Tensor:
        """View fused weights with the output dimension first: (E, 2P, D) or (E, D, P)."""
        return weights.mT if self.transposed else weights

    def part(self, fused: torch.Tensor, family: str) -> torch.Tensor:
        """View one family of `gate_up_proj`, (E, P, D), or of its bias, (E, P)."""
        rows = self.canonical(fused) if fused.ndim == 3 else fused
        place = FAMILIES.index(family)
        return rows[:, place::2] if self.interleaved else rows.chunk(2, dim=1)[place]

    def kept(self, name: str, fused: torch.Tensor) -> dict[str, torch.Tensor]:
        """View the fused tensor `name`, which is not compressed, as {parameter of GlobeMoEFFN: view}."""
        if name == BIASES[GATE_UP]:
            return {f"{family}_bias": self.part(fused, family) for family in FAMILIES}
        return {"down_bias": fused} if name == BIASES[DOWN] else {DOWN: self.canonical(fused)}
