"""Tiny models of transformers' model types: each builds, runs, and holds nothing whose loss a test would not see."""

import pytest
import torch

from globe_kernels.testing import (
    assert_close,
    auto_class,
    moe_model_types,
    relative_errors,
    save_layouts,
    text_inputs,
    text_logits,
    tiny_model,
)


def routed_experts(model) -> list[torch.nn.Module]:
    names = {module: type(module).__name__ for module in model.modules()}
    return [module for module, name in names.items() if name.endswith("Experts") and name != "InklingSharedExperts"]


def test_the_list_of_model_types():
    """With the decorator of transformers and without, named with an underscore where the model type has a hyphen."""
    types = moe_model_types()
    assert types == sorted(types) and len(types) >= 71
    assert {"dbrx", "gemma4", "gpt_oss", "llama4", "nemotron_h", "nllb_moe", "qwen3_moe", "step3p7"} <= {*types}
    assert not {"auto", "bert", "gemma3", "llama", "qwen3"} & {*types}


@pytest.mark.parametrize("model_type", moe_model_types())
def test_every_model_type(model_type):
    model = tiny_model(model_type)
    assert sum(parameter.numel() for parameter in model.parameters()) < 3e6
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            assert not tensor.isnan().any(), name
            kept = "norm" in name or "attn" in name or tensor.numel() == 1
            assert kept or tensor.unique().numel() > 1, name
    logits = text_logits(model)
    assert logits.isfinite().all() and logits.std() > 1e-3
    assert torch.equal(text_logits(model), logits)

    experts = routed_experts(model)
    assert len(experts) > 1
    for module in experts:
        for parameter in module.parameters():
            torch.nn.init.zeros_(parameter)
    assert relative_errors(text_logits(model), logits)[1] > 1e-3, "the experts do not matter"


# model type -> the class that loads it, and its layouts on disk
LOADED = {
    "aria": ("AutoModelForImageTextToText", {"original", "fused"}),
    "dbrx": ("AutoModelForCausalLM", {"original"}),
    "deepseek_v4": ("AutoModelForCausalLM", {"original", "fused"}),
    "gemma4": ("AutoModelForCausalLM", {"original"}),
    "granitemoe": ("AutoModelForCausalLM", {"original", "fused"}),
    "longcat_flash": ("AutoModelForCausalLM", {"original", "fused"}),
    "mistral_large4": ("AutoModelForImageTextToText", {"original", "fused"}),
    "openai_privacy_filter": ("AutoModelForTokenClassification", {"original"}),
    "qwen3_5_moe": ("AutoModelForImageTextToText", {"original", "fused"}),
    "qwen3_moe": ("AutoModelForCausalLM", {"original", "fused"}),
    "qwen3_omni_moe": ("AutoModelForMultimodalLM", {"original", "fused"}),
    "switch_transformers": ("AutoModelForSeq2SeqLM", {"original"}),
}


@pytest.mark.parametrize("model_type", LOADED)
def test_every_layout_loads_again(model_type, tmp_path):
    model = tiny_model(model_type)
    loader, layouts = LOADED[model_type]
    assert auto_class(model).__name__ == loader
    paths = save_layouts(model, tmp_path)
    assert {*paths} == layouts
    for path in paths.values():
        loaded, report = auto_class(model).from_pretrained(path, dtype="float32", output_loading_info=True)
        assert not any(report.values()), report
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name
        assert_close(text_logits(loaded), text_logits(model), 1e-5, 1e-5)


def test_seeds_and_overrides():
    first, again, other = (tiny_model("gemma4", seed=seed) for seed in (0, 0, 1))
    name = "model.language_model.layers.1.experts.gate_up_proj"
    assert torch.equal(first.state_dict()[name], again.state_dict()[name])
    assert not torch.equal(first.state_dict()[name], other.state_dict()[name])
    shapes = {
        name: tuple(tensor.shape)
        for name, tensor in tiny_model("gemma4", num_experts=4, moe_intermediate_size=40).state_dict().items()
    }
    assert shapes[name] == (4, 80, 64)


def test_text_inputs():
    assert {*text_inputs(tiny_model("nllb_moe"))} == {"input_ids", "decoder_input_ids"}
    (ids,) = text_inputs(tiny_model("qwen3_moe"), (3, 5)).values()
    assert ids.shape == (3, 5) and ids.min() > 0, "0 is padding"
