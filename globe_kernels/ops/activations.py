# pyright: reportInvalidTypeForm=false
"""Join gate and up of an expert by its activation, for torch and inside kernels.

y = act(gate) * up                                           under the names of transformers
y = g sigmoid(1.702 g) (u + 1),  g = min(gate, 7),  u = clamp(up, -7, 7)     "clamped_swiglu", of GPT-OSS
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from globe_kernels.ops.triton_import import tl, triton

# Of "clamped_swiglu": the sharpness of its sigmoid, and the clamp.
SWIGLU_ALPHA = 1.702
SWIGLU_LIMIT = 7.0


def _clamped_swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    gate, up = gate.clamp(max=SWIGLU_LIMIT), up.clamp(-SWIGLU_LIMIT, SWIGLU_LIMIT)
    return gate * torch.sigmoid(SWIGLU_ALPHA * gate) * (up + 1)


GATED_ACTIVATIONS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "silu": lambda gate, up: F.silu(gate) * up,
    "swish": lambda gate, up: F.silu(gate) * up,
    "gelu": lambda gate, up: F.gelu(gate) * up,
    "gelu_pytorch_tanh": lambda gate, up: F.gelu(gate, approximate="tanh") * up,
    "relu": lambda gate, up: F.relu(gate) * up,
    "clamped_swiglu": _clamped_swiglu,
}

# The settings of an activation that a model's configuration must have, where it names any.
ACTIVATION_SETTINGS = {"clamped_swiglu": {"swiglu_alpha": SWIGLU_ALPHA, "swiglu_limit": SWIGLU_LIMIT}}


@triton.jit
def apply_gated(gate, up, ACTIVATION: tl.constexpr):
    """Apply the activation of that name to two float32 blocks."""
    if ACTIVATION == "silu" or ACTIVATION == "swish":
        y = gate * tl.sigmoid(gate) * up
    elif ACTIVATION == "gelu":
        y = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)) * up
    elif ACTIVATION == "gelu_pytorch_tanh":
        # tanh(u) = 2 sigmoid(2u) - 1, which saturates without overflow
        y = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)) * up
    elif ACTIVATION == "relu":
        y = tl.maximum(gate, 0.0) * up
    else:
        tl.static_assert(ACTIVATION == "clamped_swiglu", "an activation without kernel")
        g = tl.minimum(gate, 7.0)
        y = g * tl.sigmoid(1.702 * g) * (tl.clamp(up, -7.0, 7.0) + 1.0)
    return y
