"""Run a model over a text and watch the inputs of its experts."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from globe_fit.data.model import running, text_part
from globe_kernels.model.discovery import DenseExperts, routed_experts

OnCall = Callable[[DenseExperts, torch.Tensor, torch.Tensor, torch.Tensor], None]


@torch.no_grad()
def watch_experts(model: Any, batches: Sequence[torch.Tensor], device: str, on_call: OnCall) -> None:
    """Run `model` over all `batches` of windows; `on_call` gets the experts of a layer and the inputs of each call.

    The inputs are hidden (T, D), the ids (T, K) of the chosen experts and the router weights (T, K).
    """
    hooks = [
        dense.module.register_forward_pre_hook(lambda _, inputs, dense=dense: on_call(dense, *inputs))
        for dense in routed_experts(model).values()
    ]
    try:
        with running("The model"):
            for batch in batches:
                text_part(model).base_model(batch.to(device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
