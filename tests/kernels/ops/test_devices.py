"""Kernels are launched where their tensors are, whatever the current device is."""

import importlib
import pkgutil
from contextlib import contextmanager

import pytest
import torch
from torch._library.custom_ops import CustomOpDef

from globe_kernels import ops
from globe_kernels.functional import moe_ffn
from globe_kernels.ops.moe_ffn import ExpertWeights, FromRank
from globe_kernels.ops.triton_import import on_its_device

OPS = {
    value._name: value
    for module in pkgutil.iter_modules(ops.__path__)
    for value in vars(importlib.import_module(f"{ops.__name__}.{module.name}")).values()
    if isinstance(value, CustomOpDef)
}


@pytest.mark.parametrize("name", sorted(OPS))
def test_every_op_runs_on_the_device_of_its_tensors(name):
    assert len(OPS) > 10
    assert hasattr(OPS[name]._init_fn, "__wrapped__"), "no @on_its_device under torch.library.custom_op"


class OnCard:
    """As far as the guard looks: a tensor on the second card."""

    is_cuda = True
    device = torch.device("cuda", 1)


def test_the_device_of_the_first_tensor_is_the_current_one(monkeypatch):
    current = [0]

    @contextmanager
    def device(wanted: torch.device):
        before, current[0] = current[0], wanted.index
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "device", device)
    seen = on_its_device(lambda tensor, *, more: (current[0], more))
    assert seen(OnCard(), more=3) == (1, 3) and current == [0]
    assert seen(torch.zeros(1), more=3) == (0, 3), "a CPU has no current device"


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_layer_on_the_second_gpu():
    torch.manual_seed(0)
    shapes = ((8, 64, 128), (8, 96, 32), (8, 96, 32), (8, 128, 96))
    case = (
        torch.randn(5, 128),
        torch.randint(8, (5, 2)),
        torch.rand(5, 2),
        *(torch.randn(shape) / 8 for shape in shapes),
    )
    found = []
    for device in ("cuda:0", "cuda:1"):
        hidden, index, scale, basis, *rest = (tensor.to(device) for tensor in case)
        found.append(moe_ffn(hidden, index, scale, ExpertWeights(basis, FromRank(*rest)), "silu").cpu())
    assert torch.equal(*found) and found[0].abs().max() > 0
