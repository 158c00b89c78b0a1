"""Run the experts of one layer from composed bases, all tokens at once: three grouped GEMMs behind one op.

For routed row s = (token t, choice k) with expert e = top_k_index[t, k] and x = hidden[t]:

    S1   h_f = basis_f[e] x                                    f in gate, up       (ops/low_rank_in.py)
    S2   y   = act(adapter_gate[e] h_gate + bias_gate[e], adapter_up[e] h_up + bias_up[e])   (ops/gate_up.py)
    S3   out[t] = sum_k top_k_weights[t, k] * (down[e] y + bias_down[e])           (ops/down.py)

Shapes: T tokens, K experts per token, E experts, P intermediate size, D hidden size, R rank; basis (E, 2R, D) with gate
first. `act` joins gate and up (ops/activations.py), for most models act(gate) * up; biases are optional. A choice whose
id names no expert contributes nothing. Deterministic.

Why not one kernel: with one token there are K programs for the whole card, with many the two intermediate tiles fill
the shared memory; three launches read every weight once in both cases.
"""

from typing import Any, NamedTuple

import torch

from globe_kernels.ops.counters import count_call
from globe_kernels.ops.down import Down, down_ref, launch_down
from globe_kernels.ops.gate_up import GatedAdapters, gate_up_ref, launch_gate_up
from globe_kernels.ops.low_rank_in import launch_low_rank_in, low_rank_in_ref
from globe_kernels.ops.moe_ffn_backward import moe_ffn_backward
from globe_kernels.ops.registration import register_op
from globe_kernels.ops.routing import launch_routing_plan, routing_plan_ref
from globe_kernels.ops.triton_import import use_triton
from globe_kernels.ops.tuning import FfnConfig, FfnShape, choose


class FromRank(NamedTuple):
    """The weights of one layer from the rank back to the hidden size, in one dtype on one device."""

    gate_adapter: torch.Tensor  # (E, P, R)
    up_adapter: torch.Tensor  # (E, P, R)
    down_proj: torch.Tensor  # (E, D, P)
    gate_bias: torch.Tensor | None = None  # (E, P), with up_bias or not at all
    up_bias: torch.Tensor | None = None  # (E, P)
    down_bias: torch.Tensor | None = None  # (E, D)

    def contiguous(self) -> "FromRank":
        return FromRank(*(w if w is None else w.contiguous() for w in self))  # pyright: ignore[reportArgumentType]

    @property
    def shape(self) -> FfnShape:
        num_experts, width, inner = self.down_proj.shape
        return FfnShape(num_experts, width, inner, rank=self.gate_adapter.shape[2])

    @property
    def adapters(self) -> GatedAdapters:
        return GatedAdapters(self.gate_adapter, self.up_adapter, self.gate_bias, self.up_bias)

    @property
    def down(self) -> Down:
        return Down(self.down_proj, self.down_bias)


class ExpertWeights(NamedTuple):
    """All weights of the experts of one layer, in one dtype on one device."""

    basis: torch.Tensor  # (E, 2R, D), gate rows first
    from_rank: FromRank

    def to_list(self) -> list[torch.Tensor | None]:
        """Return the tensors in the order in which the op takes them."""
        return [self.basis, *self.from_rank]

    @classmethod
    def from_list(cls, tensors: list[torch.Tensor | None]) -> "ExpertWeights":
        """Undo `to_list`."""
        basis, *from_rank = tensors
        return cls(basis, FromRank(*from_rank))  # pyright: ignore[reportArgumentType]

    def contiguous(self) -> "ExpertWeights":
        return ExpertWeights(self.basis.contiguous(), self.from_rank.contiguous())


def run_moe_ffn(
    hidden: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    weights: list[torch.Tensor | None],
    activation: str,
    deterministic: bool,
) -> torch.Tensor:
    """Run the op: the kernels on a GPU, else the reference."""
    w = ExpertWeights.from_list(weights)
    if not use_triton(hidden):
        count_call("moe_ffn_ref")
        return moe_ffn_ref(hidden, top_k_index, top_k_weights, w, activation)
    count_call("moe_ffn")
    config = choose(w.from_rank.shape, top_k_index.numel(), hidden.element_size(), hidden.device)
    routing = (top_k_index.contiguous(), top_k_weights.contiguous())
    return launch_moe_ffn(hidden.contiguous(), *routing, w.contiguous(), activation, config, deterministic)


def fake_like_hidden(hidden: torch.Tensor, *_: Any) -> torch.Tensor:
    """Return an empty (T, D), the shape of the result of every layer op."""
    return torch.empty_like(hidden, memory_format=torch.contiguous_format)


def differentiate(
    gradient: torch.Tensor,
    hidden: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    weights: list[torch.Tensor | None],
    activation: str,
) -> dict[str, torch.Tensor]:
    """Return the gradients of hidden and top_k_weights, from the gradient of the result."""
    found = moe_ffn_backward(gradient, hidden, top_k_index, top_k_weights, weights, activation)
    return dict(zip(("hidden", "top_k_weights"), found, strict=True))


# (T, D) in the dtype of hidden (T, D): kernels on a GPU, the reference elsewhere. top_k_index and top_k_weights (T, K);
# weights: ExpertWeights.to_list, in the dtype of hidden. globe_kernels.functional checks the shapes.
moe_ffn = register_op(
    "moe_ffn(Tensor hidden, Tensor top_k_index, Tensor top_k_weights, Tensor?[] weights, str activation, "
    "bool deterministic) -> Tensor",
    run_moe_ffn,
    fake_like_hidden,
    differentiate,
)


def launch_moe_ffn(
    hidden: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    w: ExpertWeights,
    activation: str,
    config: FfnConfig,
    deterministic: bool = True,
) -> torch.Tensor:
    """Launch the kernels on contiguous inputs in `config`, without waiting for the device."""
    if hidden.shape[0] == 0:
        return torch.empty_like(hidden)
    plan = launch_routing_plan(top_k_index, w.basis.shape[0], config.block_m)
    h = launch_low_rank_in(hidden, plan, w.basis, config.low_rank_in)
    y = launch_gate_up(h, plan, w.from_rank.adapters, activation, config.gate_up)
    return launch_down(y, plan, w.from_rank.down, (top_k_index, top_k_weights), config.down, deterministic)


def moe_ffn_ref(
    hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, w: ExpertWeights, activation: str
) -> torch.Tensor:
    """Run the references of the three stages, each in one pass over the experts that have rows."""
    plan = routing_plan_ref(top_k_index, w.basis.shape[0], block_m=16)
    h = low_rank_in_ref(hidden, plan, w.basis)
    y = gate_up_ref(h, plan, w.from_rank.adapters, activation)
    return down_ref(y, plan, w.from_rank.down, top_k_weights)
