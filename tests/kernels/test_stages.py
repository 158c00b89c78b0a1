"""Each stage of the FFN on its own: kernel and reference against the formula, row by row."""

import mmap

import pytest
import torch
import torch.nn.functional as F

from globe_kernels.ops.down import down, down_ref
from globe_kernels.ops.gate_up import gate_up, gate_up_ref
from globe_kernels.ops.low_rank_in import low_rank_in, low_rank_in_ref
from globe_kernels.ops.routing_plan import routing_plan, routing_plan_ref
from globe_kernels.ops.tuning import CONFIGS, SHARED_LIMITS, SMALLEST_LIMIT, GemmConfig, choose, fit_to, supports
from globe_kernels.testing import assert_close
from tests.kernels.cases import DEVICE, ROUTINGS, E, needs_kernels

CONFIG = GemmConfig(16, 16, 16, group_m=2, num_warps=4, num_stages=2)
D, P, R = 24, 18, 9


def draw(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(DEVICE) / shape[-1] ** 0.5


def setup(routing: str):
    index = ROUTINGS[routing].to(DEVICE)
    plan = routing_plan_ref(index, E, CONFIG.block_m)
    used = int(plan.starts[-1])
    rows = plan.order[:used].long()
    return index, plan, used, rows // index.shape[1], index.flatten()[rows].long()


IMPLEMENTATIONS = ["reference", pytest.param("kernel", marks=needs_kernels)]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("routing", list(ROUTINGS))
def test_low_rank_in(routing, implementation):
    _, plan, used, token, expert = setup(routing)
    x, basis = draw(int(token.max()) + 7, D), draw(E, 2 * R, D)
    x = x[: plan.num_rows // plan.num_choices] if len(x) > plan.num_rows // plan.num_choices else x
    h = low_rank_in_ref(x, plan, basis) if implementation == "reference" else low_rank_in(x, plan, basis, CONFIG)
    expected = torch.einsum("snd,sd->sn", basis[expert].double(), x[token].double())
    assert h.shape == (plan.num_rows, 2 * R)
    assert_close(h[:used], expected, rms=1e-6, peak=2e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("routing", list(ROUTINGS))
def test_gate_up(routing, implementation):
    _, plan, used, _, expert = setup(routing)
    h, gate, up = draw(plan.num_rows, 2 * R), draw(E, P, R), draw(E, P, R) + 0.1
    if implementation == "reference":
        y = gate_up_ref(h, plan, gate, up, "silu")
    else:
        y = gate_up(h, plan, gate, up, "silu", CONFIG)
    by_row = [
        torch.einsum("spr,sr->sp", adapter[expert].double(), half.double())
        for adapter, half in ((gate, h[:used, :R]), (up, h[:used, R:]))
    ]
    assert_close(y[:used], F.silu(by_row[0]) * by_row[1], rms=1e-6, peak=2e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("routing", list(ROUTINGS))
def test_down(routing, implementation):
    index, plan, used, token, expert = setup(routing)
    y, weight = draw(plan.num_rows, P), draw(E, D, P)
    scale = torch.rand(index.shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    if implementation == "reference":
        out = down_ref(y, plan, weight, scale)
    else:
        out = down(y, plan, weight, index, scale, CONFIG)
    rows = torch.einsum("sdp,sp->sd", weight[expert].double(), y[:used].double())
    rows *= scale.flatten()[plan.order[:used].long()].double()[:, None]
    expected = torch.zeros(index.shape[0], D, dtype=torch.float64, device=DEVICE).index_add_(0, token.long(), rows)
    assert_close(out, expected, rms=1e-6, peak=2e-6)


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
    plan = routing_plan(index, 1, 16)
    h = low_rank_in(x, plan, basis, GemmConfig(16, 16, 4096, group_m=1, num_warps=4, num_stages=2))
    assert_close(h[:1], x[-1:].double() @ basis[0].double().T, rms=2e-3, peak=4e-3)


def test_every_card_runs_every_configuration_that_it_is_given():
    for limit in {*SHARED_LIMITS.values(), SMALLEST_LIMIT}:
        for item_size in (2, 4):
            for _, config in CONFIGS:
                fitted = fit_to(config, item_size, limit)
                assert supports(fitted, item_size, limit)
                assert fitted.num_stages >= 2 and fitted.block_k >= 16
                assert (fitted.block_m, fitted.block_n) == (config.block_m, config.block_n)


def test_the_row_tile_follows_the_rows_per_expert():
    tiles = [choose(rows, 128, 2, 227 * 1024).block_m for rows in (8, 512, 8192, 2**17)]
    assert tiles == [16, 16, 64, 128]
