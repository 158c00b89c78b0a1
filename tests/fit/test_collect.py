"""What is collected while a model runs, against autograd through its own experts, in memory and offloaded."""

import pytest
import torch

from globe_fit import ExpertSource
from globe_fit.collect import collect
from globe_fit.evaluate import load_model
from globe_kernels.families import ARCHITECTURES, FAMILIES
from globe_kernels.testing import assert_close


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


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_sensitivities_are_those_of_autograd(save_tiny, windows, model_type):
    """The gradient of an output in the biases of gate and up is that in what gate and up compute: the module of
    transformers runs on one token and one of its experts at a time, row k of whose bias is moved."""
    source = ExpertSource(save_tiny(model_type))
    model = load_model(source.model_dir, dtype=torch.float32)
    sums = collect(model, source, [windows], "cpu")
    layer, path = list(source.architecture.live_experts(model))[-1]
    experts, hidden, ids, weights = inputs_of_experts(model, path, windows)
    expert = int(ids.flatten().mode().values)
    matrices = {family: source.architecture.part(experts.gate_up_proj, family)[expert] for family in FAMILIES}
    expected = {family: torch.zeros(48, dtype=torch.float64) for family in FAMILIES}
    for token, choice in (ids == expert).nonzero().tolist():
        x, fused = hidden[token : token + 1], experts.gate_up_proj
        gradients = {family: torch.zeros(48, 64, dtype=torch.float64) for family in FAMILIES}
        for out in range(64):
            fused.grad = None
            y = experts(x, ids[token : token + 1, [choice]], weights[token : token + 1, [choice]])
            y[0, out].backward()
            for family in FAMILIES:  # dy/dW = dy/dg x^T
                one = source.architecture.part(fused.grad, family)[expert].double()
                gradients[family][:, out] = one @ x[0].double() / x.double().square().sum()
        for family in FAMILIES:
            expected[family] += gradients[family].square().sum(1)
    for family in FAMILIES:
        assert matrices[family].shape == (48, 64)
        assert_close(sums[layer].rows[family][expert], expected[family].float(), rms=1e-3, peak=1e-3)
