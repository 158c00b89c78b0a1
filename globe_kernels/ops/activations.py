# pyright: reportInvalidTypeForm=false
"""Join gate and up of an expert by its activation, for torch and inside kernels.

    y = act(g) u                                                "silu", "gelu" and others, as transformers names them
    y = min(g, L) sigmoid(a min(g, L)) (clamp(u, -L, L) + 1)    "clamped_swiglu(alpha=a, limit=L)", of GPT-OSS
    y = silu(min(g, L)) clamp(u, -L, L)                         "clamped_silu(limit=L)", of DeepSeek-V4
    y = min(silu(g), L) clamp(u, -L, L)                         "capped_silu(limit=L)", of Step-3.7
    y = a tanh(g / a) sigmoid(g) L tanh(u / L)                  "softcapped_silu(alpha=a, limit=L)", of Inkling 2

A spec is the name of an activation and, in parentheses, settings that differ from its defaults.
"""

import inspect
import math
import re
from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from globe_kernels.errors import RequestError
from globe_kernels.ops.triton_import import tl, triton

GatedFunction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _clamped_swiglu(gate: torch.Tensor, up: torch.Tensor, alpha: float = 1.702, limit: float = 7.0) -> torch.Tensor:
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + 1)


def _clamped_silu(gate: torch.Tensor, up: torch.Tensor, limit: float = 10.0) -> torch.Tensor:
    return F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)


def _capped_silu(gate: torch.Tensor, up: torch.Tensor, limit: float = 7.0) -> torch.Tensor:
    return F.silu(gate).clamp(max=limit) * up.clamp(-limit, limit)


def _softcapped_silu(gate: torch.Tensor, up: torch.Tensor, alpha: float = 4.0, limit: float = 25.0) -> torch.Tensor:
    return alpha * torch.tanh(gate / alpha) * torch.sigmoid(gate) * limit * torch.tanh(up / limit)


# {name: function of gate, up and settings, whose defaults are those of the first model that has the activation}
GATED_ACTIVATIONS: dict[str, Callable[..., torch.Tensor]] = {
    "silu": lambda gate, up: F.silu(gate) * up,
    "swish": lambda gate, up: F.silu(gate) * up,
    "gelu": lambda gate, up: F.gelu(gate) * up,
    "gelu_pytorch_tanh": lambda gate, up: F.gelu(gate, approximate="tanh") * up,
    "relu": lambda gate, up: F.relu(gate) * up,
    "clamped_swiglu": _clamped_swiglu,
    "clamped_silu": _clamped_silu,
    "capped_silu": _capped_silu,
    "softcapped_silu": _softcapped_silu,
}


class Activation(NamedTuple):
    """A gated activation and its settings; 0 stands for a setting that it does not have."""

    name: str
    alpha: float = 0.0
    limit: float = 0.0

    @property
    def settings(self) -> dict[str, float]:
        """{setting: value} of the settings that the activation has."""
        parameters = inspect.signature(GATED_ACTIVATIONS[self.name]).parameters
        return {name: getattr(self, name) for name in list(parameters)[2:]}

    @property
    def spec(self) -> str:
        """The spec with all settings, such as "clamped_silu(limit=10.0)"."""
        settings = ", ".join(f"{name}={value}" for name, value in self.settings.items())
        return f"{self.name}({settings})" if settings else self.name

    @property
    def constexprs(self) -> dict[str, str | float]:
        """The arguments of `apply_gated`, for a launch."""
        return {"ACTIVATION": self.name, "ALPHA": self.alpha, "LIMIT": self.limit}


@lru_cache
def parse_activation(spec: str) -> Activation:
    """Read a spec such as "silu" or "clamped_silu(limit=10.0)". Raises RequestError for a bad spec."""
    match = re.fullmatch(r"(\w+)(?:\((.*)\))?", spec)
    if match is None or match[1] not in GATED_ACTIVATIONS:
        raise RequestError(f"The experts use the activation {spec!r}; GloBE has {', '.join(GATED_ACTIVATIONS)}.")
    parameters = list(inspect.signature(GATED_ACTIVATIONS[match[1]]).parameters.values())[2:]
    settings = {parameter.name: parameter.default for parameter in parameters}
    for setting in (match[2] or "").split(",") if match[2] else ():
        name, _, text = (part.strip() for part in setting.partition("="))
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if name not in settings or not 0 < value < math.inf:
            expected = ", ".join(f"{known}=a positive number" for known in settings) or "no setting"
            raise RequestError(
                f"The activation {spec!r} has {setting.strip()!r} and {match[1]} takes {expected}; write the settings "
                "as in clamped_swiglu(alpha=1.702, limit=7.0)."
            )
        settings[name] = value
    return Activation(match[1], **settings)


def gated_activation(spec: str) -> GatedFunction:
    """Return the function of (gate, up) that a spec names. Raises RequestError for a bad spec."""
    activation = parse_activation(spec)
    return partial(GATED_ACTIVATIONS[activation.name], **activation.settings)


@triton.jit
def apply_gated(gate, up, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr):
    """Apply the activation of that name and settings to two float32 blocks."""
    if ACTIVATION == "silu" or ACTIVATION == "swish":
        y = gate * tl.sigmoid(gate) * up
    elif ACTIVATION == "gelu":
        y = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)) * up
    elif ACTIVATION == "gelu_pytorch_tanh":
        # tanh(u) = 2 sigmoid(2u) - 1, which saturates without overflow
        y = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)) * up
    elif ACTIVATION == "relu":
        y = tl.maximum(gate, 0.0) * up
    elif ACTIVATION == "clamped_swiglu":
        g = tl.minimum(gate, LIMIT)
        y = g * tl.sigmoid(ALPHA * g) * (tl.clamp(up, -LIMIT, LIMIT) + 1.0)
    elif ACTIVATION == "clamped_silu":
        g = tl.minimum(gate, LIMIT)
        y = g * tl.sigmoid(g) * tl.clamp(up, -LIMIT, LIMIT)
    elif ACTIVATION == "capped_silu":
        y = tl.minimum(gate * tl.sigmoid(gate), LIMIT) * tl.clamp(up, -LIMIT, LIMIT)
    else:
        tl.static_assert(ACTIVATION == "softcapped_silu", "an activation without kernel")
        g = ALPHA * (2.0 * tl.sigmoid(2.0 / ALPHA * gate) - 1.0) * tl.sigmoid(gate)
        y = g * LIMIT * (2.0 * tl.sigmoid(2.0 / LIMIT * up) - 1.0)
    return y
