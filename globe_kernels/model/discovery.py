"""Find the routed experts of a transformers model by their structure: no architecture is known by its name.

transformers marks the class of a layer's experts with the layout of its weights. The weights say the sizes, the
activation is found by calling it.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from globe_kernels.errors import GlobeError, RequestError
from globe_kernels.format.layout import BIASES, DOWN, GATE_UP, ExpertsLayout
from globe_kernels.model.owners import refuse_unfit
from globe_kernels.ops.activations import GATED_ACTIVATIONS, gated_activation, parse_activation

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)(?=\.)")
# Spellings of K, in configurations and in routers. An old configuration may have a top_k of sampling.
_TOP_K_KEYS = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k", "top_k")
_PROBES = 1024
_PROBED_SPAN = 1e4  # of gate and up: beyond every limit


@dataclass(frozen=True)
class DenseExperts:
    """The routed experts of one layer, which GloBE replaces."""

    layer: int
    name: str  # of the module, such as model.layers.0.mlp.experts
    module: Any  # nn.Module with the tensors of ExpertsLayout.shapes
    layout: ExpertsLayout

    @property
    def sizes(self) -> tuple[int, int, int]:
        """E, P, D"""
        down = self.layout.canonical(getattr(self.module, DOWN))
        return down.shape[0], down.shape[2], down.shape[1]

    @property
    def model_type(self) -> str:
        """The type of the language model that the experts are of, also where it is a part of a larger model."""
        return str(getattr(self.module.config, "model_type", ""))


def routed_experts(model: nn.Module) -> dict[int, DenseExperts]:
    """Return {layer id: its dense experts} of a live model, or of a model on the meta device.

    Raises RequestError when the model has no experts, or experts that GloBE cannot stand in for.
    """
    found: dict[int, DenseExperts] = {}
    name = type(model).__name__
    every = [(path, module) for path, module in model.named_modules() if hasattr(module, "has_gate")]
    for path, module in _of_language_model(model, every) or _experts_by_name(model):
        if reason := _reason_against(module):
            refuse_unfit(path, module)  # with the sentence for experts that somebody else has changed
            raise RequestError(
                f"{path} of {name} is a {type(module).__name__}, which {reason}; GloBE cannot stand in for such "
                "experts, so give another model."
            )
        if not (layers := _LAYER.findall(path)):
            raise RequestError(f"{path} of {name} has routed experts outside of layers.N; give another model.")
        if (layer := int(layers[-1])) in found:
            raise RequestError(
                f"Layer {layer} of {name} has two modules of routed experts, {found[layer].name} and {path}, and GloBE "
                "stands in for one in a layer; give another model."
            )
        layout = ExpertsLayout(module.is_transposed, not module.is_concatenated, module.has_bias)
        found[layer] = DenseExperts(layer, path, module, layout)
    if not found:
        raise RequestError(f"{name} has no routed experts; give a Mixture-of-Experts model.")
    return dict(sorted(found.items()))


def _experts_by_name(model: nn.Module) -> list[tuple[str, Any]]:
    """Return modules that are experts by the name of their class alone."""
    return [(path, module) for path, module in model.named_modules() if type(module).__name__.endswith("Experts")]


def _of_language_model(model: nn.Module, modules: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Leave out the experts of vision towers and the like, where the language model has experts."""
    config: Any = getattr(model, "config", None)
    language = config.get_text_config() if hasattr(config, "get_text_config") else config
    wanted = getattr(language, "model_type", None)
    own = [(path, m) for path, m in modules if getattr(getattr(m, "config", None), "model_type", None) == wanted]
    return own or modules


def _reason_against(module: Any) -> str | None:
    if not hasattr(module, "has_gate"):
        return "computes in a forward of its own"
    if not module.has_gate:
        return "has no gate: GloBE compresses gate and up"
    if getattr(module, "has_post_expert_norm", False):
        return "normalises the output of every expert"
    tensors = dict(module.named_parameters())
    expected = {GATE_UP, DOWN, *(BIASES.values() if module.has_bias else ())}
    if missing := expected - tensors.keys():
        return f"has no {', '.join(sorted(missing))}"
    if surplus := tensors.keys() - expected:
        return f"has {', '.join(sorted(surplus))} beside the weights of gate, up and down"
    return None


