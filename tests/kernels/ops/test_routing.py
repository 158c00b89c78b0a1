import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from globe_kernels.ops.routing import (
    _BLOCK,
    RoutingPlan,
    launch_routing_plan,
    max_tiles,
    routing_plan_ref,
)
from tests.kernels.cases import DEVICE, needs_kernels

BUILDERS = [
    pytest.param(routing_plan_ref, id="reference"),
    pytest.param(launch_routing_plan, id="kernel", marks=needs_kernels),
]


def routed(plan: RoutingPlan) -> torch.Tensor:
    """The part of `order` that means something."""
    return plan.order[: int(plan.starts[-1])]


@pytest.mark.parametrize("build", BUILDERS)
def test_example_of_the_docstring(build):
    plan = build(torch.tensor([[2, 0], [0, 9]], device=DEVICE), 3, 1)
    assert routed(plan).tolist() == [1, 2, 0]
    assert plan.starts.tolist() == [0, 2, 2, 3]
    assert plan.tile_expert.tolist()[:4] == [0, 0, 2, -1]
    assert plan.tile_first.tolist()[:4] == [0, 1, 2, 0]
    assert plan.top_k == 2


def check(plan: RoutingPlan, index: torch.Tensor, experts: int, block_m: int) -> None:
    """Every row with an expert is in that expert's range, in order; the tiles cover each range once."""
    flat = index.flatten().tolist()
    starts = plan.starts.tolist()
    covered = []
    for expert, first in zip(plan.tile_expert.tolist(), plan.tile_first.tolist(), strict=True):
        if expert >= 0:
            covered += [(expert, place) for place in range(first, min(first + block_m, starts[expert + 1]))]
    expected = []
    for expert in range(experts):
        rows = plan.order[starts[expert] : starts[expert + 1]].tolist()
        assert rows == [row for row, chosen in enumerate(flat) if chosen == expert]
        expected += [(expert, place) for place in range(starts[expert], starts[expert + 1])]
    assert covered == expected


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 9), st.integers(1, 4), st.integers(1, 5), st.integers(1, 4), st.randoms(use_true_random=False))
def test_the_reference_groups_every_row(tokens, top_k, experts, block_m, random):
    ids = [[random.randint(-1, experts + 1) for _ in range(top_k)] for _ in range(tokens)]
    index = torch.tensor(ids, dtype=torch.int32).view(tokens, top_k)
    check(routing_plan_ref(index, experts, block_m), index, experts, block_m)


SHAPES = {
    "one token": (1, 8, 16, 16),
    "one block, ragged": (7, 3, 5, 16),
    "one block, full": (_BLOCK // 2, 2, 8, 16),
    "one row more than a block": (_BLOCK + 1, 1, 4, 32),
    "many blocks": (150, 4, 9, 64),
    "more experts than rows": (2, 2, 60, 16),
    "one expert": (40, 1, 1, 16),
}


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("rows", [4, _BLOCK + 4])
def test_an_id_past_int32_is_no_expert(build, rows):
    index = torch.tensor([[2**32 + 1], [-(2**32) + 1], [2**31], [1]], device=DEVICE).repeat(rows // 4, 1)
    check(build(index, 3, 16), index, 3, 16)


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize(("dtype", "experts"), [(torch.uint8, 256), (torch.int8, 128), (torch.int16, 300)], ids=str)
def test_small_integers(build, dtype, experts):
    """Rows past the end must not pass for the last expert, which -1 is as an unsigned byte."""
    index = torch.tensor([[0, 255], [3, 127], [255, 1]], device=DEVICE).to(dtype)
    check(build(index, experts, 16), index, experts, 16)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("shape", list(SHAPES))
def test_the_kernel_agrees_with_the_reference(shape, dtype):
    tokens, top_k, experts, block_m = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(-1, experts + 2, (tokens, top_k), generator=generator).to(DEVICE, dtype)
    plan, expected = launch_routing_plan(index, experts, block_m), routing_plan_ref(index, experts, block_m)
    for name in ("starts", "tile_expert", "tile_first"):
        assert torch.equal(getattr(plan, name), getattr(expected, name)), name
    assert torch.equal(routed(plan), routed(expected))
    check(plan, index.cpu(), experts, block_m)


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("experts", [1, 5, 64])
@pytest.mark.parametrize("chosen", [0, "all"])
def test_the_tile_bound_holds_in_the_extremes(build, experts, chosen):
    """All rows on one expert; and one row more than a full tile on every expert."""
    block_m = 16
    if chosen == "all":
        index = torch.arange(experts).repeat(block_m + 1)[:, None]
    else:
        index = torch.zeros(experts * (block_m + 1), 1, dtype=torch.long)
    plan = build(index.to(DEVICE), experts, block_m)
    used = int((plan.tile_expert >= 0).sum())
    assert used <= plan.num_tiles == max_tiles(index.numel(), experts, block_m)
    check(plan, index, experts, block_m)
