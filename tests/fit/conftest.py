from dataclasses import dataclass, field

import pytest
import torch

from globe_fit.data.source import ExpertLayer, ExpertSource
from globe_fit.data.stream import FamilyWeights
from globe_kernels.format.checkpoint import BaseModel


@dataclass
class MemorySource:
    """Stands in for ExpertSource where a test plants the weights; {layer id: (E, P, D)}, the same for each family."""

    weights: dict[int, torch.Tensor]
    base: BaseModel = field(init=False)

    def __post_init__(self):
        _, inner, width = next(iter(self.weights.values())).shape
        self.layers = [ExpertLayer(layer, len(w), {}) for layer, w in self.weights.items()]
        self.base = BaseModel(
            "planted", "qwen3_moe", width, inner, {layer: len(w) for layer, w in self.weights.items()}
        )

    layer_spans = ExpertSource.layer_spans

    def read(self, layer, family: str, experts: range | None = None, columns: slice = slice(None)) -> torch.Tensor:
        experts = range(layer.num_experts) if experts is None else experts
        return self.weights[layer.layer][experts.start : experts.stop, :, columns].clone()

    def require_finite(self, *_):
        pass


@dataclass
class Planted:
    """Weights that a bank of `bank` with `codes` represents exactly."""

    source: MemorySource
    bank: torch.Tensor
    codes: torch.Tensor

    def family(self) -> FamilyWeights:
        return FamilyWeights.measure(self.source, "gate", "cpu")


@pytest.fixture
def planted() -> Planted:
    """12 experts of 6 x 16 in 3 layers, from 5 atoms of rank 6, two per expert."""
    generator = torch.Generator().manual_seed(0)
    bank = torch.randn(5, 6, 16, generator=generator)
    codes = torch.zeros(12, 5)
    for expert in range(12):
        chosen = torch.randperm(5, generator=generator)[:2]
        codes[expert, chosen] = torch.rand(2, generator=generator) + 0.5
    basis = torch.einsum("nm,mrd->nrd", codes, bank)
    weights = torch.randn(12, 6, 6, generator=generator) @ basis
    # zero mean, so that the normalised weights are planted as well: the mean lies outside the row spaces
    source = MemorySource({layer: weights[4 * layer : 4 * layer + 4] for layer in range(3)})
    return Planted(source, bank, codes)


@pytest.fixture
def noise() -> MemorySource:
    """Two layers of 6 and 4 experts of 5 x 12 without structure."""
    generator = torch.Generator().manual_seed(1)
    return MemorySource({0: torch.randn(6, 5, 12, generator=generator), 3: torch.randn(4, 5, 12, generator=generator)})
