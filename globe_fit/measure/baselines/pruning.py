"""Drop the experts that add least to the outputs of their layer: REAP ("REAP the Experts", Cerebras, 2025).

    saliency of expert j = mean over the tokens t that are routed to j of w_tj ||f_j(x_t)||

w_tj is the router weight and f_j(x_t) the output of the expert. Each layer drops its experts of least saliency whole:
gate, up, down and the row of the router. The router then takes the top k of the experts that are left.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from globe_fit.measure.baselines.passes import watch_experts
from globe_kernels.errors import RequestError
from globe_kernels.model.discovery import DenseExperts, routed_experts, top_k_of

_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")  # spellings of E in modules
_GROUPS = ("n_group", "num_group")  # of experts in a router, which takes the best groups first


def saliencies(model: Any, batches: Sequence[torch.Tensor], device: str) -> dict[int, torch.Tensor]:
    """Run `model` over all `batches` of windows; return {layer id: saliency (E,)}, 0 where no token is routed to."""
    totals = {
        layer: torch.zeros(2, dense.sizes[0], dtype=torch.float64, device=device)  # sums, tokens
        for layer, dense in routed_experts(model).items()
    }

    def add(dense: DenseExperts, hidden: torch.Tensor, index: torch.Tensor, router_weight: torch.Tensor) -> None:
        of_norms, tokens = totals[dense.layer]
        for choice in range(index.shape[1]):
            ids, weight = index[:, choice], router_weight[:, choice].double()
            # forward, not a call: a call would be watched too
            outputs = dense.module.forward(hidden, ids[:, None], torch.ones_like(router_weight[:, :1]))
            norms = torch.linalg.vector_norm(outputs, dim=-1, dtype=torch.float32)
            of_norms.index_add_(0, ids, weight * norms)
            tokens.index_add_(0, ids, torch.ones_like(weight))

    watch_experts(model, batches, device, add)
    return {layer: (of_norms / tokens.clamp(min=1)).cpu() for layer, (of_norms, tokens) in totals.items()}


def most_salient(saliency: torch.Tensor, share: float) -> torch.Tensor:
    """Return the ids, ascending, of the experts that a layer of saliency (E,) keeps: at most `share` of them."""
    count = int(share * len(saliency) + 1e-9)  # 0.29 * 100 is less than 29
    return saliency.topk(max(count, 1)).indices.sort().values


def prune(model: nn.Module, kept: Mapping[int, torch.Tensor]) -> None:
    """Drop the experts of a model, in place, that are not among the ids `kept` of their layer.

    Raises RequestError for a router that cannot choose among fewer experts.
    """
    for layer, dense in routed_experts(model).items():
        if layer in kept:
            _prune_layer(model, dense, kept[layer])


def _prune_layer(model: nn.Module, dense: DenseExperts, ids: torch.Tensor) -> None:
    count, _, width = dense.sizes
    block = model.get_submodule(dense.name.rpartition(".")[0])
    if len(ids) < (top_k := top_k_of(model, dense)):
        raise RequestError(
            f"{len(ids)} of {count} experts of layer {dense.layer} would be left and a token takes {top_k}; keep more."
        )
    own = set(dense.module.modules())
    beside = [module for module in block.modules() if module not in own]
    routers = [module for module in beside if any(p.shape == (count, width) for p in module.parameters(recurse=False))]
    if len(routers) != 1:
        raise RequestError(
            f"{len(routers)} modules beside {dense.name} have a weight of {count} x {width}, and a router is one; this "
            "model cannot be pruned here."
        )
    if any((getattr(module, name, None) or 1) > 1 for module in (block, *routers) for name in _GROUPS):
        raise RequestError(
            f"The router beside {dense.name} chooses groups of experts, which must stay equal; this model cannot be "
            "pruned here."
        )
    _keep(dense.module, ids, lambda tensor: True)
    for module in {block, *routers}:
        _keep(module, ids, lambda tensor: tensor.shape in ((count,), (count, width)))
    for module in (block, *routers, dense.module):
        for name in _COUNTS:
            if getattr(module, name, None) == count:
                setattr(module, name, len(ids))


def _keep(module: nn.Module, ids: torch.Tensor, of_experts: Any) -> None:
    """Keep the rows `ids` of the tensors of a module alone that `of_experts` says have a row per expert."""
    for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        if of_experts(tensor):
            rows = tensor.detach()[ids.to(tensor.device)]
            is_parameter = isinstance(tensor, nn.Parameter)
            setattr(module, name, nn.Parameter(rows, requires_grad=False) if is_parameter else rows)
