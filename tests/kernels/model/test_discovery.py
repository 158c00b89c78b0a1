"""Experts are found by their structure, and their activation by calling it."""

import itertools
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from globe_kernels.errors import RequestError
from globe_kernels.model.discovery import activation_of, routed_experts, top_k_of
from globe_kernels.ops.activations import GATED_ACTIVATIONS, gated_activation, parse_activation

E, P, D = 4, 6, 10


class PlainExperts(nn.Module):
    """As transformers makes the experts of a layer, of these flags and this activation of gate and up."""

    def __init__(self, function=lambda gate, up: F.silu(gate) * up, config=None, **flags):
        super().__init__()
        self.has_gate = self.is_concatenated = True
        self.has_bias = self.is_transposed = self.has_post_expert_norm = False
        vars(self).update(flags)
        self.config, self.function = config or SimpleNamespace(model_type="own"), function
        shapes = {"gate_up_proj": (2 * P, D), "down_proj": (D, P)}
        for name, (rows, columns) in shapes.items():
            shape = (E, columns, rows) if self.is_transposed else (E, rows, columns)
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))
            if self.has_bias:
                self.register_parameter(f"{name}_bias", nn.Parameter(torch.zeros(E, rows)))

    def _apply_gate(self, outputs):
        both = outputs.chunk(2, dim=-1) if self.is_concatenated else (outputs[..., ::2], outputs[..., 1::2])
        return self.function(*both)


def tree(**modules) -> nn.Module:
    """A model with these modules at these paths, a double underscore for a dot."""
    root = nn.Module()
    for path, module in modules.items():
        parent = root
        *parts, last = path.split("__")
        for part in parts:
            if part not in dict(parent.named_children()):
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(last, module)
    return root


def found(function, **flags) -> str:
    (experts,) = routed_experts(tree(layers__0__experts=PlainExperts(function, **flags))).values()
    return activation_of(experts)


def specs() -> list[str]:
    every = []
    for name in GATED_ACTIVATIONS:
        settings = parse_activation(name).settings
        values = {"alpha": (0.9, 1.702, 5.25), "limit": (1.5, 6.99, 9.9, 10.0, 33.3, 250.0)}
        if name == "capped_silu":  # clamped_silu is the same function of large limits: silu(33) is 33
            values["limit"] = values["limit"][:4]
        for chosen in itertools.product(*(values[setting] for setting in settings)):
            pairs = ", ".join(f"{setting}={value}" for setting, value in zip(settings, chosen, strict=True))
            every.append(f"{name}({pairs})" if pairs else name)
    return every


@pytest.mark.parametrize("spec", specs())
@pytest.mark.parametrize("concatenated", [True, False], ids=["concatenated", "interleaved"])
def test_every_activation_with_its_settings(spec, concatenated):
    expected = {"swish": "silu"}.get(spec, spec)  # the same function
    assert found(gated_activation(spec), is_concatenated=concatenated) == expected


def test_a_limit_that_is_not_there_is_beyond_all_numbers():
    assert found(lambda gate, up: F.silu(gate) * (up + 1)) == "clamped_swiglu(alpha=1.0, limit=1000000.0)"


def test_limits_in_float32_are_read_as_they_were_written():
    limit = torch.tensor(9.9)  # 9.8999996185 in float32
    clamped = found(lambda gate, up: F.silu(gate.clamp(max=limit.item())) * up.clamp(-limit.item(), limit.item()))
    assert clamped == "clamped_silu(limit=9.9)"


@pytest.mark.parametrize(
    "function",
    [
        lambda gate, up: torch.tanh(gate) * up,
        lambda gate, up: F.relu(gate).square() * up,
        lambda gate, up: gate * torch.sigmoid(1.702 * gate) * up,
        lambda gate, up: gate * up,
        lambda gate, up: F.silu(up) * gate,
        lambda gate, up: F.silu(gate.clamp(-10, 10)) * up.clamp(-10, 10),
        lambda gate, up: F.silu(gate.clamp(max=10)) * up,
        lambda gate, up: F.silu(gate.clamp(max=10)) * up.clamp(-9, 9),
        lambda gate, up: F.silu(gate.clamp(max=10)) * up.clamp(max=10),
        lambda gate, up: 1.001 * F.silu(gate) * up,
        lambda gate, up: F.silu(gate) * up * 0,
        lambda gate, up: F.silu(gate) * up * torch.nan,
    ],
    ids=[
        *("tanh", "relu squared", "quick gelu", "linear", "gate and up exchanged", "gate clamped below"),
        *("up not clamped", "two limits", "up clamped above", "scaled", "zero", "nan"),
    ],
)
def test_another_activation_is_refused_by_name(function):
    with pytest.raises(RequestError, match=r"layers.0.experts is a PlainExperts, whose activation .* is none of silu,"):
        found(function)


