import pytest
import torch

from globe_fit.data.model import load_model
from globe_fit.measure.baselines.gptq import gptq, routed_moments
from globe_fit.measure.baselines.rounding import FORMATS, CodeFormat, rounded
from globe_kernels.model.discovery import routed_experts
from globe_kernels.testing import assert_close

GROUPED = [name for name, codes in FORMATS.items() if codes.group]


@pytest.fixture
def weights() -> torch.Tensor:
    return torch.randn(3, 7, 80, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def moment() -> torch.Tensor:
    """Of 200 inputs that lie near a subspace of 8 of the 80 dimensions."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(200, 8, generator=generator) @ torch.randn(8, 80, generator=generator)
    inputs += 0.1 * torch.randn(200, 80, generator=generator)
    return inputs.mT @ inputs / 200


def lost(error: torch.Tensor, moment: torch.Tensor) -> float:
    """The squared error of the outputs."""
    return (error.double() @ moment.double() * error).sum().item()


@pytest.mark.parametrize("name", GROUPED)
def test_the_outputs_err_less_than_those_of_rounding(weights, moment, name):
    codes = FORMATS[name]
    nearest, found = rounded(weights, codes), gptq(weights, moment, codes)
    assert lost(weights - found, moment) < 0.5 * lost(weights - nearest, moment)
    assert (weights - found).norm() > (weights - nearest).norm(), "rounding is the best of the weights"


@pytest.mark.parametrize("name", GROUPED)
@pytest.mark.parametrize("level", [0.0, 1.0, 1e-20])
def test_without_correlations_it_is_rounding(weights, name, level):
    assert torch.equal(gptq(weights, level * torch.eye(80), FORMATS[name]), rounded(weights, FORMATS[name]))


def test_every_value_is_one_of_the_codes(weights, moment):
    codes = CodeFormat(2, 32)
    for group in codes.split(gptq(weights, moment, codes).flatten(0, 1)):
        assert max(len(row.unique()) for row in group) <= 4


def test_the_last_column_is_rounded_to_the_best_of_its_grid():
    """Two columns whose inputs are the same: the second makes up for the error of the first."""
    weights, moment = torch.tensor([[[0.4, 0.0, 1.0]]]), torch.tensor([[1.0, 1, 0], [1, 1, 0], [0, 0, 1]])
    found = gptq(weights, moment, CodeFormat(1, 3))  # codes for 0 and 1
    assert torch.equal(found, torch.tensor([[[0.0, 0.0, 1.0]]]))
    weights[0, 0, 1] = 0.4
    assert torch.equal(rounded(weights, CodeFormat(1, 3)), torch.tensor([[[0.0, 0.0, 1.0]]]))
    assert torch.equal(gptq(weights, moment, CodeFormat(1, 3)), torch.tensor([[[0.0, 1.0, 1.0]]]))


def test_the_given_weights_stay(weights, moment):
    before = weights.clone()
    gptq(weights, moment, CodeFormat(4, 32))
    assert torch.equal(weights, before)


def test_columns_of_large_inputs_come_first(weights, moment):
    """The same as rounding in this order, and at once for experts that have a moment each."""
    codes, scales = CodeFormat(2, 32), torch.linspace(0.1, 3, 80).flip(0)
    moments = torch.stack([moment, moment * scales[:, None] * scales, torch.eye(80)])
    found = gptq(weights, moments, codes, by_activation=True)
    for expert in range(3):
        order = moments[expert].diagonal().argsort(descending=True, stable=True)
        expected = gptq(weights[[expert]][..., order], moments[expert][order][:, order], codes)
        assert_close(found[[expert]][..., order], expected, rms=1e-6, peak=1e-5)


def test_moments_of_routed_tokens(save_tiny):
    """C_i of an expert, shrunk by as many tokens as columns; an expert without tokens takes the moment of the layer."""
    model = load_model(save_tiny("qwen3_moe"), dtype=torch.float32)
    windows = torch.randint(1, 128, (2, 9), generator=torch.Generator().manual_seed(0))
    seen = {}
    hook = routed_experts(model)[0].module.register_forward_pre_hook(lambda _, inputs: seen.update(inputs=inputs))
    found = routed_moments(model, [windows], "cpu")
    hook.remove()
    hidden, index, _ = seen["inputs"]
    layer = hidden.mT @ hidden / 18
    assert found[0].shape == (8, 64, 64)
    for expert in range(8):
        own = hidden[(index == expert).any(1)]
        assert_close(found[0][expert], (own.mT @ own + 64 * layer) / (len(own) + 64), rms=1e-5, peak=1e-5)
