"""Find the modules of a live model that GloBE replaces, and keep the bank at its root."""

from typing import Any

from torch import nn

from globe_kernels.errors import RequestError
from globe_kernels.format.checkpoint import GlobeConfig
from globe_kernels.format.names import BANK_NAME
from globe_kernels.model.arrange import arrange
from globe_kernels.model.bank import GlobeBank
from globe_kernels.model.discovery import DenseExperts, activation_of, routed_experts
from globe_kernels.model.experts import GlobeMoEFFN
from globe_kernels.model.parallel import make_parameters_split

_HOOKS_NAME = "_globe_hooks"


def plan_replacement(model: nn.Module, config: GlobeConfig) -> tuple[DenseExperts, ...]:
    """Find the modules that `config` replaces, in the order of the layers.

    Raises RequestError when the checkpoint is of another model, or the model has experts that GloBE cannot replace.
    """
    live = routed_experts(model)
    model_type = next(iter(live.values())).model_type
    if model_type != config.base.model_type:
        raise RequestError(
            f"The checkpoint was fitted on a {config.base.model_type} model ({config.base.name}) and this model is "
            f"{model_type or type(model).__name__}; patch the model it was fitted on."
        )
    if set(live) != {*config.base.num_experts, *config.base.left_dense}:
        raise RequestError(
            f"The checkpoint covers the MoE layers {_span(config.base.num_experts)} of {config.base.name} and this "
            f"model has the MoE layers {_span(live)}; patch the model it was fitted on."
        )
    return tuple(live[layer] for layer in sorted(config.base.num_experts))


def globe_experts(config: GlobeConfig, target: DenseExperts) -> GlobeMoEFFN:
    """Make the module that stands for `target`, without values. Raises RequestError as `activation_of` does."""
    # where the model was not loaded yet, its meta tensors have the dtype that it was asked for
    dtype = target.module.down_proj.dtype
    return GlobeMoEFFN(config, target.layer, activation_of(target), dtype, "meta", has_bias=target.layout.has_bias)


def _span(layers) -> str:
    return ", ".join(map(str, sorted(layers)))


def is_patched(model: nn.Module) -> bool:
    """Whether the experts of the model are GloBE experts."""
    return isinstance(getattr(model, BANK_NAME, None), GlobeBank)


def globe_modules(model: nn.Module) -> dict[str, GlobeMoEFFN]:
    """{module name: module} of the GloBE experts of a patched model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, GlobeMoEFFN)}


def install_bank(model: nn.Module, bank: GlobeBank) -> None:
    """Register the bank at the root of a model whose experts are arranged; new weights arrange them again."""
    setattr(model, BANK_NAME, bank)
    arrive = model.register_forward_pre_hook(bank.calls.arrive)
    setattr(model, _HOOKS_NAME, (model.register_load_state_dict_post_hook(_arrange_again), arrive))


def remove_bank(model: nn.Module) -> None:
    """Undo `install_bank`."""
    for hook in getattr(model, _HOOKS_NAME):
        hook.remove()
    delattr(model, _HOOKS_NAME)
    delattr(model, BANK_NAME)


def _arrange_again(model: nn.Module, _: Any) -> None:
    """After load_state_dict, which has no tensor that strategies make from the codes and the bank."""
    bank = getattr(model, BANK_NAME)
    modules = list(globe_modules(model).values())
    with bank.calls.change(modules):
        make_parameters_split(model)
        arrange(bank, modules, bank.arrangement)
