"""Bytes that are promised against bytes that are written or held: every dtype of a base, fused and separate experts."""

import math
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import globe_kernels
from globe_fit import ExpertSource, FitConfig, VarProConfig, compress, export, export_dense, export_globe
from globe_fit.measure.inspection import inspect_checkpoint
from globe_fit.plan.footprint import footprint_of
from globe_fit.plan.serving import plan_all
from globe_kernels import GlobeCheckpoint, GlobeError
from globe_kernels.model.patching import PEAK_TOKENS, peak_workspace, resident_bytes
from globe_kernels.strategies import DENSE, STRATEGIES
from globe_kernels.strategies.cost import machine_named
from globe_kernels.testing import tiny_model

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CONFIG = FitConfig(ratio=0.8, support=4, varpro=VarProConfig(steps=1))


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """(directory of the model, directory of the fit) of a base in a dtype and a layout, once."""
    made: dict = {}

    def make(model_type: str, dtype: torch.dtype, fused: bool = False) -> tuple[Path, Path]:
        if (model_type, dtype, fused) not in made:
            path = tmp_path_factory.mktemp("base")
            model = tiny_model(model_type).to(dtype)
            for name, buffer in model.named_buffers():
                if name.endswith("e_score_correction_bias"):
                    buffer.data = buffer.float()  # as it is published
            model.save_pretrained(path / "model", save_original_format=not fused)
            compress(path / "model", path / "fit", CONFIG, calibrate=None)
            made[model_type, dtype, fused] = path / "model", path / "fit"
        return made[model_type, dtype, fused]

    return make


def tensor_bytes(directory: Path) -> int:
    """Bytes of all tensors in the safetensors files."""
    total = 0
    for path in directory.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            total += sum(file.get_tensor(key).nbytes for key in file.keys())  # noqa: SIM118
    return total


@pytest.mark.parametrize("to", [None, *DTYPES], ids=str)
@pytest.mark.parametrize("stored", DTYPES, ids=str)
@pytest.mark.parametrize("write", [export_globe, export_dense])
@pytest.mark.parametrize(
    ("model_type", "fused"), [("qwen3_moe", False), ("qwen3_moe", True), ("deepseek_v3", False), ("gpt_oss", True)]
)
def test_an_export_asks_for_the_bytes_that_it_writes(
    model_type, fused, write, stored, to, fitted, tmp_path, monkeypatch
):
    model, path = fitted(model_type, stored, fused)
    asked: list[int] = []
    monkeypatch.setattr(export, "require_room", lambda _, needed: asked.append(needed))
    write(GlobeCheckpoint(path), ExpertSource(model), tmp_path / "out", dtype=to)
    assert asked == [tensor_bytes(tmp_path / "out")] and asked[0] > 0


@pytest.mark.parametrize("to", [None, torch.float32], ids=str)
def test_a_disk_with_a_byte_too_few_is_refused_before_the_work(to, fitted, tmp_path, monkeypatch):
    model, path = fitted("qwen3_moe", torch.bfloat16)
    export_globe(GlobeCheckpoint(path), ExpertSource(model), tmp_path / "out", dtype=to)
    needed, usage = tensor_bytes(tmp_path / "out"), shutil.disk_usage(tmp_path)

    def with_room(free: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free))
        export_globe(GlobeCheckpoint(path), ExpertSource(model), tmp_path / f"with {free}", dtype=to)

    with pytest.raises(GlobeError, match="are free; free some space"):
        with_room(needed - 1)
    assert not (tmp_path / f"with {needed - 1}").exists()
    with_room(needed)


def test_a_checkpoint_takes_the_bytes_of_its_configuration(fitted):
    for dtype in DTYPES:
        _, path = fitted("qwen3_moe", dtype)
        assert tensor_bytes(path) == GlobeCheckpoint(path).config.tensor_bytes


def held_bytes(model) -> int:
    """All that a model holds, a tied tensor once, but for buffers that every load computes (of rotary embeddings)."""
    tensors = {id(tensor): tensor for tensor in model.parameters()}
    tensors |= {id(tensor): tensor for name, tensor in model.named_buffers() if "inv_freq" not in name}
    return sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("model_type", "fused"), [("qwen3_moe", False), ("qwen3_moe", True), ("deepseek_v3", False)])
