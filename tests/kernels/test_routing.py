import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from globe_kernels.routing import build_routing_plan_ref


def test_example_of_the_docstring():
    plan = build_routing_plan_ref(torch.tensor([[2, 0], [0, 9]]), num_experts=3)
    assert plan.order.tolist() == [1, 2, 0, 3]
    assert plan.starts.tolist() == [0, 2, 2, 3]
    assert plan.num_choices == 2


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 9), st.integers(1, 4), st.integers(1, 5), st.randoms(use_true_random=False))
def test_every_row_is_in_the_range_of_its_expert_and_nowhere_else(tokens, choices, experts, random):
    ids = [[random.randint(-1, experts + 1) for _ in range(choices)] for _ in range(tokens)]
    index = torch.tensor(ids, dtype=torch.int32).view(tokens, choices)
    plan = build_routing_plan_ref(index, experts)
    assert sorted(plan.order.tolist()) == list(range(tokens * choices))
    flat = index.flatten().tolist()
    for expert in range(experts):
        rows = plan.order[plan.starts[expert] : plan.starts[expert + 1]].tolist()
        assert rows == [row for row, chosen in enumerate(flat) if chosen == expert]
