"""Make experts of any size when they are read: planted shared structure and noise, nothing stored.

    W_i = A_i sum_j alpha_ij B_j + NOISE N_i

A_i (P, R) and N_i (P, D) are Gaussian, drawn again at each reading from a seed per expert; B_j are the atoms of a
planted bank, held in bf16 while its family is read; alpha_i has `support` Gaussian codes. A_i and alpha_i are scaled so
that the structured part has entries of RMS 1: NOISE^2 / (1 + NOISE^2) of the energy does not have the planted form. The
experts are rounded to bf16, as in a checkpoint.
"""

import torch
from shapes import MODELS, LayerShape

from globe_fit import ExpertSource
from globe_fit.data.source import ExpertLayer
from globe_kernels.format.checkpoint import BaseModel
from globe_kernels.format.names import FAMILIES

# {name: its layers and their shape}
SIZES = {"qwen3-30b": (48, MODELS["qwen3-30b-a3b"])}
NOISE = 0.3


class SyntheticSource(ExpertSource):
    """A source of a fit without a checkpoint; the experts are made on `device`."""

    def __init__(self, name: str, layers: int, shape: LayerShape, *, rank: int, atoms: int, support: int, device: str):
        self.base = BaseModel(
            name, "synthetic", shape.hidden, shape.intermediate, dict.fromkeys(range(layers), shape.experts)
        )
        self.layers = [ExpertLayer(layer, shape.experts, {}) for layer in range(layers)]
        self._device, self._support = device, support
        self._bank = torch.empty(atoms, rank, shape.hidden, dtype=torch.bfloat16, device=device)
        self._family = ""  # of the bank

    def read(
        self,
        layer: ExpertLayer,
        family: str,
        experts: range | None = None,
        columns: slice | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        experts = range(layer.num_experts) if experts is None else experts
        inner, width = self.base.intermediate_size, self.base.hidden_size
        bank, rank = self._bank_of(family), self._bank.shape[1]
        made = torch.empty(len(experts), inner, width, device=self._device)
        for number, expert in enumerate(experts):
            seed = (layer.layer * layer.num_experts + expert) * len(FAMILIES) + FAMILIES.index(family)
            generator = torch.Generator(self._device).manual_seed(1 + seed)
            chosen = torch.randperm(len(bank), generator=generator, device=self._device)[: self._support]
            codes = torch.randn(self._support, generator=generator, device=self._device) / self._support**0.5
            adapter = torch.randn(inner, rank, generator=generator, device=self._device) / rank**0.5
            mixture = (codes @ bank[chosen].float().flatten(1)).view(rank, width)
            noise = torch.randn(inner, width, generator=generator, device=self._device)
            made[number] = (adapter @ mixture + NOISE * noise).bfloat16()
        made = made if columns is None else made[..., columns].contiguous()
        return made if out is None else out.copy_(made)

    def stored_dtype(self, layer: ExpertLayer, family: str) -> torch.dtype:
        return torch.bfloat16

    def is_quantized(self, layer: ExpertLayer, family: str) -> bool:
        return False

    def _bank_of(self, family: str) -> torch.Tensor:
        if family != self._family:
            self._bank.normal_(generator=torch.Generator(self._device).manual_seed(FAMILIES.index(family)))
            self._family = family
        return self._bank

    def require_finite(self, layer: ExpertLayer, family: str, experts: range, weights: torch.Tensor) -> None:
        """Accept all weights, which are made here."""
