"""A fit on a GPU against the same on the CPU."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from globe_fit import ExpertSource, FitConfig, VarProConfig, fit
from globe_fit.data.stream import FamilyWeights
from globe_fit.plan import fitting as estimate
from globe_fit.run.distributed import Ranks
from globe_fit.solvers.base import BankState, code_index
from globe_fit.solvers.objective import eliminated_error
from globe_kernels.errors import GlobeError
from globe_kernels.format.names import FAMILIES
from globe_kernels.testing import assert_close, tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

CONFIG = FitConfig(ratio=0.8, support=4, varpro=VarProConfig(steps=12, warmup_steps=2))


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float32], ids=str)
def source(request, tmp_path_factory) -> ExpertSource:
    path = tmp_path_factory.mktemp("model")
    tiny_model("qwen3_moe").to(request.param).save_pretrained(path)
    return ExpertSource(path)


def test_blocks_are_those_of_the_cpu(source):
    on_cpu = FamilyWeights.measure(source, "up", "cpu")
    measured = FamilyWeights.measure(source, "up", "cuda")
    assert measured.statistics.scale == pytest.approx(on_cpu.statistics.scale, rel=1e-6)
    for ranks in (Ranks(), Ranks(1, 2, "cuda")):
        one, other = (replace(on_cpu, device=device, ranks=ranks) for device in ("cpu", "cuda"))
        for _ in range(2):
            for expected, block in zip(one.normalised(), other.normalised(), strict=True):
                assert expected.span == block.span
                assert_close(block.weights.cpu(), expected.weights, rms=1e-6, peak=1e-6)


@pytest.mark.parametrize("phi", ["identity", "tanh"])
def test_the_gradient_is_that_of_the_cpu(source, phi):
    """Up to the rounding of TF32."""
    torch.manual_seed(0)
    bank, codes = torch.randn(7, 32, 64) / 10, torch.randn(24, 7) * (torch.rand(24, 7) < 0.5)
    found = {}
    for device in ("cpu", "cuda"):
        weights = FamilyWeights.measure(source, "gate", device)
        state = BankState(*(one.to(device).requires_grad_() for one in (bank.clone(), codes.clone())), phi)
        error = eliminated_error(weights, state, code_index(state.codes != 0), ridge=1e-6)
        found[device] = error, state.bank.grad.cpu(), state.codes.grad.cpu() * (codes != 0)
    assert found["cuda"][0] == pytest.approx(found["cpu"][0], rel=1e-4)
    for on_gpu, on_cpu in zip(found["cuda"][1:], found["cpu"][1:], strict=True):
        assert_close(on_gpu, on_cpu, rms=3e-3, peak=6e-3)


def test_a_short_fit_is_that_of_the_cpu(source):
    on_cpu, on_gpu = (fit(source, replace(CONFIG, device=device)) for device in ("cpu", "cuda"))
    for family in FAMILIES:
        errors = [one.report["families"][family]["relative_error"] for one in (on_cpu, on_gpu)]
        assert errors[1] == pytest.approx(errors[0], rel=5e-3)
    before, after = ([r["relative_error"] for r in one.history] for one in (on_cpu, on_gpu))
    assert after == pytest.approx(before, rel=5e-3)


def test_what_is_kept_on_the_device_changes_nothing(source, monkeypatch):
    kept = fit(source, replace(CONFIG, device="cuda"))
    monkeypatch.setattr(estimate, "_GPU_SHARE", 0.0)
    read = fit(source, replace(CONFIG, device="cuda"))
    for family in FAMILIES:
        assert torch.equal(kept.families[family].bank, read.families[family].bank)
        assert torch.equal(kept.families[family].adapter, read.families[family].adapter)


def test_a_nan_is_named_with_its_expert(source, tmp_path):
    for path in source.model_dir.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    key = source.layers[1].keys["up"][3]
    path = tmp_path / source.files.files.weight_map[key]
    tensors = load_file(path)
    tensors[key][5] = torch.nan
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(GlobeError, match=f"Expert 3 of layer {source.layers[1].layer} has NaN or infinity in its up"):
        fit(ExpertSource(tmp_path), replace(CONFIG, device="cuda"))