def test_the_footprint_is_of_the_model_that_runs(model_type, fused, dtype, fitted):
    model_dir, path = fitted(model_type, dtype, fused)
    found = footprint_of(GlobeCheckpoint(path))
    dense_on_disk, fit_on_disk = tensor_bytes(model_dir), tensor_bytes(path)
    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    assert next(model.parameters()).dtype == dtype
    assert found["model"]["dense"] == found["resident"]["dense"] == dense_on_disk
    assert held_bytes(model) == pytest.approx(dense_on_disk, rel=1e-3)
    dense_gate_up = dense_on_disk - found["model"]["globe"] + fit_on_disk
    assert found["gate_up"] == {"dense": dense_gate_up, "globe": fit_on_disk}
    report = globe_kernels.patch(model, path)
    assert found["resident"]["globe"] == pytest.approx(held_bytes(model), rel=1e-3)
    assert report.bytes_after + report.bytes_rest == pytest.approx(held_bytes(model), rel=1e-3)
    assert found["peak"]["globe"] - found["resident"]["globe"] == report.bytes_peak - report.bytes_after
    assert found["peak"]["dense"] - found["resident"]["dense"] == report.bytes_peak_before - report.bytes_before


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_a_plan_and_an_inspection_are_of_the_dtype_of_the_model(model_type, dtype, fitted):
    model_dir, path = fitted(model_type, dtype)
    plan = plan_all(path, model_dir, machine_named("cpu"), {}, {})
    (point,) = plan["points"]
    inspected = inspect_checkpoint(GlobeCheckpoint(path))["bytes"]
    (on_gpu,) = plan_all(path, model_dir, machine_named("a100"), {}, {})["points"]
    found_on_gpu = {name: figures["peak"] - figures["resident"] for name, figures in on_gpu["strategies"].items()}
    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    dense = sum(
        tensor.nbytes for name, tensor in model.named_parameters() if ".experts." in name and "shared" not in name
    )
    outside = held_bytes(model) - dense
    assert plan["item_size"] == dtype.itemsize
    assert plan["outside_bytes"] == pytest.approx(outside, rel=1e-2)  # gpt_oss keeps some tensors in fp32
    assert point["strategies"][DENSE.name]["resident"] == dense
    assert point["bytes_on_disk"]["dense"] == dense
    assert point["sizes"]["model"]["dense"] == pytest.approx(tensor_bytes(model_dir), rel=1e-2)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "A layer of this checkpoint uses")
        for name in STRATEGIES:
            other = AutoModelForCausalLM.from_pretrained(model_dir).eval()
            globe_kernels.patch(other, path, strategy=name)
            found = point["strategies"][name]
            assert found["resident"] == resident_bytes(other)
            assert found["peak"] - found["resident"] == peak_workspace(other)
            if not STRATEGIES[name].takes_pool:
                # an inspection is for a GPU, where scratch has two buffers
                assert inspected["peak"][name] - inspected["resident"][name] == found_on_gpu[name]
                kept = found["resident"] - found["parts"]["down"] - found["host"]
                assert inspected["resident"][name] == kept


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_the_peak_bounds_the_temporaries_of_a_call(strategy, dtype, fitted):
    """Measured: the largest tensors that a layer makes at once are not more than the prediction, nor far below it."""
    model_dir, path = fitted("qwen3_moe", dtype)
    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "A layer of this checkpoint uses")
        globe_kernels.patch(model, path, strategy=strategy)
    predicted = peak_workspace(model)
    rows = PEAK_TOKENS * model.config.num_experts_per_tok
    config = GlobeCheckpoint(path).config
    per_row = 2 * config.rank + config.base.intermediate_size + config.base.hidden_size
    least = (rows * per_row + PEAK_TOKENS * config.base.hidden_size) * dtype.itemsize
    assert predicted >= least and math.isfinite(predicted)
    assert predicted % dtype.itemsize == 0 and predicted <= 20 * least