@pytest.mark.parametrize(
    "flags", [{}, {"is_transposed": True}, {"is_concatenated": False, "is_transposed": True, "has_bias": True}], ids=str
)
def test_sizes_and_layout(flags):
    experts = routed_experts(tree(model__layers__3__mlp__experts=PlainExperts(**flags)))[3]
    assert (experts.name, experts.sizes, experts.model_type) == ("model.layers.3.mlp.experts", (E, P, D), "own")
    assert experts.layout.transposed == flags.get("is_transposed", False)
    assert experts.layout.interleaved == (not flags.get("is_concatenated", True))
    assert experts.layout.has_bias == flags.get("has_bias", False)


def test_the_layer_is_the_last_of_the_path_and_layers_are_in_order():
    model = tree(layers__7__layers__10__experts=PlainExperts(), layers__7__layers__2__experts=PlainExperts())
    assert [*routed_experts(model)] == [2, 10]


class OwnExperts(nn.Module):
    pass


def with_parameter() -> PlainExperts:
    experts = PlainExperts()
    experts.scale = nn.Parameter(torch.ones(E))
    return experts


def without_down() -> PlainExperts:
    experts = PlainExperts()
    del experts.down_proj
    return experts


@pytest.mark.parametrize(
    ("modules", "sentence"),
    [
        ({}, "Module has no routed experts; give a Mixture-of-Experts model."),
        (
            {"layers__0__a": PlainExperts(), "layers__0__b": PlainExperts()},
            "Layer 0 of Module has two modules of routed experts, layers.0.a and layers.0.b, and GloBE",
        ),
        ({"blocks__0__experts": PlainExperts()}, "blocks.0.experts of Module has routed experts outside of layers.N;"),
        ({"layers__0__experts": with_parameter()}, "has scale beside the weights of gate, up and down;"),
        ({"layers__0__experts": without_down()}, "which has no down_proj;"),
        ({"layers__0__experts": PlainExperts(has_gate=False)}, "which has no gate: GloBE compresses gate and up;"),
        (
            {"layers__0__experts": PlainExperts(has_post_expert_norm=True)},
            "which normalises the output of every expert;",
        ),
        ({"layers__0__experts": OwnExperts()}, "is a OwnExperts, which computes in a forward of its own;"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_what_is_refused(modules, sentence):
    with pytest.raises(RequestError, match=re.escape(sentence)):
        routed_experts(tree(**modules))


def configured(model: nn.Module, text: str) -> nn.Module:
    language = SimpleNamespace(model_type=text)
    model.config = SimpleNamespace(model_type="whole", get_text_config=lambda: language)
    return model


def test_experts_of_a_tower_are_left_alone():
    text, tower = (PlainExperts(config=SimpleNamespace(model_type=name)) for name in ("text", "vision"))
    model = configured(tree(model__layers__1__experts=text, tower__layers__1__experts=tower), "text")
    assert {layer: experts.name for layer, experts in routed_experts(model).items()} == {1: "model.layers.1.experts"}


@pytest.mark.parametrize("place", ["config", "router", "block"])
@pytest.mark.parametrize("key", ["num_experts_per_tok", "moe_topk", "top_k"])
def test_experts_per_token(place, key):
    model = tree(layers__0__experts=PlainExperts(), layers__0__router=nn.Module())
    experts = routed_experts(model)[0]
    with pytest.raises(
        RequestError, match="Neither the configuration of Module nor the router beside layers.0.experts"
    ):
        top_k_of(model, experts)
    owner = {
        "config": experts.module.config,
        "router": model.get_submodule("layers.0.router"),
        "block": model.get_submodule("layers.0"),
    }[place]
    setattr(owner, key, 3)
    assert top_k_of(model, experts) == 3


def test_the_top_k_of_sampling_is_not_the_experts_per_token():
    """An old config.json may have the settings of generation."""
    model = tree(layers__0__experts=PlainExperts(config=SimpleNamespace(model_type="own", top_k=50, moe_topk=2)))
    assert top_k_of(model, routed_experts(model)[0]) == 2
