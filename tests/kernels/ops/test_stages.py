"""Each stage of the FFN on its own: kernel and reference against the formula, row by row."""

import mmap

import pytest
import torch
import torch.nn.functional as F

from globe_kernels.ops.down import Down, down_ref, launch_down
from globe_kernels.ops.gate_up import GatedAdapters, gate_up_ref, launch_gate_up
from globe_kernels.ops.low_rank_in import launch_low_rank_in, low_rank_in_ref
from globe_kernels.ops.routing import launch_routing_plan, routing_plan_ref
from globe_kernels.ops.tuning import GemmConfig
from globe_kernels.testing import assert_close
from tests.kernels.cases import DEVICE, KERNEL_DTYPES, ROUTINGS, E, needs_kernels

BLOCK_M, CONFIG = 16, GemmConfig(16, 16, group_m=2, num_warps=4, num_stages=2)
D, P, R = 24, 18, 9


# (rms, peak): at about twice what torch itself errs; two roundings of a half lie between a stage's input and output
LIMITS = {torch.float32: (1e-6, 2e-6), torch.float16: (1e-3, 2e-3), torch.bfloat16: (8e-3, 1.6e-2)}


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(*shape, generator=generator) / shape[-1] ** 0.5).to(DEVICE, dtype)


def setup(routing: str):
    index = ROUTINGS[routing].to(DEVICE)
    plan = routing_plan_ref(index, E, BLOCK_M)
    used = int(plan.starts[-1])
    rows = plan.order[:used].long()
    return index, plan, used, rows // index.shape[1], index.flatten()[rows].long()


IMPLEMENTATIONS = ["reference", pytest.param("kernel", marks=needs_kernels)]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("routing", list(ROUTINGS))
def test_low_rank_in(routing, dtype, implementation):
    index, plan, used, token, expert = setup(routing)
    x, basis = draw(index.shape[0], D, dtype=dtype), draw(E, 2 * R, D, dtype=dtype)
    h = {
        "reference": lambda: low_rank_in_ref(x, plan, basis),
        "kernel": lambda: launch_low_rank_in(x, plan, basis, CONFIG),
    }[implementation]()
    expected = torch.einsum("snd,sd->sn", basis[expert].double(), x[token].double())
    assert h.shape == (plan.num_rows, 2 * R)
    assert_close(h[:used], expected, *LIMITS[dtype])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("routing", list(ROUTINGS))
def test_gate_up(routing, dtype, implementation):
    _, plan, used, _, expert = setup(routing)
    h = draw(plan.num_rows, 2 * R, dtype=dtype)
    weight, bias = draw(E, P, R, dtype=dtype), draw(E, P, dtype=dtype)
    adapters = GatedAdapters(weight, weight + 0.1, bias + 0.2, bias - 0.3)
    y = {
        "reference": lambda: gate_up_ref(h, plan, adapters, "silu"),
        "kernel": lambda: launch_gate_up(h, plan, adapters, "silu", CONFIG),
    }[implementation]()
    by_row = [
        torch.einsum("spr,sr->sp", adapter[expert].double(), half.double()) + bias[expert].double()
        for adapter, half, bias in (
            (adapters.gate, h[:used, :R], adapters.gate_bias),
            (adapters.up, h[:used, R:], adapters.up_bias),
        )
    ]
    assert_close(y[:used], F.silu(by_row[0]) * by_row[1], *LIMITS[dtype])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("routing", list(ROUTINGS))
def test_down(routing, dtype, implementation):
    index, plan, used, token, expert = setup(routing)
    y = draw(plan.num_rows, P, dtype=dtype)
    weights = Down(draw(E, D, P, dtype=dtype), draw(E, D, dtype=dtype) + 0.1)
    scale = torch.rand(index.shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    out = {
        "reference": lambda: down_ref(y, plan, weights, scale),
        "kernel": lambda: launch_down(y, plan, weights, (index, scale), CONFIG),
    }[implementation]()
    rows = torch.einsum("sdp,sp->sd", weights.weight[expert].double(), y[:used].double())
    rows += weights.bias[expert].double()
    rows *= scale.flatten()[plan.order[:used].long()].double()[:, None]
    expected = torch.zeros(index.shape[0], D, dtype=torch.float64, device=DEVICE).index_add_(0, token.long(), rows)
    assert_close(out, expected, *LIMITS[dtype])


@needs_kernels
@pytest.mark.skipif(DEVICE == "cuda", reason="reserves address space, which only costs nothing on a CPU")
def test_addresses_past_int32():
    """The last token lies more than 2^31 values into x: an int32 offset would be negative."""
    width, tokens = 2**16, 2**15 + 2
    memory = mmap.mmap(-1, width * tokens * 2)  # 4.3 GB of address space; one row of it is touched
    x = torch.frombuffer(memory, dtype=torch.float16).view(tokens, width)
    assert (tokens - 1) * width > 2**31
    x[-1] = draw(width).half()
    basis = draw(1, 16, width).half() * 50
    index = torch.ones(tokens, 1, dtype=torch.int64)  # a sentinel, but for the last token
    index[-1] = 0
    plan = launch_routing_plan(index, 1, 16)
    h = launch_low_rank_in(x, plan, basis, GemmConfig(16, 4096, group_m=1, num_warps=4, num_stages=2))
    assert_close(h[:1], x[-1:].double() @ basis[0].double().T, rms=2e-3, peak=4e-3)
