"""The quantizer route: `AutoModelForCausalLM.from_pretrained` of an exported GloBE directory.

Importing this module registers the quantization method "globe". The experts are replaced while the
model is on the meta device, so dense gate and up experts never exist in memory.
"""

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from safetensors import safe_open
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from globe_kernels.errors import GlobeError
from globe_kernels.format.architectures import architecture_of
from globe_kernels.format.checkpoint import GlobeConfig, check_codes, exported_bank_key, exported_key
from globe_kernels.format.names import BANK_NAME, EXPORT_GUARD, FAMILIES, GUARD_KEY, QUANT_METHOD
from globe_kernels.model.arrange import arrange, plan_arrangement
from globe_kernels.model.bank import GlobeBank
from globe_kernels.model.experts import GlobeMoEFFN
from globe_kernels.model.targets import activation_of, globe_modules, install_bank, plan_replacement, top_k_of
from globe_kernels.strategies.budget import AUTO


@register_quantization_config(QUANT_METHOD)
class GlobeQuantizationConfig(QuantizationConfigMixin):
    """`quantization_config` of config.json: the fields of GlobeConfig beside `quant_method`."""

    def __init__(self, **data: Any):
        data.pop("quant_method", None)
        self.weights: str | None = data.pop("weights", None)  # file of an export, None where the name is the usual
        self.quant_method: Any = QUANT_METHOD
        self.globe = GlobeConfig.from_dict(data, "quantization_config in config.json")

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": QUANT_METHOD, **self.globe.to_dict()}

    to_diff_dict = to_dict

    def get(self, key: str, default: Any = None) -> Any:
        """Read a field as of config.json: transformers does so when a loaded configuration is given again."""
        return self.to_dict().get(key, default)


@register_quantizer(QUANT_METHOD)
class GlobeHfQuantizer(HfQuantizer):
    """Swap the experts before the weights are loaded, and arrange the model after."""

    def __init__(self, quantization_config: Any, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self.globe, self.weights = quantization_config.globe, quantization_config.weights

    def update_attn_implementation(self, config: Any) -> Any:
        """Put the file of the weights in the place of the sentence that stops a transformers without globe_kernels."""
        if self.weights is not None:
            setattr(config, GUARD_KEY, self.weights)
        else:
            _take_away(config)
        return config

    update_tp_plan = update_attn_implementation  # the hook of transformers before 5.20

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files=None, **kwargs):
        config = self.globe
        targets = plan_replacement(model, config)
        activation = activation_of(model)
        for target in targets:
            # the meta tensors have the dtype that the model was asked for
            self.dtype = target.module.down_proj.dtype
            model.set_submodule(target.name, GlobeMoEFFN(config, target.layer, activation, self.dtype, "meta"))
        setattr(model, BANK_NAME, GlobeBank(config, "meta"))
        if checkpoint_files:
            _check_exported_files(checkpoint_files, config, globe_modules(model).values())
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs):
        bank = getattr(model, BANK_NAME)
        _bring(bank)
        bank.requires_grad_(False)
        for name, module in globe_modules(model).items():
            for family in FAMILIES:
                check_codes(module.code(family).index, self.globe.num_atoms, name)
            # transformers 5.17 leaves a tensor that its converters merge (down_proj) in the dtype of the file; every
            # version makes parameters that require gradients
            module.to(self.dtype).requires_grad_(False)
        modules = list(globe_modules(model).values())
        arrange(bank, modules, plan_arrangement(bank, modules, top_k_of(model), AUTO))
        install_bank(model, bank)
        # a quantized model refuses .half() and .float(), and the factors stand every cast
        model.is_quantized = False
        _take_away(model.config)
        model.config.__class__ = _guarded(type(model.config))
        return model

    def is_serializable(self) -> Any:
        return True

    @property
    def is_trainable(self) -> Any:
        return True  # the layers around the experts

    @property
    def is_compileable(self) -> bool:
        return True


def _take_away(config: Any) -> None:
    if hasattr(config, GUARD_KEY):
        delattr(config, GUARD_KEY)


