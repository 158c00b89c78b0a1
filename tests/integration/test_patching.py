import copy
import shutil
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import globe_kernels
from globe_fit import ExpertSource, fit, save_fit
from globe_kernels import GlobeCheckpoint, GlobeMoEFFN, RequestError
from globe_kernels.model.discovery import activation_of, routed_experts
from globe_kernels.model.targets import is_patched
from globe_kernels.testing import assert_close, tiny_model
from tests.conftest import MODEL_TYPES, TINY_FIT

TOKENS = torch.randint(128, (1, 256), generator=torch.Generator().manual_seed(0))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_report_names_every_layer_and_what_was_left(model_type, fit_tiny, save_tiny):
    report = globe_kernels.patch(tiny_model(model_type), fit_tiny(model_type)[0])
    assert len(report.replaced) == len(ExpertSource(save_tiny(model_type)).layers) > 0
    assert all("shared" in path for path in report.skipped)


def test_patch_and_cast_in_either_order(fit_tiny):
    path, _ = fit_tiny()
    first, second = tiny_model("qwen3_moe").bfloat16(), tiny_model("qwen3_moe")
    globe_kernels.patch(first, path)
    globe_kernels.patch(second, path)
    second.bfloat16()
    assert_close(logits(first), logits(second), rms=2e-2, peak=5e-2)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_bytes_in_the_report_are_those_of_the_tensors(model_type, fit_tiny):
    path, result = fit_tiny(model_type)
    model = tiny_model(model_type)
    experts = [dense.module for dense in routed_experts(model).values()]
    before = sum(tensor.nbytes for module in experts for tensor in module.parameters())
    report = globe_kernels.patch(model, path, strategy="composed")
    assert report.bytes_before == before
    assert report.bytes_on_disk == globe_kernels.GlobeCheckpoint(path).bytes_on_disk
    assert report.bytes_peak > report.bytes_after
    base, n = result.config.base, result.config.base.total_experts
    adapters = 2 * n * base.intermediate_size * result.config.rank * 4
    composed = 2 * n * result.config.rank * base.hidden_size * 4
    down = n * base.hidden_size * base.intermediate_size * 4
    codes = 2 * n * result.config.support * 8
    bank = 2 * result.config.num_atoms * result.config.rank * base.hidden_size * 2
    biases = n * (2 * base.intermediate_size + base.hidden_size) * 4 if base.has_bias else 0
    assert report.bytes_after == adapters + composed + down + biases + codes + bank


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_unpatch_restores_the_dense_model_bitwise(model_type, fit_tiny):
    model = tiny_model(model_type)
    keys, original = list(model.state_dict()), logits(model)
    globe_kernels.patch(model, fit_tiny(model_type)[0], keep_dense=True)
    assert not any("gate_up" in key for key in model.state_dict()), "dense experts stay out of the state_dict"
    globe_kernels.unpatch(model)
    assert list(model.state_dict()) == keys
    assert torch.equal(logits(model), original)
    assert not hasattr(model.config, "quantization_config")
    with pytest.raises(RequestError, match="nothing to undo"):
        globe_kernels.unpatch(model)


def test_unpatch_needs_the_dense_experts(fit_tiny):
    model = tiny_model("qwen3_moe")
    globe_kernels.patch(model, fit_tiny()[0])
    with pytest.raises(RequestError, match="keep_dense=True"):
        globe_kernels.unpatch(model)
    with pytest.raises(RequestError, match="already runs on GloBE"):
        globe_kernels.patch(model, fit_tiny()[0])


def test_a_deep_copy_runs_on_its_own(fit_tiny):
    model = tiny_model("qwen3_moe")
    globe_kernels.patch(model, fit_tiny()[0])
    expected, twin = logits(model), copy.deepcopy(model)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.zero_()
    assert torch.equal(logits(twin), expected)


