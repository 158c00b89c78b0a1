"""Build the implementations of one MoE layer that stand against each other, on the same weights and inputs."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from shapes import LayerShape

from globe_kernels.functional import moe_ffn, moe_ffn_bank_first
from globe_kernels.ops.compose_layer import LayerCode, layer_code
from globe_kernels.ops.down import launch_down
from globe_kernels.ops.gate_up import GatedAdapters, launch_gate_up
from globe_kernels.ops.moe_ffn import ExpertWeights, FromRank
from globe_kernels.ops.moe_ffn_bank_first import BankFirstWeights
from globe_kernels.ops.routing import launch_routing_plan
from globe_kernels.ops.tuning import FfnShape, choose

SUPPORT = 12  # atoms of one expert


@dataclass
class Layer:
    """Factors of random experts and the dense matrices that they stand for, in one dtype on one device."""

    shape: LayerShape
    factors: BankFirstWeights  # the truth: what follows is rounded from it
    weights: ExpertWeights
    gate_up: torch.Tensor  # (E, 2P, D)

    @property
    def palette(self) -> int:
        """U, of the family that has more."""
        return max(self.factors.gate_palette.numel(), self.factors.up_palette.numel())


def random_layer(shape: LayerShape, rank: int, dtype: torch.dtype, device: str, palette: int | None = None) -> Layer:
    """Random factors with outputs of order one; never zeros, which some hardware multiplies faster.

    The layer uses `palette` atoms in each family: those of a bank of a quarter as many atoms as experts by default.
    """
    atoms = palette or max(SUPPORT, shape.experts // 4)

    def draw(*sizes: int) -> torch.Tensor:
        return (torch.randn(*sizes, device=device) / sizes[-1] ** 0.5).to(dtype)

    def codes() -> LayerCode:
        support = min(SUPPORT, atoms)
        index = torch.rand(shape.experts, atoms, device=device).topk(support).indices.int()
        return layer_code(index, torch.randn(shape.experts, support, device=device) / support**0.5)

    banks = (draw(atoms, rank, shape.hidden), draw(atoms, rank, shape.hidden))
    adapters = (draw(shape.experts, shape.intermediate, rank), draw(shape.experts, shape.intermediate, rank))
    from_rank = FromRank(*adapters, draw(shape.experts, shape.hidden, shape.intermediate))
    factors = BankFirstWeights(*banks, *codes(), *codes(), from_rank)
    basis = torch.empty(shape.experts, 2 * rank, shape.hidden, dtype=dtype, device=device)
    gate_up = torch.empty(shape.experts, 2 * shape.intermediate, shape.hidden, dtype=dtype, device=device)
    for expert in range(shape.experts):
        exact = _bases(factors, expert, torch.float32)
        basis[expert] = torch.cat(exact)
        gate_up[expert] = torch.cat([a[expert].float() @ b for a, b in zip(adapters, exact, strict=True)])
    return Layer(shape, factors, ExpertWeights(basis, from_rank), gate_up)


def _bases(w: BankFirstWeights, expert: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Compose (R, D) of gate and of up of one expert in `dtype`."""

    def compose(bank: torch.Tensor, palette: torch.Tensor, value: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        own = value[expert].nonzero().squeeze(1)
        code = value[expert, own].to(dtype) * scale[expert].to(dtype)
        return torch.tensordot(code, bank[palette[own]].to(dtype), 1)

    return (
        compose(w.gate_bank, w.gate_palette, w.gate_value, w.gate_scale),
        compose(w.up_bank, w.up_palette, w.up_value, w.up_scale),
    )


@dataclass
class Inputs:
    """One batch of tokens with its routing."""

    hidden: torch.Tensor  # (T, D)
    index: torch.Tensor  # (T, K)
    weights: torch.Tensor  # (T, K)

    @property
    def active_experts(self) -> int:
        return int(self.index.unique().numel())


def random_inputs(shape: LayerShape, tokens: int, dtype: torch.dtype, device: str) -> Inputs:
    """Uniform routing of distinct experts, weights that sum to one."""
    scores = torch.randn(tokens, shape.experts, device=device)
    weights, index = scores.softmax(-1).topk(shape.choices)
    hidden = torch.randn(tokens, shape.hidden, device=device).to(dtype)
    return Inputs(hidden, index, (weights / weights.sum(-1, keepdim=True)).to(dtype))


Provider = Callable[[Inputs], torch.Tensor]


def globe(layer: Layer) -> Provider:
    """GloBE, strategy `composed`."""
    return lambda i: moe_ffn(i.hidden, i.index, i.weights, layer.weights, "silu")


def globe_atomic(layer: Layer) -> Provider:
    """Build `globe` with sums by atomics over the experts of a token: is the deterministic sum worth its cost?"""
    return lambda i: moe_ffn(i.hidden, i.index, i.weights, layer.weights, "silu", deterministic=False)


def globe_bank_first(layer: Layer) -> Provider:
    """GloBE, strategy `bank_first`."""
    return lambda i: moe_ffn_bank_first(i.hidden, i.index, i.weights, layer.factors, "silu")


def dense_twin(layer: Layer) -> Provider:
    """GloBE's own kernels on dense weights: isolates what the low rank gives from what the kernels give."""
    inner, width, count = layer.shape.intermediate, layer.shape.hidden, layer.shape.experts
    dense = GatedAdapters(layer.gate_up[:, :inner].contiguous(), layer.gate_up[:, inner:].contiguous())
    shape = FfnShape(count, width, inner, rank=inner)

    def run(i: Inputs) -> torch.Tensor:
        config = choose(shape, i.index.numel(), i.hidden.element_size(), i.hidden.device, "dense_twin")
        plan = launch_routing_plan(i.index, count, config.block_m)
        y = launch_gate_up(i.hidden, plan, dense, "silu", config.gate_up, gather=plan.top_k)
        return launch_down(y, plan, layer.weights.from_rank.down, (i.index, i.weights), config.down)

    return run


def transformers_experts(implementation: str) -> Callable[[Layer], Provider]:
    """Build the experts module of transformers (Qwen3-MoE) on dense weights."""

    def build(layer: Layer) -> Provider:
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

        config = Qwen3MoeConfig(
            hidden_size=layer.shape.hidden,
            moe_intermediate_size=layer.shape.intermediate,
            num_experts=layer.shape.experts,
            num_experts_per_tok=layer.shape.choices,
        )
        config._experts_implementation = implementation
        with torch.device("meta"):
            experts = Qwen3MoeExperts(config)
        experts.gate_up_proj = torch.nn.Parameter(layer.gate_up, requires_grad=False)
        experts.down_proj = torch.nn.Parameter(layer.weights.from_rank.down_proj, requires_grad=False)
        return lambda i: experts(i.hidden, i.index, i.weights)

    return build


def liger(layer: Layer) -> Provider:
    """Build the fused MoE kernels of liger-kernel on dense weights; they tune themselves in their first call."""
    from liger_kernel.ops import LigerFusedMoEFunction  # pyright: ignore[reportMissingImports]

    return lambda i: LigerFusedMoEFunction.apply(
        i.hidden, layer.gate_up, layer.weights.from_rank.down_proj, i.index.int(), i.weights
    )


def reference(layer: Layer, i: Inputs) -> torch.Tensor:
    """fp64, expert by expert, from the factors."""
    w, own = layer.factors, layer.factors.from_rank
    out = torch.zeros(i.hidden.shape, dtype=torch.float64, device=i.hidden.device)
    for expert in i.index.unique().tolist():
        token, choice = torch.where(i.index == expert)
        x = i.hidden[token].double()
        gate_basis, up_basis = _bases(w, expert, torch.float64)
        gate = F.linear(F.linear(x, gate_basis), own.gate_adapter[expert].double())
        up = F.linear(F.linear(x, up_basis), own.up_adapter[expert].double())
        y = F.linear(F.silu(gate) * up, own.down_proj[expert].double())
        out.index_add_(0, token, y * i.weights[token, choice, None].double())
    return out


@dataclass(frozen=True)
class ProviderSpec:
    """The builder of a provider, and the devices that it runs on."""

    build: Callable[[Layer], Provider]
    low_rank: bool = False  # multiplies with the factors, not with dense gate and up
    composed: bool = True  # of the low rank: with the bases, not with the atoms
    cpu: bool = True
    package: str | None = None  # that it needs beyond those of the project

    def runs(self, device: str) -> bool:
        return (self.cpu or device == "cuda") and (self.package is None or find_spec(self.package) is not None)


PROVIDERS = {
    "globe": ProviderSpec(globe, low_rank=True),
    "globe_atomic": ProviderSpec(globe_atomic, low_rank=True, cpu=False),
    "globe_bank_first": ProviderSpec(globe_bank_first, low_rank=True, composed=False),
    "dense_twin": ProviderSpec(dense_twin, cpu=False),
    "hf_eager": ProviderSpec(transformers_experts("eager")),
    "hf_grouped_mm": ProviderSpec(transformers_experts("grouped_mm")),
    "hf_batched_mm": ProviderSpec(transformers_experts("batched_mm")),
    "liger": ProviderSpec(liger, cpu=False, package="liger_kernel"),
}
# gathers the weights of every routed row: more than this many rows would not fit
BATCHED_ROWS = 512
