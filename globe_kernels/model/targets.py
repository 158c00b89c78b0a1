"""Find the modules of a live model that GloBE replaces, and keep the bank at its root."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from globe_kernels.errors import RequestError
from globe_kernels.format.architectures import architecture_of
from globe_kernels.format.checkpoint import GlobeConfig
from globe_kernels.format.names import BANK_NAME
from globe_kernels.model.arrange import arrange
from globe_kernels.model.bank import GlobeBank
from globe_kernels.model.experts import GlobeMoEFFN
from globe_kernels.ops.activations import ACTIVATION_SETTINGS, GATED_ACTIVATIONS

_HOOKS_NAME = "_globe_hooks"


@dataclass(frozen=True)
class DenseExperts:
    """The routed experts of one layer, which GloBE replaces."""

    layer: int
    name: str  # of the module, such as model.layers.0.mlp.experts
    module: Any  # nn.Module with the tensors of Architecture.fused_shapes


def plan_replacement(model: nn.Module, config: GlobeConfig) -> tuple[DenseExperts, ...]:
    """Find the modules that `config` replaces, in the order of the layers.

    Raises RequestError when the checkpoint is of another model.
    """
    model_type = getattr(_text_config(model), "model_type", None)
    if model_type != config.base.model_type:
        raise RequestError(
            f"The checkpoint was fitted on a {config.base.model_type} model ({config.base.name}) and this model is "
            f"{model_type or type(model).__name__}; patch the model it was fitted on."
        )
    live = dict(architecture_of(model_type).live_experts(model))
    if set(live) != {*config.base.num_experts, *config.base.left_dense}:
        raise RequestError(
            f"The checkpoint covers the MoE layers {_span(config.base.num_experts)} of {config.base.name} and this "
            f"model has the MoE layers {_span(live)}; patch the model it was fitted on."
        )
    return tuple(
        DenseExperts(layer, live[layer], model.get_submodule(live[layer])) for layer in sorted(config.base.num_experts)
    )


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def activation_of(model: nn.Module) -> str:
    """Return the name of the experts' activation. Raises RequestError for an activation that GloBE does not have."""
    config = _text_config(model)
    name = architecture_of(config.model_type).activation or config.hidden_act
    if name not in GATED_ACTIVATIONS:
        raise RequestError(f"The experts use the activation {name!r}; GloBE has {', '.join(GATED_ACTIVATIONS)}.")
    for key, expected in ACTIVATION_SETTINGS.get(name, {}).items():
        if (found := getattr(config, key, expected)) != expected:
            raise RequestError(
                f"The experts use the activation {name!r} with {key} {found} and GloBE has it with {expected}; export "
                "the checkpoint with --dense and run that."
            )
    return name


def top_k_of(model: nn.Module) -> int:
    """Return K, the experts per token."""
    return int(_text_config(model).num_experts_per_tok)


def _span(layers) -> str:
    return ", ".join(map(str, sorted(layers))) or "none"


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
        arrange(bank, modules, bank.arrangement)
