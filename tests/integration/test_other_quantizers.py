"""Models whose experts are GloBE's and whose other layers another quantizer holds: saved, loaded, and saved again."""

import copy
import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

import globe_kernels
from globe_kernels import GlobeError, GlobeMoEFFN, RequestError
from globe_kernels.format.names import EXPORT_GUARD
from globe_kernels.testing import assert_close
from tests.integration.test_patching import TOKENS, logits

METHOD = "rounded"


class Rounded(nn.Module):
    """A linear layer of codes and scales. It saves a tensor that is no parameter of it, as bitsandbytes does."""

    def __init__(self, features: tuple[int, int]):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(features, dtype=torch.int8), requires_grad=False)
        self.scale = nn.Parameter(torch.empty(features[0], 1), requires_grad=False)

    def round(self, weight: torch.Tensor, levels: int) -> None:
        self.scale.data = weight.abs().amax(1, keepdim=True) / levels
        self.weight.data = (weight / self.scale).round().to(torch.int8)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(hidden, self.weight * self.scale)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self.weight.is_meta:
            destination[f"{prefix}weight_format"] = torch.tensor(1)


class Read(ConversionOps):
    """The reading of a layer, which transformers cannot undo."""

    def convert(self, input_dict, **kwargs):
        assert "weight_format" in input_dict
        return {"scale": input_dict["scale"][0]}


@register_quantization_config(METHOD)
class RoundedConfig(QuantizationConfigMixin):
    def __init__(self, levels: int = 7, **_):
        self.quant_method, self.levels = METHOD, levels


@register_quantizer(METHOD)
class RoundedQuantizer(HfQuantizer):
    is_trainable = False

    def is_serializable(self):
        return True

    def _process_model_before_weight_loading(self, model, **kwargs):
        plain = self.get_modules_to_not_convert(model)
        device = next(model.parameters()).device
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and name not in plain:
                with device:
                    model.set_submodule(name, Rounded(tuple(module.weight.shape)))

    def _process_model_after_weight_loading(self, model, **kwargs):
        model.is_rounded = True

    def get_weight_conversions(self):
        return [WeightConverter(["scale", "weight_format"], "scale", operations=[Read()])] if self.pre_quantized else []

    def _dequantize(self, model, dtype=None):
        for name, module in list(model.named_modules()):
            if isinstance(module, Rounded):
                linear = nn.Linear(*reversed(module.weight.shape), bias=False)
                linear.weight.data = module.weight * module.scale
                model.set_submodule(name, linear)
        return model


