# pyright: reportInvalidTypeForm=false
"""The activations of gated experts, for torch and inside kernels, under the names of transformers."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from globe_kernels.ops.triton_import import tl, triton

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


@triton.jit
def apply_activation(x, ACTIVATION: tl.constexpr):
    """The activation of that name on a float32 block."""
    if ACTIVATION == "silu" or ACTIVATION == "swish":
        y = x * tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_pytorch_tanh":
        # tanh(u) = 2 sigmoid(2u) - 1, which saturates without overflow
        y = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        tl.static_assert(ACTIVATION == "relu", "an activation without kernel")
        y = tl.maximum(x, 0.0)
    return y
