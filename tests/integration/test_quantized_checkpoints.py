"""Whole models from quantised checkpoints: the same fit and the same exports as from the values of their weights."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.utils.quantization_config import FineGrainedFP8Config, Mxfp4Config

from globe_fit import ExpertSource, export_dense, export_globe, fit, save_fit
from globe_fit.calibration.offload import plan_run
from globe_fit.data.model import load_model, with_experts
from globe_fit.plan.footprint import footprint
from globe_fit.result import reconstruct
from globe_kernels import GlobeCheckpoint
from globe_kernels.errors import RequestError
from globe_kernels.testing import tiny_model
from globe_kernels.units import format_bytes
from tests.conftest import TINY_FIT
from tests.fit.data.quantizers import CASES, stored_names

TOKENS = torch.randint(128, (2, 24), generator=torch.Generator().manual_seed(0))
QUANTIZED = r".*(self_attn\.[qkvo]_proj\.weight|experts\.\d+\.\w+_proj\.weight|experts\.(gate_up|down)_proj)"
EXPERTS = r".*experts\..*(_proj|\.w[123])(\.weight)?"
ATTENTION = r".*self_attn\.[qkvo]_proj\.weight"


def save_model(path: Path, model_type: str = "qwen3_moe", fused: bool = False) -> Path:
    inner = "moe_intermediate_size" if model_type in ("qwen3_moe", "deepseek_v3") else "intermediate_size"
    model = tiny_model(model_type, **{inner: 64}).bfloat16()
    model.save_pretrained(path, max_shard_size="100KB", save_original_format=not fused)
    return path


def rewrite(path: Path, out: Path, change: Callable[[str, torch.Tensor], dict], quantization: dict | None) -> Path:
    """Copy a checkpoint with each tensor replaced by the tensors of `change(key, tensor)`."""
    shutil.copytree(path, out)
    weight_map = {}
    for file in out.glob("*.safetensors"):
        tensors = {}
        for key, tensor in load_file(file).items():
            tensors |= {name: part.contiguous() for name, part in change(key, tensor).items()}
        save_file(tensors, file, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file.name)
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = json.loads((out / "config.json").read_text())
    extra = {} if quantization is None else {"quantization_config": quantization}
    (out / "config.json").write_text(json.dumps(config | extra))
    return out


def quantize(path: Path, out: Path, name: str, which: str = QUANTIZED) -> Path:
    case = CASES[name]

    def change(key: str, tensor: torch.Tensor) -> dict:
        return stored_names(key, case.quantize(tensor.float())) if re.fullmatch(which, key) else {key: tensor}

    return rewrite(path, out, change, case.config)


def values_of(path: Path, plain: Path, out: Path) -> Path:
    """Write the checkpoint `plain` with the values that quantised `path` stands for."""
    files = ExpertSource(path).files
    return rewrite(plain, out, lambda key, _: {key: files.read(key)}, None)


def tensors_in(path: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for file in path.glob("*.safetensors") for key, tensor in load_file(file).items()}


MODELS = [
    pytest.param("fp8 in blocks", "qwen3_moe", False, QUANTIZED, id="fp8"),
    pytest.param("fp8 in blocks", "qwen3_moe", True, EXPERTS, id="fused fp8"),
    pytest.param("fp8 in blocks, E8M0", "deepseek_v3", False, QUANTIZED, id="fp8 with E8M0 scales"),
    pytest.param("fp8 per row", "qwen3_moe", False, ATTENTION, id="only attention"),
    pytest.param("fp8 per row", "qwen3_moe", False, EXPERTS, id="only experts"),
    pytest.param("fp8 per tensor, a number", "mixtral", False, EXPERTS, id="fp8 per tensor, a number"),
    pytest.param("mxfp8", "qwen3_moe", False, QUANTIZED, id="mxfp8"),
    pytest.param("mxfp4 of gpt-oss", "gpt_oss", False, EXPERTS, id="mxfp4 of gpt-oss"),
    pytest.param("fp4 with E8M0", "deepseek_v3", False, EXPERTS, id="fp4 with E8M0"),
    pytest.param("int4 packed", "qwen3_moe", False, QUANTIZED, id="int4 packed"),
    pytest.param("nvfp4 of modelopt", "qwen3_moe", False, EXPERTS, id="nvfp4 of modelopt"),
    pytest.param("nvfp4 of compressed-tensors", "qwen3_moe", False, QUANTIZED, id="nvfp4 of compressed-tensors"),
]


@pytest.mark.parametrize(("name", "model_type", "fused", "which"), MODELS)
def test_a_quantised_checkpoint_is_the_model_of_its_values(tmp_path, name, model_type, fused, which):
    plain = save_model(tmp_path / "plain", model_type, fused)
    path = quantize(plain, tmp_path / "quantized", name, which)
    dense = values_of(path, plain, tmp_path / "values")
    source, of_values = ExpertSource(path), ExpertSource(dense)
    assert source.weights_sha256 == of_values.weights_sha256
    on_disk, of_dense = (sum(tensor.nbytes for tensor in tensors_in(where).values()) for where in (path, dense))
    assert source.facts == of_values.facts | {"disk_bytes": on_disk}
    assert on_disk < of_dense == of_values.facts["disk_bytes"] == of_values.facts["bytes"]
    with torch.no_grad():
        logits = load_model(path)(TOKENS).logits
        assert torch.equal(logits, load_model(dense)(TOKENS).logits)
        assert not torch.equal(logits, load_model(plain)(TOKENS).logits), "nothing was quantised"

    result = fit(source, TINY_FIT)
    save_fit(result, source, tmp_path / "fit")
    checkpoint = GlobeCheckpoint(tmp_path / "fit")
    sizes = footprint(checkpoint.config, source.facts)
    assert sizes == footprint(checkpoint.config, of_values.facts) | {"quantized": on_disk}
    for export, kind in ((export_globe, "globe"), (export_dense, "dense")):
        export(checkpoint, source, tmp_path / kind)
        export(checkpoint, of_values, tmp_path / f"{kind}-of-values")
        written, wanted = tensors_in(tmp_path / kind), tensors_in(tmp_path / f"{kind}-of-values")
        assert written.keys() == wanted.keys() and all(torch.equal(written[key], wanted[key]) for key in wanted)
        configs = [json.loads((tmp_path / out / "config.json").read_text()) for out in (kind, f"{kind}-of-values")]
        assert configs[0].get("quantization_config") == configs[1].get("quantization_config")
        note = f"The base is quantised and takes {format_bytes(on_disk)} on disk"
        assert note in (tmp_path / kind / "README.md").read_text()
        assert note not in (tmp_path / f"{kind}-of-values" / "README.md").read_text()
    banks = {family: factors.bank for family, factors in result.families.items()}
    spans = {layer.layer: span for layer, span in of_values.layer_spans}

    def compressed(layer, family: str) -> torch.Tensor:
        return reconstruct(result.families[family].at(spans[layer.layer]), banks[family], result.config.phi)

    with torch.no_grad():
        expected = with_experts(of_values, compressed)(TOKENS).logits
        assert torch.equal(load_model(tmp_path / "dense")(TOKENS).logits, expected)
        # in fp32: a router in bf16 turns small differences into other experts
        exported, expected = (
            load_model(tmp_path / kind, dtype=torch.float32)(TOKENS).logits for kind in ("globe", "dense")
        )
    assert (exported - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize(
    ("name", "model_type", "config"),
    [
        ("fp8 in blocks", "qwen3_moe", FineGrainedFP8Config(dequantize=True)),
        ("mxfp4 of gpt-oss", "gpt_oss", Mxfp4Config(dequantize=True)),
    ],
)
def test_the_values_are_as_transformers_loads_them(tmp_path, name, model_type, config):
    which = QUANTIZED if model_type == "qwen3_moe" else EXPERTS
    path = quantize(save_model(tmp_path / "plain", model_type), tmp_path / "quantized", name, which)
    theirs = AutoModelForCausalLM.from_pretrained(path, quantization_config=config, dtype=torch.bfloat16)
    ours = load_model(path)
    for (key, expected), (_, found) in zip(theirs.named_parameters(), ours.named_parameters(), strict=True):
        assert torch.equal(found, expected), key


def test_a_text_over_a_quantised_model_needs_the_memory_of_its_values(tmp_path):
    path = quantize(save_model(tmp_path / "plain"), tmp_path / "quantized", "fp8 in blocks")
    source = ExpertSource(path)
    with pytest.raises(RequestError, match="layers of a quantised checkpoint cannot run from disk"):
        plan_run(source, "cpu", source.facts["disk_bytes"])