def rounded(path, auto=AutoModelForCausalLM, **kwargs) -> nn.Module:
    """The model in a directory, with its linear layers rounded, as transformers quantizes a model that it loads."""
    model = auto.from_pretrained(path, dtype=torch.float32, **kwargs)
    weights = {name: module.weight.data for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    quantizer = RoundedQuantizer(RoundedConfig(), pre_quantized=False)
    quantizer.preprocess_model(model)
    for name, module in model.named_modules():
        if isinstance(module, Rounded):
            module.round(weights[name], quantizer.quantization_config.levels)
    model.hf_quantizer = quantizer
    quantizer.postprocess_model(model)
    return model


def load(path, auto=AutoModelForCausalLM) -> nn.Module:
    return auto.from_pretrained(path, dtype=torch.float32)


def kinds(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


def tensors(path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


@pytest.fixture(scope="module")
def patched(save_tiny, fit_tiny) -> nn.Module:
    model = rounded(save_tiny("qwen3_moe"))
    globe_kernels.patch(model, fit_tiny()[0])
    return model


@pytest.fixture(scope="module")
def saved(patched, tmp_path_factory):
    path = tmp_path_factory.mktemp("beside")
    patched.save_pretrained(path)
    return path


def test_the_directory_names_both_quantizers_and_holds_their_codes(saved):
    config, stored = json.loads((saved / "config.json").read_text()), tensors(saved)
    quantization = config["quantization_config"]
    assert quantization["quant_method"] == "globe"
    assert quantization["other_layers"] == {"quant_method": METHOD, "levels": 7}
    assert config["transformers_weights"] == EXPORT_GUARD
    assert stored["model.layers.0.self_attn.q_proj.weight"].dtype == torch.int8
    assert "model.layers.0.self_attn.q_proj.scale" in stored and "globe_bank.gate" in stored
    assert not any("experts" in name and "gate_proj" in name for name in stored)


def test_a_loaded_model_computes_the_same_and_is_saved_the_same(saved, patched, tmp_path):
    model = load(saved)
    assert kinds(model) == kinds(patched) and {Rounded, GlobeMoEFFN} <= set(kinds(model).values())
    assert_close(logits(model), logits(patched), rms=1e-6, peak=1e-5)
    assert model.is_rounded and model.is_quantized and model.quantization_method == METHOD
    assert isinstance(model.hf_quantizer, RoundedQuantizer) and not model.hf_quantizer.is_trainable
    expected = tensors(saved)
    for name, live in {
        "loaded": model,
        "copied": copy.deepcopy(model),
        "pickled": pickle.loads(pickle.dumps(model)),
        "configured": AutoModelForCausalLM.from_pretrained(saved, config=model.config, dtype=torch.float32),
    }.items():
        live.save_pretrained(tmp_path / name)
        again = tensors(tmp_path / name)
        assert again.keys() == expected.keys() and all(torch.equal(again[key], expected[key]) for key in again)
        assert (tmp_path / name / "config.json").read_text() == (saved / "config.json").read_text()
    with pytest.raises(RequestError, match="dense experts were not kept"):
        globe_kernels.unpatch(model)


def test_layers_that_the_other_quantizer_leaves_plain_stay_plain(save_tiny, fit_tiny, tmp_path):
    model = rounded(save_tiny("qwen3_moe"), AutoModelForSequenceClassification, num_labels=3)
    model.config.pad_token_id = 0
    globe_kernels.patch(model, fit_tiny()[0])
    model.save_pretrained(tmp_path)
    again = load(tmp_path, AutoModelForSequenceClassification)
    assert kinds(again) == kinds(model) and type(again.score) is nn.Linear
    assert_close(logits(again), logits(model), rms=1e-6, peak=1e-5)


def test_the_body_alone_loads(saved, patched):
    model = load(saved, AutoModel)
    with torch.no_grad():
        expected = patched.model(TOKENS).last_hidden_state
        assert_close(model(TOKENS).last_hidden_state, expected, rms=1e-6, peak=1e-5)


def test_a_model_that_was_loaded_quantized_is_patched_and_saved(save_tiny, fit_tiny, patched, tmp_path):
    rounded(save_tiny("qwen3_moe")).save_pretrained(tmp_path / "dense")
    model = load(tmp_path / "dense")
    dense = logits(model)
    globe_kernels.patch(model, fit_tiny()[0], keep_dense=True)
    model.save_pretrained(tmp_path / "globe")
    assert_close(logits(load(tmp_path / "globe")), logits(patched), rms=1e-6, peak=1e-5)
    globe_kernels.unpatch(model)
    assert type(model.hf_quantizer) is RoundedQuantizer and type(model.config.quantization_config) is RoundedConfig
    model.save_pretrained(tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == METHOD and "transformers_weights" not in config
    assert torch.equal(logits(load(tmp_path / "again")), dense)


def test_dequantized_layers_leave_a_plain_globe_model(saved, tmp_path):
    model = load(saved)
    before = logits(model)
    model.dequantize()
    assert Rounded not in kinds(model).values()
    model.save_pretrained(tmp_path)
    assert "other_layers" not in json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert_close(logits(load(tmp_path)), before, rms=1e-6, peak=1e-5)


@pytest.mark.parametrize("missing", ["self_attn.q_proj.weight", "input_layernorm.weight", "mlp.experts.gate_adapter"])
def test_a_missing_weight_is_named(missing, saved, tmp_path):
    (tmp_path / "config.json").write_text((saved / "config.json").read_text())
    kept = {name: tensor for name, tensor in tensors(saved).items() if name != f"model.layers.1.{missing}"}
    assert len(kept) == len(tensors(saved)) - 1
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(GlobeError, match=f"model.layers.1.{missing} is missing"):
        load(tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("option", ["load_in_4bit", "load_in_8bit"])
def test_bitsandbytes(option, save_tiny, fit_tiny, tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(**{option: True})
    model = AutoModelForCausalLM.from_pretrained(save_tiny("qwen3_moe"), quantization_config=quantization)
    plain = {name: kind for name, kind in kinds(model).items() if "experts" not in name}
    globe_kernels.patch(model, fit_tiny()[0])
    model.save_pretrained(tmp_path / "first")
    for path, then in ("first", "second"), ("second", "third"):
        again = AutoModelForCausalLM.from_pretrained(tmp_path / path)
        assert plain.items() <= kinds(again).items() and GlobeMoEFFN in kinds(again).values()
        assert_close(logits(again), logits(model), rms=1e-6, peak=1e-5)
        again.save_pretrained(tmp_path / then)