def _bring(bank: GlobeBank) -> None:
    """Bring atoms that a device map has offloaded into host memory: no call of the bank would bring them."""
    hook = getattr(bank, "_hf_hook", None)
    if hook is None:
        return
    from accelerate.hooks import remove_hook_from_module  # it is there: it has put the hook

    offloaded = {name: hook.weights_map[name] for name, atoms in bank.named_parameters() if atoms.is_meta}
    remove_hook_from_module(bank)
    for name, atoms in offloaded.items():
        setattr(bank, name, nn.Parameter(atoms.to("cpu"), requires_grad=False))


def _check_exported_files(files: list[str], config: GlobeConfig, modules: Iterable[GlobeMoEFFN]) -> None:
    """transformers neither stops at a missing tensor nor, under a quantizer, checks shapes: do both here."""
    architecture = architecture_of(config.base.model_type)
    live_key = architecture.live_key
    found: dict[str, tuple[int, ...]] = {}
    for file in files:
        with safe_open(file, framework="pt") as handle:
            keys = list(handle.keys())
            found |= {live_key(key): tuple(handle.get_slice(key).get_shape()) for key in keys}
    expected: dict[str, tuple[int, ...]] = {exported_bank_key(family): config.bank_shape() for family in FAMILIES}
    for module in modules:
        for name, tensor in module.state_dict().items():
            key = exported_key(module.layer, name)
            # a base that is not transposed may keep it expert by expert
            if name != "down_proj" or architecture.transposed or live_key(key) in found:
                expected[key] = tuple(tensor.shape)
    for key, shape in expected.items():
        actual = found.get(live_key(key))
        if actual != shape:
            raise GlobeError(
                f"{key} is {actual or 'missing'} in the model's safetensors files and config.json says {shape}; "
                "export the checkpoint again."
            )


def set_quantizer(model: Any, config: GlobeConfig | None) -> None:
    """Mark a transformers model as running on GloBE, or (None) as dense again."""
    if config is None:
        if hasattr(model, "hf_quantizer"):
            model.hf_quantizer.remove_quantization_config(model)
            model.config.__class__ = getattr(type(model.config), "unguarded", type(model.config))
        return
    if not hasattr(model, "config"):
        return
    quantization_config = GlobeQuantizationConfig(**config.to_dict())
    model.hf_quantizer = GlobeHfQuantizer(quantization_config, pre_quantized=True)
    model.config.quantization_config = quantization_config
    model.config.__class__ = _guarded(type(model.config))
    model.quantization_method = QUANT_METHOD


@lru_cache
def _guarded(config_class: Any) -> Any:
    """Return the subclass of a configuration that `save_pretrained` writes with the sentence of an export.

    transformers drops the key of the sentence when it saves, so the key cannot be an attribute of the configuration.
    """
    if hasattr(config_class, "unguarded"):
        return config_class

    def to_diff_dict(self: Any) -> dict[str, Any]:
        return {**config_class.to_diff_dict(self), GUARD_KEY: EXPORT_GUARD}

    def reduce(self: Any) -> tuple:
        return _with_state, (config_class, self.__dict__)  # the subclass has no name that pickle could import

    members = {"to_diff_dict": to_diff_dict, "__reduce__": reduce, "unguarded": config_class}
    # the same name: transformers finds the classes of a model by it
    return type(config_class.__name__, (config_class,), members)


def _with_state(config_class: Any, state: dict[str, Any]) -> Any:
    config = config_class.__new__(_guarded(config_class))
    config.__dict__.update(state)
    return config


def _globe_experts_forward(*_: Any) -> None:
    raise RuntimeError(
        "experts_implementation='globe' names experts that globe_kernels replaces, and this module is still dense; "
        "call globe_kernels.patch(model, path) or load an exported GloBE directory."
    )


# `experts_implementation="globe"` validates only when the name is known; the experts themselves are GlobeMoEFFN.
ALL_EXPERTS_FUNCTIONS.register(QUANT_METHOD, _globe_experts_forward)
