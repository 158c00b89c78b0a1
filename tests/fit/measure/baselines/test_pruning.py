"""Pruned models against routers and experts of the whole model."""

import pytest
import torch

from globe_fit.data.model import load_model
from globe_fit.measure.baselines.pruning import most_salient, prune, saliencies
from globe_kernels.errors import RequestError
from globe_kernels.model.discovery import routed_experts
from globe_kernels.testing import assert_close

TYPES = ("qwen3_moe", "olmoe", "glm4_moe", "mixtral", "gpt_oss")  # gpt_oss: transposed, with biases
KEPT = torch.tensor([0, 2, 3, 6])  # of 8


@pytest.fixture(scope="module")
def windows() -> torch.Tensor:
    return torch.randint(1, 128, (4, 20), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def calls(model, windows: torch.Tensor) -> list[tuple]:
    """(inputs, output) of the experts of every layer."""
    seen = []
    hooks = [
        dense.module.register_forward_hook(lambda _, inputs, output: seen.append((inputs, output)))
        for dense in routed_experts(model).values()
    ]
    model(windows)
    for hook in hooks:
        hook.remove()
    return seen


def of_expert(module, expert: int, hidden: torch.Tensor) -> torch.Tensor:
    """The outputs of one expert for all tokens."""
    return module(hidden, torch.full((len(hidden), 1), expert), torch.ones(len(hidden), 1))


@pytest.mark.parametrize("model_type", TYPES)
def test_saliency_is_the_mean_of_the_weighted_norms(save_tiny, windows, model_type):
    model = load_model(save_tiny(model_type), dtype=torch.float32)
    found = saliencies(model, windows.split(3), "cpu")
    layer, dense = list(routed_experts(model).items())[-1]
    (hidden, index, weight), _ = calls(model, windows)[-1]
    expected = torch.zeros(8)
    for expert in range(8):
        norms = [
            weight[token, choice] * of_expert(dense.module, expert, hidden[token : token + 1]).norm()
            for token, choice in (index == expert).nonzero().tolist()
        ]
        expected[expert] = sum(norms) / max(len(norms), 1)
    assert_close(found[layer].float(), expected, rms=1e-4, peak=1e-4)
    assert not any(dense.module._forward_pre_hooks for dense in routed_experts(model).values())


def test_experts_of_least_saliency_are_dropped():
    saliency = torch.tensor([0.4, 0.1, 0.0, 0.9, 0.3])
    assert most_salient(saliency, 0.6).tolist() == [0, 3, 4]
    assert most_salient(saliency, 0.59).tolist() == [0, 3] and most_salient(saliency, 0.01).tolist() == [3]
    assert len(most_salient(torch.rand(100), 0.29)) == 29


@pytest.mark.parametrize("model_type", TYPES)
def test_the_router_takes_the_best_of_the_experts_that_are_left(save_tiny, windows, model_type):
    """Against the whole model with a router whose dropped experts are never chosen, layer by layer."""
    whole, pruned = (load_model(save_tiny(model_type), dtype=torch.float32) for _ in range(2))
    for model in (whole, pruned):
        for name, buffer in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.linspace(-0.2, 0.2, 8))
    prune(pruned, dict.fromkeys(routed_experts(whole), KEPT))
    dropped = [expert for expert in range(8) if expert not in KEPT]
    for old, new, call in zip(
        routed_experts(whole).values(), routed_experts(pruned).values(), calls(pruned, windows), strict=True
    ):
        (hidden, index, weight), output = call
        assert new.sizes == (4, *old.sizes[1:]) and index.max() < 4
        router = next(
            module
            for module in whole.get_submodule(old.name.rpartition(".")[0]).children()
            if any(parameter.shape == (8, 64) for parameter in module.parameters(recurse=False))
        )
        logits = hidden @ router.weight.T + getattr(router, "bias", 0.0)
        if model_type == "glm4_moe":
            scores = logits.sigmoid()
            choice = scores + router.e_score_correction_bias
        elif model_type == "gpt_oss":
            scores = choice = logits
        else:
            scores = choice = logits.softmax(1)
        choice = choice.index_fill(1, torch.tensor(dropped), -torch.inf)
        chosen = choice.topk(index.shape[1]).indices
        assert torch.equal(KEPT[index].sort(1).values, chosen.sort(1).values)
        expected = scores.gather(1, KEPT[index])
        if model_type == "gpt_oss":
            expected = expected.softmax(1)
        elif getattr(router, "norm_topk_prob", model_type == "mixtral"):
            expected = expected / expected.sum(1, keepdim=True) * getattr(router, "routed_scaling_factor", 1.0)
        else:  # a softmax over the experts that are left
            expected = expected / scores[:, KEPT].sum(1, keepdim=True)
        assert_close(weight, expected, rms=1e-5, peak=1e-5)
        with torch.no_grad():
            assert_close(output, old.module(hidden, KEPT[index], weight), rms=1e-5, peak=1e-5)


def test_layers_that_are_not_named_stay(save_tiny, windows):
    whole, pruned = (load_model(save_tiny("qwen3_moe"), dtype=torch.float32) for _ in range(2))
    last = max(routed_experts(whole))
    prune(pruned, {last: KEPT})
    assert {layer: dense.sizes[0] for layer, dense in routed_experts(pruned).items()} == {
        layer: 4 if layer == last else 8 for layer in routed_experts(whole)
    }
    for (_, expected), (_, output) in list(zip(calls(whole, windows), calls(pruned, windows), strict=True))[:-1]:
        assert torch.equal(output, expected)


def test_a_model_that_cannot_be_pruned(save_tiny):
    model = load_model(save_tiny("qwen3_moe"))
    with pytest.raises(RequestError, match="1 of 8 experts of layer 0 would be left and a token takes 2; keep more."):
        prune(model, {0: torch.tensor([5])})
    model = load_model(save_tiny("deepseek_v3"))
    layer = next(iter(routed_experts(model)))
    with pytest.raises(RequestError, match="chooses groups of experts, which must stay equal; this model cannot be"):
        prune(model, {layer: KEPT})
