"""Whoever else owns a model that is patched: modules around it, hooks, other quantizers, weights that others change."""

import json

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune, weight_norm
from transformers import AutoModelForCausalLM
from transformers.quantizers.base import HfQuantizer

import globe_kernels
from globe_kernels import RequestError
from globe_kernels.model.targets import is_patched
from globe_kernels.strategies import STRATEGIES
from globe_kernels.testing import assert_close, tiny_model
from tests.integration.test_patching import TOKENS, logits

pytestmark = pytest.mark.filterwarnings("ignore:A layer of this checkpoint uses")


class Own(nn.Module):
    """A user's module around a model."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor):
        return self.model(tokens)


class Pipe:
    """No torch module, as a pipeline of transformers is none."""

    def __init__(self, model: nn.Module):
        self.model, self.tokens = model, TOKENS


class Quantization:
    quant_method = "four_bits"


class OtherQuantizer(HfQuantizer):
    is_trainable = False

    def is_serializable(self):
        return True


def quantized_by_another() -> nn.Module:
    """A model whose experts stay plain, as bitsandbytes leaves them."""
    model = tiny_model("qwen3_moe")
    model.hf_quantizer = OtherQuantizer(Quantization())
    model.config.quantization_config, model.quantization_method = Quantization(), "four_bits"
    return model


@pytest.fixture(scope="module")
def expected(fit_tiny) -> tuple[torch.Tensor, torch.Tensor]:
    """(dense, GloBE)"""
    model = tiny_model("qwen3_moe")
    dense = logits(model)
    globe_kernels.patch(model, fit_tiny()[0])
    return dense, logits(model)


def facts(model: nn.Module) -> tuple:
    """Everything that a patch writes to a model beside its experts."""
    own = {name: type(value) for name, value in vars(model).items()}
    return own, dict(vars(model.config)), type(model.config), list(model.state_dict())


@pytest.mark.parametrize("wrap", [Own, lambda model: Own(Own(model))], ids=["one", "two"])
def test_a_model_inside_a_module_is_patched_and_every_verb_finds_it(wrap, fit_tiny, expected):
    model = tiny_model("qwen3_moe")
    before, outer = facts(model), wrap(model)
    globe_kernels.patch(outer, fit_tiny()[0], keep_dense=True)
    assert is_patched(model) and not is_patched(outer)
    assert torch.equal(logits(outer), expected[1])
    assert globe_kernels.explain(outer, tokens=2).groups
    globe_kernels.set_strategy(outer, "cached")
    logits(outer)
    globe_kernels.warm_cache(outer, globe_kernels.cache_stats(outer).uses)
    with pytest.raises(RequestError, match="already runs on GloBE experts"):
        globe_kernels.patch(outer, fit_tiny()[0])
    globe_kernels.unpatch(outer)
    assert torch.equal(logits(outer), expected[0]) and facts(model) == before


def test_a_compiled_model_runs_what_it_is_patched_with(fit_tiny, expected):
    torch._dynamo.reset()
    model = torch.compile(tiny_model("qwen3_moe"), backend="aot_eager")
    dense, globe = expected
    assert_close(logits(model), dense, rms=1e-6, peak=1e-5)  # it has a graph of the dense experts now
    globe_kernels.patch(model, fit_tiny()[0], keep_dense=True)
    assert_close(logits(model), globe, rms=1e-6, peak=1e-5)


@pytest.mark.parametrize(
    ("wrap", "sentence"),
    [
        (nn.DataParallel, "DataParallel keeps the parameters of the experts .*; patch the model first"),
        (lambda model: Own(nn.DataParallel(model)), "DataParallel at model keeps the parameters"),
        (
            lambda model: nn.ModuleDict({"a": model, "b": tiny_model("qwen3_moe")}),
            "ModuleDict holds 2 models; pass one of its attributes a, b",
        ),
        (Pipe, "Pipe is no torch module; pass the model, which is its attribute model"),
        (lambda model: object(), "object is no torch module; pass the model that it runs"),
    ],
)
def test_a_wrapper_that_would_go_on_with_the_dense_experts_is_refused(wrap, sentence, fit_tiny):
    model = tiny_model("qwen3_moe")
    with pytest.raises(RequestError, match=sentence):
        globe_kernels.patch(wrap(model), fit_tiny()[0])
    assert not is_patched(model)


def to_fp8(experts: nn.Module) -> None:
    experts.down_proj = nn.Parameter(experts.down_proj.to(torch.float8_e4m3fn), requires_grad=False)


class Packed(nn.Parameter):
    """As the parameters of bitsandbytes and torchao: a subclass that says another dtype than it stores."""


def to_subclass(experts: nn.Module) -> None:
    experts.gate_up_proj = Packed(experts.gate_up_proj.detach(), requires_grad=False)


def accelerated(experts: nn.Module) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.add_hook_to_module(experts, hooks.AlignDevicesHook(torch.device("cpu")))


def without_gate_up(experts: nn.Module) -> None:
    experts.gate_up_proj_blocks = nn.Parameter(torch.zeros(8, 4, dtype=torch.uint8), requires_grad=False)
    del experts.gate_up_proj


HOOKS = "has hooks or parametrizations, which would be lost with it"
CHANGES = {
    "forward hook": (lambda experts: experts.register_forward_hook(lambda *_: None), HOOKS),
    "accelerate": (accelerated, HOOKS),
    "pruning": (lambda experts: prune.l1_unstructured(experts, "down_proj", 0.5), HOOKS),
    "weight norm": (lambda experts: weight_norm(experts, "down_proj"), HOOKS),
    "parametrization": (
        lambda experts: parametrize.register_parametrization(experts, "down_proj", nn.Identity()),
        HOOKS,
    ),
    "forward": (lambda experts: vars(experts).update(forward=lambda *_: None), "The forward of .* has been replaced"),
    "fp8": (to_fp8, r"down_proj is quantized \(Parameter, torch.float8_e4m3fn\)"),
    "subclass": (to_subclass, r"gate_up_proj is quantized \(Packed, torch.float32\)"),
    "mxfp4": (without_gate_up, r"gate_up_proj_blocks is quantized \(Parameter, torch.uint8\)"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("change", CHANGES)
def test_experts_that_somebody_works_on_are_refused_by_name(change, fit_tiny):
    model, (make, sentence) = tiny_model("qwen3_moe"), CHANGES[change]
    make(model.model.layers[1].mlp.experts)
    with pytest.raises(RequestError, match=rf"model\.layers\.1\.mlp\.experts.*{sentence}|{sentence}"):
        globe_kernels.patch(model, fit_tiny()[0])
    assert not is_patched(model)


def test_another_quantizer_keeps_the_model(fit_tiny, expected):
    model = quantized_by_another()
    before, quantizer, quantization = facts(model), model.hf_quantizer, model.config.quantization_config
    globe_kernels.patch(model, fit_tiny()[0], keep_dense=True)
    assert torch.equal(logits(model), expected[1])
    assert model.config.quantization_config.other_layers is quantization and model.hf_quantizer is quantizer
    assert isinstance(quantizer, OtherQuantizer) and model.quantization_method == "four_bits"
    globe_kernels.unpatch(model)
    assert facts(model) == before and type(model.hf_quantizer) is OtherQuantizer and model.hf_quantizer is quantizer
    assert torch.equal(logits(model), expected[0])


def test_a_quantization_in_the_configuration_alone_is_refused(fit_tiny):
    model = tiny_model("qwen3_moe")
    model.config.quantization_config = {"quant_method": "fp8"}
    with pytest.raises(RequestError, match="is dict and the model has no quantizer; .* del model.config.quant"):
        globe_kernels.patch(model, fit_tiny()[0])
    del model.config.quantization_config
    assert globe_kernels.patch(model, fit_tiny()[0]).replaced


def test_a_model_that_is_quantized_after_it_was_patched_is_not_saved(fit_tiny, tmp_path):
    model = tiny_model("qwen3_moe")
    globe_kernels.patch(model, fit_tiny()[0])
    head = model.lm_head
    head.weight = Packed(head.weight.detach(), requires_grad=False)
    with pytest.raises(RequestError, match=r"lm_head.weight is quantized \(Packed\), and a saved GloBE model"):
        model.save_pretrained(tmp_path)


def test_unpatch_leaves_what_was_there(fit_tiny, tmp_path):
    model = tiny_model("qwen3_moe")
    before = facts(model)
    globe_kernels.patch(model, fit_tiny()[0], keep_dense=True)
    model.config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_method"] == "globe"
    globe_kernels.unpatch(model.to(torch.bfloat16))
    assert facts(model) == before
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_model_of_inference_mode_runs_everywhere(strategy, save_tiny, fit_tiny, expected):
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(save_tiny("qwen3_moe"), dtype=torch.float32).eval()
        globe_kernels.patch(model, fit_tiny()[0], strategy=strategy, keep_dense=True)
        inside = model(TOKENS).logits
    assert (logits(model) - inside).abs().max() <= 1e-5
    globe_kernels.set_strategy(model, "cached")
    assert (logits(model) - expected[1]).abs().max() <= 1e-5
    globe_kernels.unpatch(model)
    assert torch.equal(logits(model), expected[0])


def cut(owner: nn.Module, name: str, rows: int, dim: int = 0) -> None:
    tensor = getattr(owner, name).detach().narrow(dim, 0, rows).clone()
    setattr(owner, name, nn.Parameter(tensor, requires_grad=False) if tensor.is_floating_point() else tensor)


CUTS = {
    "gate_adapter": (24, 1),
    "up_adapter": (4, 0),
    "down_proj": (24, 2),
    "gate_bias": (24, 1),
    "down_bias": (4, 0),
    "gate_code_index": (4, 0),
    "bank.up": (3, 0),
}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", CUTS)
def test_a_weight_of_another_size_reaches_no_kernel(name, strategy, fit_tiny):
    model = tiny_model("gpt_oss")
    globe_kernels.patch(model, fit_tiny("gpt_oss")[0], strategy=strategy)
    owner = model.globe_bank if name.startswith("bank") else model.model.layers[1].mlp.experts
    whole = logits(model)
    cut(owner, name.removeprefix("bank."), *CUTS[name])
    made = {
        "gate_code_index": ("composed", "bank_first", "scratch"),
        "bank.up": ("composed",),
    }  # calls read its product
    if strategy in made.get(name, ()):
        assert torch.equal(logits(model), whole)
    else:
        with pytest.raises(RequestError, match=r"put back"):
            logits(model)
    with pytest.raises(RequestError, match=r"put back"):
        globe_kernels.set_strategy(model, strategy)
