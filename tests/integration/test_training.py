"""Training around frozen experts: the gradients of other layers are those of the dense reconstruction."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import globe_kernels
from globe_kernels import RequestError
from globe_kernels.model import scratch
from globe_kernels.model.scratch import ScratchBuffers
from globe_kernels.model.targets import globe_modules
from globe_kernels.ops import compose_layer, moe_ffn, moe_ffn_backward
from globe_kernels.testing import assert_close
from tests.conftest import MODEL_TYPES
from tests.integration.test_strategies import Stream, patched, reconstructions, shallow  # noqa: F401
from tests.kernels.cases import needs_kernels, same_tiles

RUNS = ["composed", "bank_first", "scratch", "cached, a quarter"]
BATCHES = torch.randint(1, 128, (2, 2, 12), generator=torch.Generator().manual_seed(7))


class Lora(nn.Module):
    """A frozen linear layer and the product of two trained matrices beside it."""

    def __init__(self, linear: nn.Linear, rank: int = 4):
        super().__init__()
        generator = torch.Generator().manual_seed(linear.out_features)
        self.linear = linear
        self.down = nn.Parameter(torch.randn(rank, linear.in_features, generator=generator) / 8)
        self.up = nn.Parameter(torch.randn(linear.out_features, rank, generator=generator) / 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + x @ self.down.T @ self.up.T


def with_lora(model) -> dict[str, nn.Parameter]:
    """Freeze the model, put LoRA on its attention, and train its routers: {name: parameter}."""
    model.requires_grad_(False).train()
    names = [name for name, module in model.named_modules() if ".self_attn." in name and isinstance(module, nn.Linear)]
    for name in names:
        model.set_submodule(name, Lora(model.get_submodule(name)))
    for name, parameter in model.named_parameters():
        if name.endswith((".gate.weight", ".router.weight")):
            parameter.requires_grad_()
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def loss_of(model, tokens: torch.Tensor = BATCHES[0]) -> torch.Tensor:
    return model(tokens, labels=tokens).loss


def gradients(model, parameters) -> dict[str, torch.Tensor]:
    for parameter in parameters.values():
        parameter.grad = None
    loss_of(model).backward()
    return {name: parameter.grad.clone() for name, parameter in parameters.items() if parameter.grad is not None}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], limit: float = 1e-4) -> None:
    assert list(found) == list(expected) and found
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        assert_close(found[name], gradient, rms=limit, peak=2 * limit)


# Every way to run the experts of two architectures, without biases and with them, and each of the others by one way:
# what an architecture adds is around the experts.
@pytest.mark.parametrize(
    ("model_type", "run"),
    [
        (name, run)
        for number, name in enumerate(MODEL_TYPES)
        for run in (RUNS if name in ("qwen3_moe", "gpt_oss") else [RUNS[number % len(RUNS)]])
    ],
)
def test_two_steps_of_lora_are_those_of_the_dense_reconstruction(model_type, run, fit_tiny, reconstructions):  # noqa: F811
    model, dense = patched(fit_tiny(model_type)[0], model_type, run), copy.deepcopy(reconstructions(model_type))
    pairs = [(each, with_lora(each)) for each in (model, dense)]
    history = []
    for _ in range(2):
        losses, found = [], []
        for each, parameters in pairs:
            optimizer = torch.optim.SGD(parameters.values(), lr=0.1)
            losses.append([loss_of(each, tokens) for tokens in BATCHES])
            for loss in losses[-1]:
                (loss / len(BATCHES)).backward()
            found.append({name: each.grad.clone() for name, each in parameters.items() if each.grad is not None})
            optimizer.step()
            optimizer.zero_grad()
        assert torch.allclose(torch.stack(losses[0]), torch.stack(losses[1]), rtol=1e-5)
        assert_same(*found)
        history.append(sum(losses[0]))
    assert history[1] < history[0]


@pytest.mark.parametrize(("run", "use_reentrant"), [*((run, False) for run in RUNS), ("scratch", True)])
def test_gradient_checkpointing(run, use_reentrant, fit_tiny):
    model = patched(fit_tiny()[0], run=run)
    parameters = with_lora(model)
    expected = gradients(model, parameters)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    calls = sum(globe_kernels.call_counts().values())
    assert_same(gradients(model, parameters), expected, limit=1e-6)
    assert sum(globe_kernels.call_counts().values()) == calls + 3 * 3, "forward, again, backward"


@pytest.mark.parametrize("run", ["scratch", "cached, a quarter"])
def test_compiled_with_its_backward(run, shallow):  # noqa: F811
    model = shallow(run=run)
    parameters = with_lora(model)
    expected = gradients(model, parameters)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for parameter in parameters.values():
        parameter.grad = None
    compiled(BATCHES[0], labels=BATCHES[0]).loss.backward()
    assert_same({name: parameter.grad for name, parameter in parameters.items()}, expected, limit=1e-5)


@pytest.mark.parametrize("run", RUNS)
def test_autocast(run, fit_tiny, reconstructions):  # noqa: F811
    model, dense = patched(fit_tiny()[0], run=run), copy.deepcopy(reconstructions("qwen3_moe"))
    parameters, exact = with_lora(model), with_lora(dense)
    expected = gradients(dense, exact)
    with torch.autocast("cpu", torch.bfloat16):
        found, of_dense = gradients(model, parameters), gradients(dense, exact)
    for name, gradient in expected.items():
        error, limit = ((each[name] - gradient).norm() / gradient.norm() for each in (found, of_dense))
        assert error <= 2 * limit + 0.05


def test_a_buffer_that_is_composed_over_does_not_reach_the_backward(fit_tiny, reconstructions, monkeypatch):  # noqa: F811
    monkeypatch.setattr(ScratchBuffers, "can_run", lambda *_: True)
    monkeypatch.setattr(scratch, "_side_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)
    model, dense = patched(fit_tiny()[0], run="scratch"), copy.deepcopy(reconstructions("qwen3_moe"))
    parameters = with_lora(model)
    assert_same(gradients(model, parameters), gradients(dense, with_lora(dense)))


@needs_kernels
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the kernels run there")
def test_the_kernels_train_a_whole_model(shallow, monkeypatch):  # noqa: F811
    """In the interpreter, fp32: the same gradients as by the references."""
    model = shallow("gpt_oss", "scratch")
    parameters = with_lora(model)
    expected = gradients(model, parameters)
    for module in (moe_ffn, moe_ffn_backward, compose_layer):
        monkeypatch.setattr(module, "use_triton", lambda tensor: True)
    for module in (moe_ffn, moe_ffn_backward):
        monkeypatch.setattr(module, "choose", lambda *_: same_tiles(16, 64, 64, group_m=2))
    calls = globe_kernels.call_counts().get("moe_ffn_backward", 0)
    assert_same(gradients(model, parameters), expected)
    assert globe_kernels.call_counts()["moe_ffn_backward"] == calls + len(globe_modules(model))


def test_factors_are_frozen_and_stay_so(fit_tiny, tmp_path):
    model = patched(fit_tiny()[0])
    model.save_pretrained(tmp_path)
    for each in (model, AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert not any(p.requires_grad for module in globe_modules(each).values() for p in module.parameters())
        assert not any(p.requires_grad for p in each.globe_bank.parameters())
        loss_of(each.train()).backward()
        assert each.model.embed_tokens.weight.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("model.layers.1.mlp.experts.gate_adapter", r"^Layer 1 has factors that require a gradient \(gate_adapter\)"),
        ("model.layers.1.mlp.experts.down_proj", r"Layer 1 .*\(down_proj\) and GloBE trains the layers around frozen"),
        ("globe_bank.up", r"Layer 0 .*\(atoms of up\)"),
        (
            "",
            r"Layer 0 .*\(gate_adapter, up_adapter, down_proj, atoms of gate, atoms of up\) .* requires_grad_\(False\)",
        ),
    ],
)
@pytest.mark.parametrize("run", ["composed", "scratch"])
def test_a_trained_factor_is_refused(run, name, sentence, fit_tiny):
    model = patched(fit_tiny()[0], run=run)
    model.requires_grad_(not name)
    if name:
        model.get_parameter(name).requires_grad_()
    with pytest.raises(RequestError, match=sentence):
        loss_of(model)
    with torch.no_grad():
        assert torch.isfinite(loss_of(model))
