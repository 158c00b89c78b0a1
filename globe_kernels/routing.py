"""Which token goes to which expert, sorted by expert: computed once per layer and passed whole."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RoutingPlan:
    """The routed rows of one layer, grouped by expert.

    A routed row is one (token, choice) pair; row `t * K + k` is choice k of token t, S = T * K rows.

        top_k_index = [[2, 0], [0, 9]] with E = 3 (id 9 is a sentinel: no expert)
        order  = [1, 2, 0, 3]   rows by expert, stable; sentinel rows last
        starts = [0, 2, 2, 3]   rows of expert e are order[starts[e]:starts[e + 1]]
    """

    order: torch.Tensor  # (S,) int64
    starts: torch.Tensor  # (E + 1,) int64
    num_choices: int  # K


def build_routing_plan_ref(top_k_index: torch.Tensor, num_experts: int) -> RoutingPlan:
    """Group the rows of `top_k_index` (T, K) by expert; ids outside 0..E-1 belong to no expert."""
    ids = top_k_index.flatten()
    ids = torch.where((ids >= 0) & (ids < num_experts), ids, num_experts)
    order = torch.argsort(ids, stable=True)
    counts = torch.bincount(ids, minlength=num_experts + 1)[:num_experts]
    starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    return RoutingPlan(order, starts, top_k_index.shape[1])
