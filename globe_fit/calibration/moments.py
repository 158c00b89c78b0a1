"""Collect sums over a text while the dense model runs over it, for the metric of a calibrated fit.

globe_fit.calibration.metric has the formulas.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from globe_fit.data.model import running, text_part
from globe_fit.data.source import ExpertSource
from globe_kernels.format.names import FAMILIES
from globe_kernels.model.discovery import DenseExperts, activation_of, routed_experts
from globe_kernels.ops.activations import gated_slopes

_CHUNK = 4096  # tokens that are summed together, which bounds the memory

OnBatch = Callable[[int, int], None]  # batches done, batches in all


@dataclass(frozen=True)
class Sums:
    """The sums of one layer: the moment C (D, D), and {family: sensitivities S (E, P) of the rows}."""

    moment: torch.Tensor
    rows: dict[str, torch.Tensor]


@torch.no_grad()
def collect(
    model: Any, source: ExpertSource, batches: Sequence[torch.Tensor], device: str, on_batch: OnBatch | None = None
) -> dict[int, Sums]:
    """Run `model` over all `batches` of windows; return {layer id: its sums, float32 on the CPU}."""
    body = text_part(model).base_model
    with _accumulating(model, source, device) as totals:
        for number, batch in enumerate(batches):
            # no head, because nobody needs the logits; no keys and values, because no token follows
            with running("The model"):
                body(batch.to(device), use_cache=False)
            if on_batch is not None:
                on_batch(number + 1, len(batches))
    tokens = sum(batch.numel() for batch in batches)
    result = {}
    for layer in list(totals):
        total = totals.pop(layer)  # pop: only one layer at a time is in memory twice
        rows = {family: sums.float().cpu() for family, sums in total.rows.items()}
        result[layer] = Sums(total.moment.div_(tokens).float().cpu(), rows)
    return result


@contextmanager
def _accumulating(model: Any, source: ExpertSource, device: str) -> Iterator[dict[int, Sums]]:
    """Yield {layer id: sums}; while the block runs, every call of the experts of `model` adds to them."""
    live = routed_experts(model)
    width, inner = source.base.hidden_size, source.base.intermediate_size
    # fp32 on a GPU: fp64 is slow there, and a finite text errs more than fp32 sums do
    dtype = torch.float64 if device == "cpu" else torch.float32
    totals: dict[int, Sums] = {}
    removers = []
    for layer, count in ((each.layer, each.num_experts) for each in source.layers):
        dense = live[layer]
        rows = {family: torch.zeros(count, inner, dtype=dtype, device=device) for family in FAMILIES}
        totals[layer] = Sums(torch.zeros(width, width, dtype=dtype, device=device), rows)

        def add(
            inputs: tuple, total: Sums = totals[layer], dense: DenseExperts = dense, spec: str = activation_of(dense)
        ) -> None:
            hidden, index, router_weight = inputs
            _add_moment(total.moment, hidden)
            _add_sensitivities(total.rows, dense, spec, hidden, index, router_weight)

        removers.append(before_forward(dense.module, add))
    try:
        yield totals
    finally:
        for remove in removers:
            remove()


def before_forward(experts: Any, action: Callable[[tuple], None]) -> Callable[[], object]:
    """Call `action` with the inputs before every call of a module, its weights loaded; return a remover."""
    if not hasattr(experts, "_hf_hook"):
        return experts.register_forward_pre_hook(lambda _, inputs: action(inputs)).remove
    # offloaded: the hook of accelerate loads the weights inside the call, so the action must come after that hook
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    class ActionHook(ModelHook):
        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> tuple[tuple, dict]:
            action(args)
            return args, kwargs

    add_hook_to_module(experts, ActionHook(), append=True)
    return lambda: remove_hook_from_module(experts)


def _add_moment(total: torch.Tensor, hidden: torch.Tensor) -> None:
    for chunk in hidden.split(_CHUNK):
        x = chunk.to(total.dtype)
        total.addmm_(x.mT, x)


def _add_sensitivities(
    totals: dict[str, torch.Tensor],
    dense: DenseExperts,
    activation: str,
    hidden: torch.Tensor,
    index: torch.Tensor,
    router_weight: torch.Tensor,
) -> None:
    """Add S to `totals` for hidden (T, D), index and router_weight (T, K); ids that name no expert add nothing."""
    count, top_k = len(totals["gate"]), index.shape[1]
    ids, order = index.flatten().sort()
    squares = router_weight.flatten().float().square()
    bounds = torch.searchsorted(ids, torch.arange(count + 1, dtype=ids.dtype, device=ids.device)).tolist()
    experts, layout = dense.module, dense.layout
    down = layout.canonical(experts.down_proj)
    for expert, (start, stop) in enumerate(pairwise(bounds)):
        if start == stop:
            continue
        matrices = {f: layout.part(experts.gate_up_proj, f)[expert].float() for f in FAMILIES}
        biases = {
            f: layout.part(experts.gate_up_proj_bias, f)[expert].float() if layout.has_bias else None for f in FAMILIES
        }
        reach = down[expert].float().square().sum(0)  # (P,) ||V[:, k]||^2
        for routed in order[start:stop].split(_CHUNK):  # numbers of routed rows, t * K + k
            x = hidden[routed // top_k].float()
            outputs = [torch.nn.functional.linear(x, matrices[f], biases[f]) for f in FAMILIES]
            for family, slope in zip(FAMILIES, gated_slopes(activation)(*outputs), strict=True):
                totals[family][expert] += (squares[routed] @ slope.square()) * reach
