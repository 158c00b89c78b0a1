"""The reader of exports for engines: it reads parts, and refuses every damage in a sentence."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from globe_kernels import GlobeCheckpoint
from globe_kernels.errors import GlobeError, RequestError
from globe_kernels.format.exported import Export
from globe_kernels.format.names import FAMILIES


def metadata_of(file) -> dict:
    with safe_open(file, framework="pt") as handle:
        return handle.metadata()


@pytest.fixture
def export(export_tiny, tmp_path):
    """A copy of an export in one file, to be damaged."""

    def copy(model_type: str = "qwen3_moe"):
        return shutil.copytree(export_tiny(model_type), tmp_path / "export")

    return copy


def change(path, change_tensors, *, hashes: bool = False):
    """Rewrite the tensor file of an export; without `hashes`, as an export that records none."""
    (file,) = path.glob("*.safetensors")
    tensors = load_file(file)
    change_tensors(tensors)
    save_file(tensors, file, metadata_of(file))
    if not hashes:
        config = json.loads((path / "config.json").read_text())
        del config["quantization_config"]["files"]
        (path / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_reads_the_tensors_of_the_checkpoint(export_tiny, fit_tiny, save_tiny, model_type):
    checkpoint, export = GlobeCheckpoint(fit_tiny(model_type)[0]), Export(export_tiny(model_type))
    inner = export.config.base.intermediate_size
    for family in FAMILIES:
        torch.testing.assert_close(export.bank(family), checkpoint.bank(family), rtol=0, atol=0)
    for layer in checkpoint.config.base.num_experts:
        whole = export.experts(layer, range(8), range(inner))
        for family in FAMILIES:
            factors = checkpoint.layer(layer, family)
            assert torch.equal(whole[f"{family}_adapter"], factors.adapter)
            assert torch.equal(whole[f"{family}_code_index"], factors.code.index)
            assert torch.equal(whole[f"{family}_code_value"], factors.code.value)
        for ids in ((5, 6, 7), (6, 1, 3)):
            rows = range(inner // 4, inner // 2)
            part = export.experts(layer, ids, rows)
            assert part.keys() == whole.keys()
            for name, tensor in part.items():
                expected = whole[name][list(ids)]
                if name == "down_proj":
                    expected = expected[:, :, rows.start : rows.stop]
                elif name.endswith("_adapter") or name in ("gate_bias", "up_bias"):
                    expected = expected[:, rows.start : rows.stop]
                assert torch.equal(tensor, expected), name
    assert export.keys <= load_file(next(export_tiny(model_type).glob("*.safetensors"))).keys()
    export.verify()


def test_reads_the_down_matrices_of_the_base(export_tiny, save_tiny):
    export, base = Export(export_tiny("mixtral")), {}
    for file in save_tiny("mixtral").glob("*.safetensors"):
        base |= load_file(file)
    found = export.experts(1, range(8), range(export.config.base.intermediate_size))["down_proj"]
    names = [f"model.layers.1.block_sparse_moe.experts.{expert}.w2.weight" for expert in range(8)]
    assert torch.equal(found, torch.stack([base[name] for name in names]))


@pytest.mark.parametrize(
    ("missing", "sentence"),
    [
        ("layers.2.mlp.experts.gate_adapter", "has no adapters of layer 2"),
        ("layers.2.mlp.experts.up_code_index", "has no tensor model.layers.2.mlp.experts.up_code_index"),
        ("layers.1.mlp.experts.6.down_proj.weight", "has no down matrix of expert 6 of layer 1"),
        ("globe_bank.up", "has no tensor globe_bank.up"),
    ],
)
def test_a_tensor_that_is_missing(export, missing, sentence):
    path = export()
    change(path, lambda tensors: [tensors.pop(key) for key in list(tensors) if key.endswith(missing)])
    with pytest.raises(GlobeError, match=sentence):
        Export(path)


def test_a_tensor_of_another_shape_or_kind(export):
    path = export()
    key = "model.layers.0.mlp.experts.gate_adapter"
    change(path, lambda tensors: tensors.update({key: tensors[key][:, 1:].contiguous()}))
    with pytest.raises(GlobeError, match=r"has model.layers.0.mlp.experts.gate_adapter as BF16 \(8, 47, \d+\) in"):
        Export(path)


def test_codes_as_fractions(export):
    path = export()
    key = "model.layers.0.mlp.experts.gate_code_index"
    change(path, lambda tensors: tensors.update({key: tensors[key].float()}))
    with pytest.raises(GlobeError, match="gate_code_index as F32"):
        Export(path)


def test_a_code_outside_the_bank_and_a_nan(export):
    path = export()

    def damage(tensors):
        tensors["model.layers.0.mlp.experts.gate_code_index"][0, 0] = 10**6
        tensors["model.layers.1.mlp.experts.up_adapter"][0, 0, 0] = float("nan")
        tensors["globe_bank.gate"][0, 0, 0] = float("inf")

    change(path, damage)
    opened = Export(path)
    with pytest.raises(GlobeError, match="has atom ids from 0 to 1000000"):
        opened.experts(0, range(8), range(48))
    with pytest.raises(GlobeError, match="layers.1.mlp.experts.up_adapter in .* holds NaN or infinity"):
        opened.experts(1, range(8), range(48))
    with pytest.raises(GlobeError, match="globe_bank.gate in .* holds NaN or infinity"):
        opened.bank("gate")
    opened.experts(2, range(8), range(48))


def test_a_file_that_is_truncated_missing_or_changed(export):
    path = export()
    (file,) = path.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(GlobeError, match=r"has sha256 .* is recorded: the file was changed or damaged; export the"):
        Export(path).verify()
    Export(path, verify=False).verify()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(GlobeError, match="is truncated or damaged"):
        Export(path)
    file.unlink()
    with pytest.raises(GlobeError, match="is missing and config.json beside it lists the file; export the checkpoint"):
        Export(path)


def test_a_file_of_another_export_beside_it(export):
    path = export()
    save_file({"model.norm.weight": torch.ones(1)}, path / "globe-model-0123abcd.safetensors")
    with pytest.raises(GlobeError, match="globe-model-0123abcd.safetensors is of another export, which was killed"):
        Export(path)


def test_directories_that_are_no_export(fit_tiny, save_tiny, tmp_path):
    with pytest.raises(RequestError, match="is a GloBE checkpoint without the rest of its model; write `globe export"):
        Export(fit_tiny()[0])
    for path in (save_tiny("qwen3_moe"), tmp_path, tmp_path / "absent"):
        with pytest.raises(RequestError, match="is no model that `globe export` wrote; give the directory of"):
            Export(path)


def test_a_layer_that_the_configuration_does_not_list(export):
    path = export()
    config = json.loads((path / "config.json").read_text())
    del config["quantization_config"]["base"]["num_experts"]["2"]
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(GlobeError, match="has adapters of layer 2, which config.json does not list, so it is no whole"):
        Export(path)
