"""The implementations of one MoE layer that stand against each other, on the same weights and inputs."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from shapes import LayerShape

from globe_kernels.functional import moe_ffn
from globe_kernels.ops.down import Down, launch_down
from globe_kernels.ops.gate_up import _gate_up_kernel
from globe_kernels.ops.moe_ffn import ExpertWeights
from globe_kernels.ops.routing_plan import launch_routing_plan
from globe_kernels.ops.triton_import import triton
from globe_kernels.ops.tuning import FfnShape, GemmConfig, choose
from globe_kernels.routing import RoutingPlan


@dataclass
class Layer:
    """Factors of random experts and the dense matrices that they stand for, in one dtype on one device."""

    shape: LayerShape
    weights: ExpertWeights
    gate_up: torch.Tensor  # (E, 2P, D)


def random_layer(shape: LayerShape, rank: int, dtype: torch.dtype, device: str) -> Layer:
    """Random factors with outputs of order one; never zeros, which some hardware multiplies faster."""

    def draw(*sizes: int) -> torch.Tensor:
        return (torch.randn(*sizes, device=device) / sizes[-1] ** 0.5).to(dtype)

    basis = draw(shape.experts, 2 * rank, shape.hidden)
    gate_adapter = draw(shape.experts, shape.intermediate, rank)
    up_adapter = draw(shape.experts, shape.intermediate, rank)
    gate_up = torch.cat([gate_adapter @ basis[:, :rank], up_adapter @ basis[:, rank:]], dim=1)
    down = draw(shape.experts, shape.hidden, shape.intermediate)
    return Layer(shape, ExpertWeights(basis, gate_adapter, up_adapter, down), gate_up)


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
    """As `globe`, with the choices of a token summed by atomics: is the deterministic sum worth what it costs?"""
    return lambda i: moe_ffn(i.hidden, i.index, i.weights, layer.weights, "silu", deterministic=False)


def launch_dense_gate_up(
    hidden: torch.Tensor, plan: RoutingPlan, gate: torch.Tensor, up: torch.Tensor, config: GemmConfig
) -> torch.Tensor:
    """S2 of GloBE on dense gate and up (E, P, D), which gathers the rows that S1 would."""
    _, inner, width = gate.shape
    out = hidden.new_empty(plan.num_rows, inner)
    _gate_up_kernel[(plan.num_tiles * triton.cdiv(inner, config.block_n),)](
        hidden,
        hidden,
        gate,
        up,
        None,
        None,
        out,
        *plan.schedule,
        inner,
        width,
        width,
        plan.num_choices,
        GATHER=True,
        ACTIVATION="silu",
        EVEN_K=width % config.block_k == 0,
        BLOCK_M=plan.block_m,
        **config.launch(),
    )
    return out


def dense_twin(layer: Layer) -> Provider:
    """GloBE's own kernels on dense weights: isolates what the low rank gives from what the kernels give."""
    inner, width, count = layer.shape.intermediate, layer.shape.hidden, layer.shape.experts
    gate, up = layer.gate_up[:, :inner].contiguous(), layer.gate_up[:, inner:].contiguous()
    shape = FfnShape(count, width, inner, rank=inner)

    def run(i: Inputs) -> torch.Tensor:
        config = choose(shape, i.index.numel(), i.hidden.element_size(), i.hidden.device, "dense_twin")
        plan = launch_routing_plan(i.index, count, config.block_m)
        y = launch_dense_gate_up(i.hidden, plan, gate, up, config.gate_up)
        return launch_down(y, plan, Down(layer.weights.down_proj), (i.index, i.weights), config.down)

    return run


def transformers_experts(implementation: str) -> Callable[[Layer], Provider]:
    """The experts module of transformers (Qwen3-MoE) on dense weights."""

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
        experts.down_proj = torch.nn.Parameter(layer.weights.down_proj, requires_grad=False)
        return lambda i: experts(i.hidden, i.index, i.weights)

    return build


def liger(layer: Layer) -> Provider:
    """The fused MoE kernels of liger-kernel on dense weights; they tune themselves in their first call."""
    from liger_kernel.ops import LigerFusedMoEFunction  # pyright: ignore[reportMissingImports]

    return lambda i: LigerFusedMoEFunction.apply(
        i.hidden, layer.gate_up, layer.weights.down_proj, i.index.int(), i.weights
    )


def reference(layer: Layer, i: Inputs) -> torch.Tensor:
    """fp64, expert by expert, from the factors."""
    w, rank = layer.weights, layer.weights.gate_adapter.shape[2]
    out = torch.zeros(i.hidden.shape, dtype=torch.float64, device=i.hidden.device)
    for expert in i.index.unique().tolist():
        token, choice = torch.where(i.index == expert)
        x = i.hidden[token].double()
        gate = F.linear(F.linear(x, w.basis[expert, :rank].double()), w.gate_adapter[expert].double())
        up = F.linear(F.linear(x, w.basis[expert, rank:].double()), w.up_adapter[expert].double())
        y = F.linear(F.silu(gate) * up, w.down_proj[expert].double())
        out.index_add_(0, token, y * i.weights[token, choice, None].double())
    return out


@dataclass(frozen=True)
class ProviderSpec:
    """How a provider is built, and where it can run."""

    build: Callable[[Layer], Provider]
    low_rank: bool = False  # multiplies with the factors, not with dense gate and up
    cpu: bool = True
    package: str | None = None  # that it needs beyond those of the project

    def runs(self, device: str) -> bool:
        return (self.cpu or device == "cuda") and (self.package is None or find_spec(self.package) is not None)


PROVIDERS = {
    "globe": ProviderSpec(globe, low_rank=True),
    "globe_atomic": ProviderSpec(globe_atomic, low_rank=True, cpu=False),
    "dense_twin": ProviderSpec(dense_twin, cpu=False),
    "hf_eager": ProviderSpec(transformers_experts("eager")),
    "hf_grouped_mm": ProviderSpec(transformers_experts("grouped_mm")),
    "hf_batched_mm": ProviderSpec(transformers_experts("batched_mm")),
    "liger": ProviderSpec(liger, cpu=False, package="liger_kernel"),
}
# gathers the weights of every routed row: more than this many rows would not fit
BATCHED_ROWS = 512
