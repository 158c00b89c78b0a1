"""Whoever else owns a model that is patched: modules around it, hooks, other quantizers, other processes."""

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from globe_kernels.errors import RequestError
from globe_kernels.model.parallel import is_planned, is_split

# They hold references to the parameters that they found, so experts under them may not be replaced.
_KEEPERS = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "DeepSpeedEngine")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PLAIN = (torch.Tensor, nn.Parameter)
_WEIGHTS = (torch.float32, torch.bfloat16, torch.float16)


def model_in(module: Any) -> Any:
    """Return the transformers model that `module` is, or holds; `module` itself where it holds none.

    Raises RequestError when `module` is no torch module, or holds several models.
    """
    if not isinstance(module, nn.Module):
        held = [name for name, value in getattr(module, "__dict__", {}).items() if isinstance(value, nn.Module)]
        raise RequestError(
            f"{type(module).__name__} is no torch module; pass the model"
            + (f", which is its attribute {' or '.join(held)}." if held else " that it runs.")
        )
    found = dict(_models(module, ""))
    if len(found) > 1:
        raise RequestError(
            f"{type(module).__name__} holds {len(found)} models; pass one of its attributes {', '.join(found)}."
        )
    return next(iter(found.values()), module)


def _models(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield the outermost transformers models: (name, model)."""
    library = sys.modules.get("transformers.modeling_utils")  # slow to import: before somebody has, there is no model
    if library is not None and isinstance(module, library.PreTrainedModel):
        yield name, module
        return
    for child_name, child in module.named_children():
        yield from _models(child, f"{name}.{child_name}" if name else child_name)


def refuse_keepers(module: nn.Module, model: nn.Module) -> None:
    """Raise RequestError when a module around `model` would go on with the experts that a patch replaces."""
    for name, outer in module.named_modules():
        if type(outer).__name__ in _KEEPERS and any(inner is model for inner in outer.modules()):
            raise RequestError(
                f"{type(outer).__name__}{f' at {name}' if name else ''} keeps the parameters of the experts that a "
                "patch replaces; patch the model first, and wrap the patched model."
            )


def refuse_unfit(name: str, module: nn.Module) -> None:
    """Raise RequestError when dense experts, the module `name`, are not plain weights that nobody else works on."""
    for parameter, tensor in module.named_parameters():
        where = f"{name}.{parameter}"
        if is_split(tensor):
            raise RequestError(
                f"{where} is split over processes; export the checkpoint, and load the directory with "
                "from_pretrained(..., distributed_config=...), which splits GloBE experts."
            )
        if type(tensor) not in _PLAIN or tensor.dtype not in _WEIGHTS:
            raise RequestError(
                f"{where} is quantized ({type(tensor).__name__}, {tensor.dtype}) and GloBE replaces experts in fp32, "
                "bf16 or fp16; load the model with its experts left out of the quantization, or dequantized."
            )
    if is_parametrized(module) or any(getattr(module, hooks) for hooks in _HOOKS) or hasattr(module, "_hf_hook"):
        raise RequestError(
            f"{name} ({type(module).__name__}) has hooks or parametrizations, which would be lost with it: pruning, "
            "weight norm, accelerate's or your own; remove them, patch, and register on the new module."
        )
    if is_planned(module):
        raise RequestError(
            f"The forward of {name} has been replaced, and a patch would lose the new one; load the model without "
            "tp_plan, ep_plan and use_kernels, or export the checkpoint and load the directory."
        )


def refuse_quantized(model: nn.Module) -> None:
    """Raise RequestError when a parameter is not plain: a directory of GloBE says nothing of its quantization."""
    for name, tensor in model.named_parameters():
        if type(tensor) not in _PLAIN and not is_split(tensor):
            raise RequestError(
                f"{name} is quantized ({type(tensor).__name__}), and a saved GloBE model has plain weights beside its "
                "experts; save before they are quantized."
            )


def refuse_left_over(model: Any) -> None:
    """Raise RequestError when the configuration names a quantization and the model has no quantizer."""
    found = getattr(getattr(model, "config", None), "quantization_config", None)
    if found is not None and getattr(model, "hf_quantizer", None) is None:
        raise RequestError(
            f"model.config.quantization_config is {type(found).__name__} and the model has no quantizer; if its "
            "weights are plain, run del model.config.quantization_config and patch again."
        )