def activation_of(experts: DenseExperts) -> str:
    """Return the spec of the experts' activation, such as silu or clamped_silu(limit=10.0).

    The module's own function is called on numbers beyond any limit, and compared with every activation of GloBE.
    Raises RequestError when none is the same.
    """
    # on the CPU, also inside from_pretrained, which makes tensors on the meta device
    generator = torch.Generator("cpu").manual_seed(0)
    # the power puts many numbers near zero, where activations differ, and as many around every limit
    numbers = (torch.rand(2, _PROBES, dtype=torch.float64, generator=generator, device="cpu") * 2 - 1) ** 7
    gate, up = _PROBED_SPAN * numbers
    expected = _apply_gate(experts, gate, up)
    for spec in _candidates(experts):
        if torch.allclose(gated_activation(spec)(gate, up), expected, rtol=1e-6, atol=1e-9):
            return parse_activation(spec).spec
    function = type(getattr(experts.module, "act_fn", experts.module)).__name__
    raise RequestError(
        f"{experts.name} is a {type(experts.module).__name__}, whose activation ({function}) is none of "
        f"{', '.join(GATED_ACTIVATIONS)}; GloBE cannot stand in for such experts, so give another model."
    )


def _candidates(experts: DenseExperts) -> Iterable[str]:
    """Yield the specs of all activations; settings are read off the values of the module's function."""
    yield from GATED_ACTIVATIONS
    near, far = 1e-4, 1e6

    def value(gate: float, up: float) -> float:
        numbers = torch.tensor([[gate], [up]], dtype=torch.float64, device="cpu")
        return _apply_gate(experts, *numbers).item()

    at_zero, slope = value(1, 0), value(1, near) / near
    if 0 < at_zero < 1:  # sigmoid(alpha) (u + 1)
        alpha, limit = math.log(at_zero / (1 - at_zero)), value(1, far) / at_zero - 1
        yield f"clamped_swiglu(alpha={_rounded(alpha)}, limit={_rounded(limit)})"
    elif slope > 0:
        limit = _rounded(value(1, far) / slope)
        yield f"clamped_silu(limit={limit})"
        yield f"capped_silu(limit={limit})"
        yield f"softcapped_silu(alpha={_rounded(value(far, near) / near)}, limit={limit})"


def _rounded(value: float) -> float:
    """Undo the rounding of float32 constants."""
    return float(f"{value:.6g}")


@torch.no_grad()
def _apply_gate(experts: DenseExperts, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    outputs = torch.stack([gate, up], dim=-1).flatten() if experts.layout.interleaved else torch.cat([gate, up])
    return experts.module._apply_gate(outputs[None])[0].to(torch.float64)


def top_k_of(model: nn.Module, experts: DenseExperts) -> int:
    """Return K, the experts per token, of the configuration or of the router beside the experts.

    Raises RequestError when neither says a number, GlobeError for a number that is not from 1 to E.
    """
    block = model.get_submodule(experts.name.rpartition(".")[0])
    for place in (experts.module.config, block, *block.children()):
        for key in _TOP_K_KEYS:
            if isinstance(value := getattr(place, key, None), int):
                if not 0 < value <= experts.sizes[0]:
                    raise GlobeError(
                        f"{type(model).__name__} says {key} is {value} and {experts.name} has {experts.sizes[0]} "
                        "experts; restore its config.json."
                    )
                return value
    raise RequestError(
        f"Neither the configuration of {type(model).__name__} nor the router beside {experts.name} says how many "
        f"experts a token takes (one of {', '.join(_TOP_K_KEYS)}); add num_experts_per_tok to config.json."
    )
