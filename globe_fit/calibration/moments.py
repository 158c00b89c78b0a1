"""What a calibrated fit collects while the dense model runs over a text; the formulas are in globe_fit.calibration.metric."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from globe_fit.data.source import ExpertSource
from globe_kernels.format.architectures import FAMILIES, Architecture
from globe_kernels.model.targets import activation_of
from globe_kernels.ops.activations import GATED_ACTIVATIONS

_CHUNK = 4096  # tokens that are looked at together, which bounds the memory

OnBatch = Callable[[int, int], None]  # batches done, batches in all


@dataclass(frozen=True)
class Sums:
    """Of one layer: the moment C (D, D) and by family the sensitivities S (E, P) of the rows."""

    moment: torch.Tensor
    rows: dict[str, torch.Tensor]


@torch.no_grad()
def collect(
    model: Any, source: ExpertSource, batches: Sequence[torch.Tensor], device: str, on_batch: OnBatch | None = None
) -> dict[int, Sums]:
    """{layer id: its sums, float32 on the CPU} of all `batches` of windows, over which `model` runs."""
    with _accumulating(model, source, device) as totals:
        for number, batch in enumerate(batches):
            # without the head, whose logits are not needed, and without keys and values for a next token
            model.model(batch.to(device), use_cache=False)
            if on_batch is not None:
                on_batch(number + 1, len(batches))
    tokens = sum(batch.numel() for batch in batches)
    result = {}
    for layer in list(totals):
        total = totals.pop(layer)  # a layer at a time is held twice
        rows = {family: sums.float().cpu() for family, sums in total.rows.items()}
        result[layer] = Sums(total.moment.div_(tokens).float().cpu(), rows)
    return result


@contextmanager
def _accumulating(model: Any, source: ExpertSource, device: str) -> Iterator[dict[int, Sums]]:
    """Sums by layer of all that the experts of `model` are given inside."""
    activation = activation_of(model)
    experts_of = {layer.layer: layer.num_experts for layer in source.layers}
    width, inner = source.base.hidden_size, source.base.intermediate_size
    # fp32 on a GPU: fp64 is slow there, and the moments of a text err more than its sums
    dtype = torch.float64 if device == "cpu" else torch.float32
    totals: dict[int, Sums] = {}
    removers = []
    for layer, path in source.architecture.live_experts(model):
        rows = {family: torch.zeros(experts_of[layer], inner, dtype=dtype, device=device) for family in FAMILIES}
        totals[layer] = Sums(torch.zeros(width, width, dtype=dtype, device=device), rows)

        def add(experts: Any, inputs: tuple, total: Sums = totals[layer]) -> None:
            hidden, index, weight = inputs
            _add_moment(total.moment, hidden)
            _add_sensitivities(total.rows, source.architecture, experts, activation, hidden, index, weight)

        removers.append(_before_forward(model.get_submodule(path), add))
    try:
        yield totals
    finally:
        for remove in removers:
            remove()


def _before_forward(experts: Any, action: Callable[[Any, tuple], None]) -> Callable[[], object]:
    """Let `action` see the module, with its weights, and its inputs on every call; returns what ends that."""
    if not hasattr(experts, "_hf_hook"):
        return experts.register_forward_pre_hook(action).remove
    # offloaded: accelerate loads the weights inside the call, so the action must come after its hook
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    class Seen(ModelHook):
        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> tuple[tuple, dict]:
            action(module, args)
            return args, kwargs

    add_hook_to_module(experts, Seen(), append=True)
    return lambda: remove_hook_from_module(experts)


def _add_moment(total: torch.Tensor, hidden: torch.Tensor) -> None:
    for chunk in hidden.split(_CHUNK):
        x = chunk.to(total.dtype)
        total.addmm_(x.mT, x)


def _add_sensitivities(
    totals: dict[str, torch.Tensor],
    architecture: Architecture,
    experts: Any,
    activation: str,
    hidden: torch.Tensor,
    index: torch.Tensor,
    weight: torch.Tensor,
) -> None:
    """hidden (T, D); index and weight (T, K), where ids that name no expert contribute nothing."""
    count, choices = len(totals["gate"]), index.shape[1]
    ids, order = index.flatten().sort()
    squares = weight.flatten().float().square()
    bounds = torch.searchsorted(ids, torch.arange(count + 1, dtype=ids.dtype, device=ids.device)).tolist()
    down = architecture.kept("down_proj", experts.down_proj)["down_proj"]
    for expert, (start, stop) in enumerate(pairwise(bounds)):
        if start == stop:
            continue
        matrices = {f: architecture.part(experts.gate_up_proj, f)[expert].float() for f in FAMILIES}
        biases = {
            f: architecture.part(experts.gate_up_proj_bias, f)[expert].float() if architecture.has_bias else None
            for f in FAMILIES
        }
        reach = down[expert].float().square().sum(0)  # (P,)
        for places in order[start:stop].split(_CHUNK):
            x = hidden[places // choices].float()
            outputs = [torch.nn.functional.linear(x, matrices[f], biases[f]) for f in FAMILIES]
            for family, slope in zip(FAMILIES, _slopes(activation, outputs), strict=True):
                totals[family][expert] += (squares[places] @ slope.square()) * reach


def _slopes(activation: str, outputs: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Derivatives of the activation, which is elementwise, in the outputs of gate and up."""
    with torch.enable_grad():
        inputs = [output.requires_grad_() for output in outputs]
        return torch.autograd.grad(GATED_ACTIVATIONS[activation](*inputs).sum(), inputs)
