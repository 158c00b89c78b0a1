"""The activation that a layer of vLLM states, as globe_kernels computes it."""

from types import SimpleNamespace

import pytest
import torch
from vllm.model_executor.layers.activation import SiluAndMulWithClamp, SwigluOAIAndMul
from vllm.model_executor.layers.fused_moe.activation import MoEActivation

from globe_kernels.ops.activations import gated_activation
from globe_kernels.serving.vllm_method import activation_spec


def stating(alpha=None, limit=None, beta=None) -> SimpleNamespace:
    return SimpleNamespace(swiglu_alpha=alpha, swiglu_limit=limit, swiglu_beta=beta)


@pytest.mark.parametrize(
    ("activation", "layer", "settings"),
    [
        (MoEActivation.SILU, stating(limit=2.0), (2.0, 1.0, 0.0)),
        (MoEActivation.SWIGLUOAI_UNINTERLEAVE, stating(limit=2.0), (2.0, 1.0, 0.0)),
        (MoEActivation.SWIGLUOAI_UNINTERLEAVE, stating(1.5, 2.0, 1.0), (2.0, 1.5, 1.0)),
        (MoEActivation.SWIGLUOAI_UNINTERLEAVE, stating(1.0, 2.0, 1.0), (2.0, 1.0, 1.0)),
    ],
)
def test_settings_of_the_layer(activation, layer, settings):
    gate, up = 4 * torch.randn(2, 1000, generator=torch.Generator().manual_seed(0))
    own = SimpleNamespace(**dict(zip(("swiglu_limit", "alpha", "beta"), settings, strict=True)))
    expected = SiluAndMulWithClamp.forward_native(own, torch.cat([gate, up]))
    spec = activation_spec(activation, layer)
    assert spec is not None
    torch.testing.assert_close(gated_activation(spec)(gate, up), expected)


def test_the_defaults_of_gpt_oss():
    gate, up = 8 * torch.randn(2, 1000, generator=torch.Generator().manual_seed(0))
    expected = SwigluOAIAndMul.forward_native(
        SimpleNamespace(alpha=1.702, limit=7.0), torch.stack([gate, up], dim=-1).flatten()
    )
    spec = activation_spec(MoEActivation.SWIGLUOAI, stating())
    assert spec is not None
    torch.testing.assert_close(gated_activation(spec)(gate, up), expected)


@pytest.mark.parametrize(
    ("activation", "layer"),
    [
        (MoEActivation.SILU, stating(alpha=1.5)),
        (MoEActivation.SWIGLUOAI_UNINTERLEAVE, stating(1.5, 2.0)),
        (MoEActivation.SWIGLUOAI, stating(beta=0.5)),
        (MoEActivation.GELU, stating(limit=2.0)),
        (MoEActivation.SWIGLUSTEP, stating()),
    ],
)
def test_no_such_activation(activation, layer):
    assert activation_spec(activation, layer) is None
