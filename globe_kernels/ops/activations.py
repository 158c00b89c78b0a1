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


# {name: function of gate, up and settings, whose defaults come from the first model that has the activation}
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


def _silu_slope(x: torch.Tensor, alpha: float = 1.0) -> torch.Tensor:
    """Return the derivative of x sigmoid(alpha x)."""
    s = torch.sigmoid(alpha * x)
    return s * (1 + alpha * x * (1 - s))


def _gelu_slope(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * (1 + torch.erf(x * 0.5**0.5)) + x * torch.exp(-0.5 * x.square()) * (0.5 / math.pi) ** 0.5


def _gelu_tanh_slope(x: torch.Tensor) -> torch.Tensor:
    # gelu is x sigmoid(2 v), v the argument of its tanh
    s = torch.sigmoid(2 * (2 / math.pi) ** 0.5 * (x + 0.044715 * x**3))
    return s + x * s * (1 - s) * 2 * (2 / math.pi) ** 0.5 * (1 + 3 * 0.044715 * x.square())


Pair = tuple[torch.Tensor, torch.Tensor]


def _clamped_swiglu_slopes(gate: torch.Tensor, up: torch.Tensor, alpha: float, limit: float) -> Pair:
    g, u = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (
        (gate <= limit) * _silu_slope(g, alpha) * (u + 1),
        g * torch.sigmoid(alpha * g) * (up.abs() <= limit),
    )


def _clamped_silu_slopes(gate: torch.Tensor, up: torch.Tensor, limit: float) -> Pair:
    g, u = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (gate <= limit) * _silu_slope(g) * u, F.silu(g) * (up.abs() <= limit)


def _capped_silu_slopes(gate: torch.Tensor, up: torch.Tensor, limit: float) -> Pair:
    y, u = F.silu(gate), up.clamp(-limit, limit)
    return (y <= limit) * _silu_slope(gate) * u, y.clamp(max=limit) * (up.abs() <= limit)


def _softcapped_silu_slopes(gate: torch.Tensor, up: torch.Tensor, alpha: float, limit: float) -> Pair:
    s, g, u = torch.sigmoid(gate), torch.tanh(gate / alpha), torch.tanh(up / limit)
    return s * (1 - g.square() + alpha * g * (1 - s)) * limit * u, alpha * g * s * (1 - u.square())


# {name: function that returns the derivatives of y by gate and by up}
_SLOPES: dict[str, Callable[..., Pair]] = {
    "silu": lambda gate, up: (_silu_slope(gate) * up, F.silu(gate)),
    "swish": lambda gate, up: (_silu_slope(gate) * up, F.silu(gate)),
    "gelu": lambda gate, up: (_gelu_slope(gate) * up, F.gelu(gate)),
    "gelu_pytorch_tanh": lambda gate, up: (_gelu_tanh_slope(gate) * up, F.gelu(gate, approximate="tanh")),
    "relu": lambda gate, up: ((gate > 0) * up, F.relu(gate)),
    "clamped_swiglu": _clamped_swiglu_slopes,
    "clamped_silu": _clamped_silu_slopes,
    "capped_silu": _capped_silu_slopes,
    "softcapped_silu": _softcapped_silu_slopes,
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


@lru_cache  # every call of a layer asks on a CPU
def gated_activation(spec: str) -> GatedFunction:
    """Return the function of (gate, up) that a spec names. Raises RequestError for a bad spec."""
    activation = parse_activation(spec)
    return partial(GATED_ACTIVATIONS[activation.name], **activation.settings)


@lru_cache
def gated_slopes(spec: str) -> Callable[[torch.Tensor, torch.Tensor], Pair]:
    """Return the function of (gate, up) that gives the derivatives of the activation by gate and by up.

    In a dtype of 16 bits some of them overflow.
    """
    activation = parse_activation(spec)
    return partial(_SLOPES[activation.name], **activation.settings)


@triton.jit
def gated_factors(gate, up, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr):
    """Return (a, a', b, b') of two float32 blocks: every activation is a(gate) b(up)."""
    b, b_slope = up, 1.0
    if ACTIVATION == "silu" or ACTIVATION == "swish":
        s = tl.sigmoid(gate)
        a = gate * s
        a_slope = s + a * (1.0 - s)
    elif ACTIVATION == "gelu":
        s = 1.0 + tl.erf(gate * 0.7071067811865476)
        a = 0.5 * gate * s
        a_slope = 0.5 * s + gate * tl.exp(-0.5 * gate * gate) * 0.3989422804014327
    elif ACTIVATION == "gelu_pytorch_tanh":
        # tanh(u) = 2 sigmoid(2u) - 1, which saturates without overflow
        s = tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
        a = gate * s
        a_slope = s + a * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * gate * gate)
    elif ACTIVATION == "relu":
        a = tl.maximum(gate, 0.0)
        a_slope = tl.where(gate > 0.0, 1.0, 0.0)
    elif ACTIVATION == "softcapped_silu":
        s = tl.sigmoid(gate)
        g = 2.0 * tl.sigmoid(2.0 / ALPHA * gate) - 1.0
        a = ALPHA * g * s
        a_slope = s * (1.0 - g * g) + a * (1.0 - s)
        u = 2.0 * tl.sigmoid(2.0 / LIMIT * up) - 1.0
        b, b_slope = LIMIT * u, 1.0 - u * u
    else:
        b, b_slope = tl.clamp(up, -LIMIT, LIMIT), tl.where(tl.abs(up) <= LIMIT, 1.0, 0.0)
        if ACTIVATION == "capped_silu":
            s = tl.sigmoid(gate)
            a = gate * s
            a_slope = tl.where(a <= LIMIT, s + a * (1.0 - s), 0.0)
            a = tl.minimum(a, LIMIT)
        else:
            g = tl.minimum(gate, LIMIT)
            if ACTIVATION == "clamped_silu":
                s = tl.sigmoid(g)
                a = g * s
                a_slope = s + a * (1.0 - s)
            else:
                tl.static_assert(ACTIVATION == "clamped_swiglu", "an activation without kernel")
                s = tl.sigmoid(ALPHA * g)
                a = g * s
                a_slope = s + ALPHA * a * (1.0 - s)
                b += 1.0
            a_slope = tl.where(gate <= LIMIT, a_slope, 0.0)
    return a, a_slope, b, b_slope


@triton.jit
def apply_gated(gate, up, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr):
    """Apply the activation of that name and settings to two float32 blocks."""
    a, _, b, _ = gated_factors(gate, up, ACTIVATION, ALPHA, LIMIT)
    return a * b