def test_without_a_path_the_model_names_its_directory(save_tiny, fit_tiny, tmp_path):
    directory = tmp_path / "both"
    shutil.copytree(save_tiny("qwen3_moe"), directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    with pytest.raises(RequestError, match="holds no globe_config.json; pass the GloBE checkpoint"):
        globe_kernels.patch(model)
    for file in fit_tiny()[0].iterdir():
        shutil.copy(file, directory)
    assert len(globe_kernels.patch(model).replaced) == 3


def wrong_models():
    return {
        "architecture": (lambda: tiny_model("olmoe"), "fitted on a qwen3_moe model .* and this model is olmoe"),
        "layers": (
            lambda: tiny_model("qwen3_moe", num_hidden_layers=2),
            r"MoE layers 0, 1, 2 .* has the MoE layers 0, 1",
        ),
        "experts": (lambda: tiny_model("qwen3_moe", num_experts=4), r"gate_up_proj is \(4, 96, 64\) .* \(8, 96, 64\)"),
        "hidden size": (lambda: tiny_model("qwen3_moe", hidden_size=32), r"is \(8, 96, 32\)"),
        "weights": (
            lambda: tiny_model("qwen3_moe", seed=1),
            r"fitted on other weights .*relative error 1\.\d+ on layer 0",
        ),
        "activation": (
            lambda: tiny_model("qwen3_moe", hidden_act="tanh"),
            r"activation \(Tanh\) is none of silu",
        ),
        "no transformers model": (lambda: torch.nn.Linear(2, 2), "Linear has no routed experts"),
    }


@pytest.mark.parametrize("case", list(wrong_models()))
def test_a_checkpoint_of_another_model_is_refused_and_nothing_is_touched(case, fit_tiny):
    make, sentence = wrong_models()[case]
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = [type(module) for module in model.modules()]
    with pytest.raises(RequestError, match=sentence):
        globe_kernels.patch(model, fit_tiny()[0])
    assert [type(module) for module in model.modules()] == modules
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_the_settings_of_an_activation_are_those_of_the_model():
    for limit in (7.0, 5.0):
        experts = routed_experts(tiny_model("gpt_oss", swiglu_limit=limit))[0]
        assert activation_of(experts) == f"clamped_swiglu(alpha=1.702, limit={limit})"


def test_a_bias_of_another_model_is_refused(fit_tiny):
    model = tiny_model("gpt_oss")
    model.model.layers[1].mlp.experts.gate_up_proj_bias = torch.nn.Parameter(torch.zeros(8, 48))
    sentence = r"layers.1.mlp.experts.gate_up_proj_bias is \(8, 48\) .* expects \(8, 96\)"
    with pytest.raises(RequestError, match=sentence):
        globe_kernels.patch(model, fit_tiny("gpt_oss")[0])
    assert not is_patched(model)


def test_a_failure_while_building_touches_nothing(fit_tiny, monkeypatch):
    model = tiny_model("qwen3_moe")
    original = logits(model)
    built = 0

    def fail_late(self, *_):
        nonlocal built
        built += 1
        if built == 3:
            raise MemoryError

    monkeypatch.setattr(GlobeMoEFFN, "hold", fail_late)
    with pytest.raises(MemoryError):
        globe_kernels.patch(model, fit_tiny()[0])
    assert not is_patched(model)
    assert torch.equal(logits(model), original)


def test_a_model_without_weights_is_refused(fit_tiny):
    model = tiny_model("qwen3_moe").to("meta")
    with pytest.raises(RequestError, match="is on the meta device"):
        globe_kernels.patch(model, fit_tiny()[0])
    assert not is_patched(model)


def test_loading_a_state_dict_makes_what_is_made_from_it_again(fit_tiny, save_tiny, tmp_path):
    source = ExpertSource(save_tiny("qwen3_moe"))
    save_fit(fit(source, replace(TINY_FIT, seed=5)), source, tmp_path)
    one, other = tiny_model("qwen3_moe"), tiny_model("qwen3_moe")
    globe_kernels.patch(one, fit_tiny()[0])
    globe_kernels.patch(other, tmp_path)
    assert not torch.equal(logits(one), logits(other))
    other.load_state_dict(one.state_dict())
    assert torch.equal(logits(one), logits(other))


def test_a_patched_model_stands_every_cast(fit_tiny):
    model = tiny_model("qwen3_moe")
    globe_kernels.patch(model, fit_tiny()[0])
    expected = logits(model)
    assert_close(logits(model.half().float()), expected, rms=1e-2, peak=2e-2)


def test_a_patched_model_compiles_into_one_graph(fit_tiny):
    model = tiny_model("qwen3_moe")
    globe_kernels.patch(model, fit_tiny()[0])
    expected = logits(model)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(TOKENS).logits
    assert (compiled - expected).abs().max() <= 1e-4


def test_an_unknown_strategy_is_refused(fit_tiny):
    with pytest.raises(RequestError, match="strategy 'fast' is not known; expected one of auto, composed"):
        globe_kernels.patch(tiny_model("qwen3_moe"), fit_tiny()[0], strategy="fast")


def test_a_nan_in_the_factors_is_refused(fit_tiny, tmp_path, monkeypatch):
    original = GlobeCheckpoint.bank
    monkeypatch.setattr(GlobeCheckpoint, "bank", lambda self, family: original(self, family) * float("nan"))
    with pytest.raises(globe_kernels.GlobeError):
        globe_kernels.patch(tiny_model("qwen3_moe"), fit_tiny()[0])


def test_dense_experts_cannot_run_under_the_name_globe():
    model = tiny_model("qwen3_moe")
    config = AutoConfig.for_model("qwen3_moe")
    config._experts_implementation = "globe"
    model.set_experts_implementation("globe")
    with pytest.raises(RuntimeError, match="this module is still dense"):
        logits(model)
