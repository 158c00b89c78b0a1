"""Experts that several processes share: the parallel plans of transformers, and the share of one process.

    tensor parallel    a process has P / n rows of every expert: adapters (E, P / n, R), down (E, D, P / n)
    expert parallel    a process has E / n experts; every id outside them names no expert
    FSDP               a process keeps a part of every tensor, and has the whole tensors during a call

Codes and bank are whole everywhere. transformers splits the parameters by its plans, brings the tokens and sums the
results; `write_plans` gives it the entries. A split parameter is a DTensor: its shape is that of the whole, and no
kernel can read it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from globe_kernels.errors import RequestError

if TYPE_CHECKING:
    from globe_kernels.model.bank import GlobeBank
    from globe_kernels.model.experts import GlobeMoEFFN

_SPLIT_DIMS = ("tp", "ep")  # dimensions of a mesh along which a call sees a part; along others it sees the whole

# The styles of transformers: of the parameters, and of the module. In a tensor parallel model down_bias stays whole,
# and the first process adds it.
_TP_STYLES = {
    "gate_adapter": "colwise",  # splits the last dimension but one
    "up_adapter": "colwise",
    "gate_bias": "rowwise",  # splits the last dimension
    "up_bias": "rowwise",
    "down_proj": "rowwise",
}
_EP_STYLES = dict.fromkeys((*_TP_STYLES, "down_bias"), "grouped_gemm")  # splits the first dimension
_SUMMING_STYLES = {"moe_tp_experts", "ep_dispatch_experts"}


def is_split(tensor: Any) -> bool:
    """Whether a tensor is a DTensor, of which this process has a part."""
    module = sys.modules.get("torch.distributed.tensor")  # slow to import: before somebody has, there is no DTensor
    return module is not None and isinstance(tensor, module.DTensor)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Gather a DTensor, on all processes together; return any other tensor as it is."""
    return tensor.full_tensor() if is_split(tensor) else tensor  # pyright: ignore[reportAttributeAccessIssue]


def here(tensor: torch.Tensor) -> torch.Tensor:
    """Return the part of a DTensor that this process has; return any other tensor as it is."""
    return tensor.to_local() if is_split(tensor) else tensor  # pyright: ignore[reportAttributeAccessIssue]


def is_planned(module: nn.Module) -> bool:
    """Whether a plan of transformers brings the tokens of the module: it has put a forward in place of the class's."""
    return "forward" in vars(module) and not hasattr(module, "_hf_hook")  # the other is accelerate's


def called_range(module: nn.Module, name: str, dim: int) -> range:
    """Return the places along `dim` of the whole parameter `name` that a call on this process sees."""
    tensor: Any = getattr(module, name)
    size, split = tensor.shape[dim], _SPLIT_DIMS + ((None,) if is_planned(module) else ())
    if not is_split(tensor):
        return range(size)
    mesh = tensor.device_mesh
    # transformers before 5.20 gives no names, and neither does FSDP
    names = mesh.mesh_dim_names or (None,) * mesh.ndim
    for number, (dim_name, placement) in enumerate(zip(names, tensor.placements, strict=True)):
        if dim_name in split and placement.is_shard() and placement.dim % tensor.ndim == dim % tensor.ndim:
            each = -(-size // mesh.size(number))
            first = min(mesh.get_local_rank(number) * each, size)
            return range(first, min(first + each, size))
    return range(size)


def called_shape(module: nn.Module, name: str) -> tuple[int, ...]:
    """Return the shape of the parameter `name` that a call on this process sees."""
    return tuple(len(called_range(module, name, dim)) for dim in range(getattr(module, name).ndim))


def write_plans(model: nn.Module, names: Iterable[str]) -> None:
    """Let the plans of a transformers model split GloBE experts, modules `names`, where they split dense experts."""
    experts = {re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names}
    for kind, styles in (("_tp_plan", _TP_STYLES), ("_ep_plan", _EP_STYLES)):
        plan = getattr(model, kind, None) or {}
        for name in experts:
            written = {key: style for key, style in plan.items() if key == name or key.startswith(f"{name}.")}
            if not written:
                continue
            if plan.get(name) not in _SUMMING_STYLES:
                _refuse_plan(model, name, kind, written)
            for key in written.keys() - {name}:
                del plan[key]
            plan.update({f"{name}.{parameter}": style for parameter, style in styles.items()})


def _refuse_plan(model: Any, name: str, kind: str, written: dict[str, str]) -> None:
    config = getattr(model.config, "distributed_config", None)
    if config is not None and any((getattr(config, f"{size}_size", None) or 1) > 1 for size in _SPLIT_DIMS):
        raise RequestError(
            f"{kind[1:]} has {written} for {name}, and GloBE experts can be split where the style of the module is one "
            f"of {', '.join(sorted(_SUMMING_STYLES))}; load the model without tensor and expert parallelism."
        )


def take_share(bank: GlobeBank, modules: Sequence[GlobeMoEFFN]) -> None:
    """Tell the modules which experts and rows this process has, and the bank the sizes of that share.

    Raises RequestError when the module's results would be summed over the processes and its parameters are whole.
    """
    for module in modules:
        experts, rows = (called_range(module, "down_proj", dim) for dim in (0, 2))
        if is_planned(module) and (len(experts), len(rows)) == (module.down_proj.shape[0], module.down_proj.shape[2]):
            raise RequestError(
                f"The plan of this model sums the results of layer {module.layer} over the processes and does not "
                "split its experts; leave the entries of the experts out of tp_plan and ep_plan."
            )
        module.take_share(experts, len(rows), is_first=rows.start == 0)
    base = replace(
        bank.config.base,
        intermediate_size=modules[0].intermediate_dim,
        num_experts={module.layer: module.num_experts for module in modules},
    )
    bank.config = replace(bank.config, base=base)


def make_parameters_split(model: nn.Module) -> None:
    """Take back the whole parameters that FSDP leaves at the root of a model after a call."""
    reshard = getattr(model, "reshard", None)
    if reshard is not None:
        reshard()
