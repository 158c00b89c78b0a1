"""The sums over a text, against autograd through the experts of the model, in memory and offloaded."""

import pytest
import torch

from globe_fit import ExpertSource
from globe_fit.calibration import moments as collecting
from globe_fit.calibration.moments import _add_sensitivities, collect
from globe_fit.data.model import load_model
from globe_kernels.format.names import FAMILIES
from globe_kernels.model.discovery import routed_experts
from globe_kernels.testing import assert_close
from tests.conftest import MODEL_TYPES


@pytest.fixture(scope="module")
def windows() -> torch.Tensor:
    return torch.randint(1, 128, (6, 20), generator=torch.Generator().manual_seed(0))


def inputs_of_experts(model, path: str, windows: torch.Tensor) -> tuple:
    """(module, hidden, ids, weights) of all windows."""
    seen, experts = [], model.get_submodule(path)
    hook = experts.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    with torch.no_grad():
        model.model(windows)
    hook.remove()
    return experts, *seen[0]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_sensitivities_are_those_of_autograd(save_tiny, windows, model_type):
    """S_ik is the squared gradient of the output in what row k computes, which the gradient in the row itself has as a
    factor: dy/dW_k = dy/dg_k x^T. The module of transformers runs on one token and one of its experts at a time."""
    source = ExpertSource(save_tiny(model_type))
    model = load_model(source.model_dir, dtype=torch.float32)
    sums = collect(model, source, [windows], "cpu")
    layer, dense = list(routed_experts(model).items())[-1]
    experts, hidden, ids, weights = inputs_of_experts(model, dense.name, windows)
    expert = int(ids.flatten().mode().values)
    expected = {family: torch.zeros(48, dtype=torch.float64) for family in FAMILIES}
    for token, choice in (ids == expert).nonzero().tolist():
        x, fused = hidden[token : token + 1], experts.gate_up_proj
        gradients = {family: torch.zeros(48, 64, dtype=torch.float64) for family in FAMILIES}
        for out in range(64):
            fused.grad = None
            y = experts(x, ids[token : token + 1, [choice]], weights[token : token + 1, [choice]])
            y[0, out].backward()
            for family in FAMILIES:
                one = dense.layout.part(fused.grad, family)[expert].double()
                gradients[family][:, out] = one @ x[0].double() / x.double().square().sum()
        for family in FAMILIES:
            expected[family] += gradients[family].square().sum(1)
    for family in FAMILIES:
        assert_close(sums[layer].rows[family][expert], expected[family].float(), rms=1e-3, peak=1e-3)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_offloaded_or_not_the_sums_are_the_same(save_tiny, windows, tmp_path, model_type, fused):
    source = ExpertSource(save_tiny(model_type, fused))
    expected = collect(load_model(source.model_dir), source, windows.split(2), "cpu")
    offloaded = load_model(source.model_dir, offload_folder=tmp_path)
    assert next(offloaded.get_submodule("model.layers").parameters()).is_meta
    found = collect(offloaded, source, windows.split(4), "cpu")
    assert list(found) == list(expected) == [layer.layer for layer in source.layers]
    for layer, sums in expected.items():
        assert_close(found[layer].moment, sums.moment, rms=1e-5, peak=1e-5)
        for family in FAMILIES:
            assert_close(found[layer].rows[family], sums.rows[family], rms=1e-4, peak=1e-4)


def test_ids_that_name_no_expert_contribute_nothing(save_tiny, windows):
    source = ExpertSource(save_tiny("qwen3_moe"))
    model = load_model(source.model_dir)
    dense = routed_experts(model)[0]
    _, hidden, ids, weights = inputs_of_experts(model, dense.name, windows)

    def rows(ids: torch.Tensor) -> torch.Tensor:
        totals = {family: torch.zeros(8, 48) for family in FAMILIES}
        with torch.no_grad():
            _add_sensitivities(totals, dense, "silu", hidden, ids, weights)
        return torch.stack(list(totals.values()))

    every, first = rows(ids), rows(torch.cat([ids[:, :1], torch.full_like(ids[:, 1:], 8)], 1))
    second = rows(torch.cat([torch.full_like(ids[:, :1], -1), ids[:, 1:]], 1))
    assert first.sum() > 0 and second.sum() > 0
    assert_close(first + second, every, rms=1e-6, peak=1e-6)


def test_tokens_are_looked_at_in_chunks(save_tiny, windows, monkeypatch):
    source = ExpertSource(save_tiny("gpt_oss"))
    whole = collect(load_model(source.model_dir), source, [windows], "cpu")
    monkeypatch.setattr(collecting, "_CHUNK", 7)
    chunked = collect(load_model(source.model_dir), source, [windows], "cpu")
    for layer, sums in whole.items():
        assert_close(chunked[layer].moment, sums.moment, rms=1e-5, peak=1e-5)
        assert_close(chunked[layer].rows["gate"], sums.rows["gate"], rms=1e-5, peak=1e-5)
