import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from globe_fit.data.source import ExpertSource
from globe_kernels.errors import GlobeError, RequestError
from globe_kernels.model.discovery import routed_experts
from globe_kernels.testing import tiny_model
from tests.conftest import MODEL_TYPES


@pytest.mark.parametrize("fused", [False, True], ids=["per expert", "fused"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_reads_what_the_live_model_holds(save_tiny, model_type, fused):
    path = save_tiny(model_type, fused)
    source = ExpertSource(path)
    live = routed_experts(tiny_model(model_type))
    assert len([*path.glob("*.safetensors")]) > 1, "the checkpoint should be sharded"
    assert [layer.layer for layer in source.layers] == sorted(live)
    assert source.layers[0].is_fused == (fused or model_type == "gpt_oss")
    assert source.base.intermediate_size == 48 and source.base.hidden_size == 64
    for layer in source.layers:
        both = live[layer.layer].module.gate_up_proj.detach()
        gate, up = (both[..., ::2].mT, both[..., 1::2].mT) if model_type == "gpt_oss" else both.chunk(2, dim=1)
        assert torch.equal(source.read(layer, "gate"), gate)
        assert torch.equal(source.read(layer, "up"), up)
        assert torch.equal(source.read(layer, "up", range(1, 3), slice(5, 40)), up[1:3, :, 5:40])
    assert source.layer_spans[-1][1].stop == source.base.total_experts


@pytest.fixture
def model_dir(save_tiny, tmp_path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(save_tiny("qwen3_moe"), tmp_path / "model"))


def shard_of(model_dir: Path, key: str) -> Path:
    index = json.loads((model_dir / "model.safetensors.index.json").read_text())
    return model_dir / index["weight_map"][key]


def change_tensor(model_dir: Path, key: str, change) -> None:
    path = shard_of(model_dir, key)
    tensors = load_file(path)
    tensors[key] = change(tensors[key])
    save_file(tensors, path, {"format": "pt"})


def drop_keys(model_dir: Path, dropped) -> None:
    index_path = model_dir / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    index["weight_map"] = {key: name for key, name in index["weight_map"].items() if not dropped(key)}
    index_path.write_text(json.dumps(index))
    for name in set(index["weight_map"].values()):
        kept = {key: tensor for key, tensor in load_file(model_dir / name).items() if not dropped(key)}
        save_file(kept, model_dir / name, {"format": "pt"})


def change_config(model_dir: Path, **changes) -> None:
    config = json.loads((model_dir / "config.json").read_text())
    config |= changes
    (model_dir / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


KEY = "model.layers.1.mlp.experts.3.up_proj.weight"


def test_names_the_expert_with_a_nan(model_dir):
    change_tensor(model_dir, KEY, lambda tensor: tensor.index_fill(0, torch.tensor([5]), float("nan")))
    source = ExpertSource(model_dir)
    layer = source.layers[1]
    experts = range(2, 8)
    source.require_finite(layer, "gate", experts, source.read(layer, "gate", experts))
    with pytest.raises(GlobeError, match=r"Expert 3 of layer 1 has NaN or infinity in its up matrix .*experts\.3\.up"):
        source.require_finite(layer, "up", experts, source.read(layer, "up", experts))


def test_a_shard_that_lacks_a_listed_tensor(model_dir):
    shard = shard_of(model_dir, KEY)
    tensors = load_file(shard)
    del tensors[KEY]
    save_file(tensors, shard, {"format": "pt"})
    with pytest.raises(GlobeError, match=f"{shard.name} in .* lacks {KEY}"):
        ExpertSource(model_dir)


@pytest.mark.parametrize(
    ("dropped", "sentence"),
    [
        (lambda key: ".experts.7.gate_proj" in key and "layers.2." in key, "lacks the gate matrix of expert 7"),
        (lambda key: "layers.2.mlp.experts" in key, r"experts in layers \[0, 1\] and config.json says \[0, 1, 2\]"),
        (lambda key: ".experts." in key, "has no routed experts among its"),
        (lambda key: ".up_proj" in key, "lacks gate or up experts"),
    ],
    ids=["one expert", "a layer", "all", "a family"],
)
def test_an_incomplete_checkpoint(model_dir, dropped, sentence):
    drop_keys(model_dir, dropped)
    with pytest.raises(GlobeError, match=sentence):
        ExpertSource(model_dir)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_type": "llama"}, "LlamaForCausalLM has no routed experts; give a Mixture-of-Experts model"),
        ({"model_type": None}, "is not of a model that transformers .* knows"),
        ({"num_experts": None, "num_local_experts": None}, r"lacks the \w+ matrix of expert 8 \(120 of 128 missing\)"),
        ({"num_experts": 9, "num_local_experts": 9}, r"lacks the \w+ matrix of expert 8"),
        ({"num_experts": 6, "num_local_experts": 6}, "has expert 7 and config.json says 6"),
        ({"moe_intermediate_size": 32}, "experts of .* are 48 x 64 and config.json says 32 x 64"),
        ({"num_hidden_layers": 10**9}, "says num_hidden_layers is 1000000000, and no model has more than 25000"),
        ({"num_hidden_layers": 20_000}, "cannot build the model .* more than 25000 modules"),
        ({"num_labels": 10**9}, "says num_labels is 1000000000"),
        ({"hidden_size": 2**40}, r"experts of .* are 48 x 64 and config.json says 48 x 1099511627776"),
        ({"hidden_size": 2**62}, "cannot build the model"),
        ({"moe_intermediate_size": 0}, "says that model.layers.0.mlp.experts has 8 experts of 0 x 64"),
        ({"vocab_size": [3]}, "cannot build the model"),
        ({"dtype": "int8"}, "says dtype torch.int8, in which no model runs"),
        ({"architectures": 3}, "has 3 as architectures, where GloBE expects"),
        ({"quantization_config": {"config_groups": []}}, r"has \[\] as config_groups, where GloBE expects an object"),
        ({"mlp_only_layers": [0]}, r"experts in layers \[0, 1, 2\] and config.json says \[1, 2\]"),
    ],
    ids=str,
)
def test_a_configuration_of_another_model(model_dir, changes, sentence):
    change_config(model_dir, **changes)
    with pytest.raises(GlobeError, match=sentence):
        ExpertSource(model_dir)


@pytest.mark.parametrize("top_k", [0, 9])
def test_more_experts_per_token_than_there_are(model_dir, top_k):
    change_config(model_dir, num_experts_per_tok=top_k)
    with pytest.raises(GlobeError, match=f"says num_experts_per_tok is {top_k} and .* has 8 experts"):
        print(ExpertSource(model_dir).facts)


def test_names_of_classes_that_are_no_models(model_dir):
    change_config(model_dir, architectures=["AutoConfig", "logging", "NoSuchName"], attn_implementation="Org/kernel")
    assert type(ExpertSource(model_dir).outline.model).__name__ == "Qwen3MoeForCausalLM"


@pytest.mark.parametrize("pattern", ["config.json", "*.index.json", "model-00001-*"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to(path)], ids=["pipe", "dir", "loop"])
def test_no_file_where_a_file_should_be(model_dir, pattern, make):
    (path,) = model_dir.glob(pattern)
    path.unlink()
    make(path)
    with pytest.raises(GlobeError, match="download the index" if "index" in pattern else path.name):
        ExpertSource(model_dir)


def test_experts_of_one_layer_in_different_shapes(model_dir):
    change_tensor(model_dir, KEY, lambda tensor: tensor[:40].contiguous())
    sentence = r"experts of layer 1 differ in shape: .* is of a \(48, 64\) expert and .*3.up_proj.weight of a \(40,"
    with pytest.raises(RequestError, match=sentence):
        ExpertSource(model_dir)


@pytest.mark.parametrize(("layer", "left"), [(0, 0), (1, 1)])
def test_of_two_shapes_it_reads_the_one_that_holds_the_most_weights(save_tiny, tmp_path, layer, left):
    """Also where that is not what config.json says, as long as a layer is as it says."""
    model_dir = Path(shutil.copytree(save_tiny("qwen3_moe", True), tmp_path / "model"))
    for other in range(3):
        if (other == layer) == (layer == 1):
            prefix = f"model.layers.{other}.mlp.experts"
            change_tensor(model_dir, f"{prefix}.gate_up_proj", lambda tensor: tensor[:, :80].contiguous())
            change_tensor(model_dir, f"{prefix}.down_proj", lambda tensor: tensor[..., :40].contiguous())
    source = ExpertSource(model_dir)
    kept, dense = ((48, 64), (40, 64)) if layer == 1 else ((40, 64), (48, 64))
    assert (source.base.intermediate_size, source.base.hidden_size) == kept
    assert source.base.left_dense == {left: dense} and left not in source.base.num_experts
    assert [source.read(one, "up").shape for one in source.layers] == 2 * [(8, *kept)]
    assert not any(f"layers.{left}." in key for key in source.expert_keys)


def test_a_layer_with_fewer_experts_than_its_router_has_rows_is_incomplete(model_dir):
    drop_keys(model_dir, lambda key: "layers.1.mlp.experts.7." in key or "layers.1.mlp.experts.6." in key)
    with pytest.raises(GlobeError, match=r"Layer 1 of .* lacks the \w+ matrix of expert 6 \(2 of 8 missing\)"):
        ExpertSource(model_dir)
    change_tensor(model_dir, "model.layers.1.mlp.gate.weight", lambda tensor: tensor[:6].contiguous())
    assert ExpertSource(model_dir).base.num_experts == {0: 8, 1: 6, 2: 8}
    drop_keys(model_dir, lambda key: "layers.2.mlp.experts.7." in key)
    with pytest.raises(GlobeError, match=r"Layer 2 of .* lacks the \w+ matrix of expert 7 \(1 of 8 missing\)"):
        ExpertSource(model_dir)


FUSED = "model.layers.1.mlp.experts.gate_up_proj"


@pytest.mark.parametrize(
    ("key", "change", "sentence"),
    [
        (FUSED, lambda t: t.mT.contiguous(), r"gate_up_proj .* layer 1 .* is \(8, 96, 64\) .* says \(8, 64, 96\)"),
        (FUSED, lambda t: t[:, :, :95].contiguous(), r"is \(8, 64, 95\) and config.json says \(8, 64, 96\)"),
        (f"{FUSED}_bias", lambda t: t[:7].clone(), r"is \(7, 96\) and config.json says \(8, 96\)"),
        (FUSED.replace("gate_up", "down"), lambda t: t.mT.contiguous(), r"is \(8, 64, 48\) .* says \(8, 48, 64\)"),
    ],
    ids=["not transposed", "an odd width", "an expert's bias", "down not transposed"],
)
def test_fused_experts_of_another_shape(save_tiny, tmp_path, key, change, sentence):
    model_dir = Path(shutil.copytree(save_tiny("gpt_oss"), tmp_path / "model"))
    change_tensor(model_dir, key, change)
    with pytest.raises(GlobeError, match=sentence):
        ExpertSource(model_dir)


def test_fused_experts_without_their_biases(save_tiny, tmp_path):
    model_dir = Path(shutil.copytree(save_tiny("gpt_oss"), tmp_path / "model"))
    drop_keys(model_dir, lambda key: key == f"{FUSED}_bias")
    with pytest.raises(GlobeError, match=r"gate_up_proj_bias of .* layer 1 .* is missing and config.json says"):
        ExpertSource(model_dir)


SMALL_CONFIG = json.dumps(
    {"model_type": "qwen3_moe", "num_experts": 4, "num_hidden_layers": 1, "hidden_size": 8, "moe_intermediate_size": 4}
)


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({}, "is empty; give the local directory"),
        ({"config.json": "{"}, "not valid JSON"),
        ({"config.json": "[]"}, "holds a list and GloBE expects an object"),
        ({"config.json": SMALL_CONFIG}, "holds neither"),
        (
            {"config.json": SMALL_CONFIG, "model.safetensors.index.json": '{"weight_map": {"a": null}}'},
            "as weight_map.a",
        ),
    ],
    ids=["empty", "broken config", "a list", "no weights", "a broken index"],
)
def test_a_directory_that_is_not_a_model(tmp_path, files, sentence):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(GlobeError, match=sentence):
        ExpertSource(tmp_path)


def test_a_path_that_is_not_a_directory(tmp_path):
    with pytest.raises(RequestError, match="does not exist; give the local directory"):
        ExpertSource(tmp_path / "nothing")


def test_layers_past_the_last_are_left_alone(model_dir):
    """DeepSeek-V3 stores a prediction head as one more layer, with experts."""
    change_config(model_dir, num_nextn_predict_layers=1)
    shard = model_dir / "extra.safetensors"
    save_file({"model.layers.3.mlp.experts.0.gate_proj.weight": torch.zeros(48, 64)}, shard, {"format": "pt"})
    index_path = model_dir / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    index["weight_map"]["model.layers.3.mlp.experts.0.gate_proj.weight"] = shard.name
    index_path.write_text(json.dumps(index))
    assert [layer.layer for layer in ExpertSource(model_dir).layers] == [0, 1, 2]
