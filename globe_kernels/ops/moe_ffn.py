"""The experts of one layer from composed bases, all tokens at once.

For routed row s = (token t, choice k) with expert e = top_k_index[t, k] and x = hidden[t]:

    S1   h_f = basis_f[e] x                                    f in gate, up
    S2   y   = act(adapter_gate[e] h_gate) * (adapter_up[e] h_up)
    S3   out[t] = sum_k top_k_weights[t, k] * down[e] y        summed in fp32, in the order of k

Shapes: T tokens, K choices, E experts, P intermediate size, D hidden size, R rank.
A row whose id names no expert contributes nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from globe_kernels.routing import RoutingPlan

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


@dataclass(frozen=True)
class ExpertWeights:
    """The tensors of the experts of one layer."""

    gate_basis: torch.Tensor  # (E, R, D)
    gate_adapter: torch.Tensor  # (E, P, R)
    up_basis: torch.Tensor  # (E, R, D)
    up_adapter: torch.Tensor  # (E, P, R)
    down: torch.Tensor  # (E, D, P)


def moe_ffn_ref(
    hidden: torch.Tensor,  # (T, D)
    plan: RoutingPlan,
    top_k_weights: torch.Tensor,  # (T, K)
    weights: ExpertWeights,
    activation: str,
) -> torch.Tensor:
    """(T, D) in the dtype of `hidden`. One pass over the experts that have rows; deterministic."""
    act = ACTIVATIONS[activation]
    num_tokens, width = hidden.shape
    # fp32: a sum of K bf16 terms of alternating sign loses the low bits
    routed = hidden.new_zeros(num_tokens * plan.num_choices, width, dtype=torch.float32)
    row_weights = top_k_weights.flatten().float()
    starts = plan.starts.tolist()
    for expert, (start, stop) in enumerate(zip(starts[:-1], starts[1:], strict=True)):
        if start == stop:
            continue
        rows = plan.order[start:stop]
        x = hidden[rows // plan.num_choices]
        gate = F.linear(F.linear(x, weights.gate_basis[expert]), weights.gate_adapter[expert])
        up = F.linear(F.linear(x, weights.up_basis[expert]), weights.up_adapter[expert])
        routed[rows] = F.linear(act(gate) * up, weights.down[expert]).float() * row_weights[rows, None]
    return routed.view(num_tokens, plan.num_choices, width).sum(1).to(hidden.dtype)
