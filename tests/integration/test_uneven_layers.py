"""Models whose layers differ in their experts. No configuration of transformers can say so: such a model is made by
editing a live one, and its layers are what its tensors say."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import globe_kernels
from globe_fit import ExpertSource
from globe_fit.calibration.moments import collect
from globe_fit.result import reconstruct
from globe_kernels import GlobeCheckpoint, GlobeMoEFFN, RequestError
from globe_kernels.model.discovery import routed_experts
from globe_kernels.testing import tiny_model
from tests.integration.conftest import QUICK
from tests.integration.test_patching import logits

NARROW, FEW = 1, 2  # layers of the tiny models


def uneven_model(model_type: str):
    """Layer 1 with experts of 40 x 64 instead of 48 x 64, layer 2 with 6 experts instead of 8."""
    model = tiny_model(model_type)
    transposed = model_type == "gpt_oss"
    experts = model.model.layers[NARROW].mlp.experts
    gate_up, down = experts.gate_up_proj.data, experts.down_proj.data
    experts.gate_up_proj = nn.Parameter(gate_up[..., :80].clone() if transposed else gate_up[:, :80].clone())
    experts.down_proj = nn.Parameter(down[:, :40].clone() if transposed else down[..., :40].clone())
    if transposed:
        experts.gate_up_proj_bias = nn.Parameter(experts.gate_up_proj_bias.data[:, :80].clone())
    block = model.model.layers[FEW].mlp
    router = block.router if transposed else block.gate
    block.experts.num_experts = router.num_experts = 6
    for module in (block.experts, router):
        for name, parameter in list(module.named_parameters()):
            setattr(module, name, nn.Parameter(parameter.data[:6].clone()))
    return model.eval()


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for path in directory.glob("*.safetensors") for key, tensor in load_file(path).items()}


@pytest.fixture(params=["qwen3_moe", "gpt_oss"])
def uneven(request, tmp_path, globe):
    """(model type, its directory, GloBE checkpoint of it, what the fit wrote to stderr)"""
    model_dir, out = tmp_path / "model", tmp_path / "globe"
    uneven_model(request.param).save_pretrained(model_dir)
    code, stdout, stderr = globe("fit", "--no-calibrate", model_dir, "-o", out, *QUICK, "--json")
    assert code == 0 and json.loads(stdout)["left_dense"] == {"1": [40, 64]}
    return request.param, model_dir, out, stderr


NOTE = "layers stay dense: 1 (40 x 64); one bank needs one shape of experts, and 48 x 64 holds the most weights."


def test_the_fit_covers_the_shape_that_holds_the_most_weights_and_says_what_it_leaves(uneven, globe):
    _, model_dir, out, stderr = uneven
    assert stderr == f"globe: These {NOTE}\n"
    config = GlobeCheckpoint(out, verify=True).config
    assert config.base.num_experts == {0: 8, 2: 6} and config.base.left_dense == {1: (40, 64)}
    assert json.loads((out / "fit_report.json").read_text())["left_dense"] == {"1": [40, 64]}
    assert NOTE in " ".join(globe("inspect", out)[1].split())
    assert json.loads(globe("inspect", out, "--json")[1])["left_dense"] == {"1": [40, 64]}
    assert ExpertSource(model_dir).base == config.base


def test_patch_replaces_the_covered_layers_and_leaves_the_other_alone(uneven):
    model_type, _, out, _ = uneven
    expected, model = uneven_model(model_type), uneven_model(model_type)
    before = {name: tensor.clone() for name, tensor in model.model.layers[NARROW].state_dict().items()}
    checkpoint, live = GlobeCheckpoint(out), routed_experts(expected)
    for layer in (0, FEW):
        fused = live[layer].module.gate_up_proj.data
        for family in ("gate", "up"):
            weights = reconstruct(checkpoint.layer(layer, family), checkpoint.bank(family), checkpoint.config.phi)
            live[layer].layout.part(fused, family).copy_(weights)
    original = logits(model)
    report = globe_kernels.patch(model, out, keep_dense=True)
    assert report.replaced == ("model.layers.0.mlp.experts", "model.layers.2.mlp.experts")
    assert report.skipped == ("model.layers.1.mlp.experts",)
    assert isinstance(model.model.layers[FEW].mlp.experts, GlobeMoEFFN)
    patched = logits(model)
    assert (patched - logits(expected)).abs().max() <= 1e-4 and (patched - original).abs().max() > 1e-2
    after = model.model.layers[NARROW].state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    globe_kernels.unpatch(model)
    assert torch.equal(logits(model), original)


def test_a_text_is_summed_over_the_covered_layers(uneven):
    model_type, model_dir, _, _ = uneven
    sums = collect(uneven_model(model_type), ExpertSource(model_dir), [torch.arange(16)[None]], "cpu")
    assert {layer: tuple(each.rows["up"].shape) for layer, each in sums.items()} == {0: (8, 48), 2: (6, 48)}
    assert all(each.rows["up"].any() for each in sums.values())


def test_a_model_that_is_even_is_not_the_one_of_the_fit(uneven):
    model_type, _, out, _ = uneven
    with pytest.raises(RequestError, match=r"layers\.2\.mlp\.experts\.gate_up_proj is \(8, .* expects \(6, "):
        globe_kernels.patch(tiny_model(model_type), out)


def test_exports_leave_the_other_layer_alone(uneven, globe, tmp_path):
    model_type, model_dir, out, _ = uneven
    base = tensors_of(model_dir)
    left = {key: tensor for key, tensor in base.items() if "layers.1." in key}
    assert any("gate_up_proj" in key or "gate_proj" in key for key in left)
    for options in ((), ("--dense",)):
        name = tmp_path / "-".join(["hf", *options])
        assert globe("export", out, "--base", model_dir, "-o", name, *options)[0] == 0
        written = tensors_of(name)
        assert all(torch.equal(written[key], tensor) for key, tensor in left.items())
        assert ("model.layers.2.mlp.experts.gate_adapter" in written) == (not options)
        assert not any(key.startswith("model.layers.1.mlp.experts.gate_adapter") for key in written)
