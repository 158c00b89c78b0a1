"""The quantizer route: `AutoModelForCausalLM.from_pretrained` of an exported GloBE directory.

Importing this module registers the quantization method "globe". The experts are replaced while the
model is on the meta device, so dense gate and up experts never exist in memory.
"""

from functools import lru_cache
from typing import Any

from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.quantizers.auto import (
    AutoHfQuantizer,
    AutoQuantizationConfig,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from globe_kernels.errors import RequestError
from globe_kernels.format.checkpoint import GlobeConfig, check_codes
from globe_kernels.format.exported import ExportedConfig
from globe_kernels.format.names import BANK_NAME, EXPORT_GUARD, FAMILIES, GUARD_KEY, QUANT_METHOD
from globe_kernels.format.verification import Verification
from globe_kernels.model.arrange import arrange, plan_arrangement
from globe_kernels.model.bank import GlobeBank
from globe_kernels.model.discovery import top_k_of
from globe_kernels.model.loaded import check_exported_files, require_all_weights, require_finite_factors, verification
from globe_kernels.model.owners import refuse_quantized
from globe_kernels.model.parallel import take_share, write_plans
from globe_kernels.model.targets import globe_experts, globe_modules, install_bank, plan_replacement
from globe_kernels.strategies.budget import AUTO


@register_quantization_config(QUANT_METHOD)
class GlobeQuantizationConfig(QuantizationConfigMixin):
    """`quantization_config` of config.json: the fields of GlobeConfig beside `quant_method`.

    `other_layers` is the configuration of the quantizer that holds the layers around the experts, where there is one.
    """

    def __init__(self, **data: Any):
        exported = ExportedConfig(data, "quantization_config in config.json")
        self.globe, self.weights, self.files = exported.globe, exported.weights, exported.files
        other = data.get("other_layers")
        self.other_layers: Any = AutoQuantizationConfig.from_dict(other) if isinstance(other, dict) else other
        self.quant_method: Any = QUANT_METHOD

    def to_dict(self) -> dict[str, Any]:
        other = {} if self.other_layers is None else {"other_layers": self.other_layers.to_dict()}
        return {"quant_method": QUANT_METHOD, **self.globe.to_dict(), **other}

    to_diff_dict = to_dict

    def get(self, key: str, default: Any = None) -> Any:
        """Read a field as of config.json: transformers does so when a loaded configuration is given again."""
        return self.to_dict().get(key, default)


class _Experts(HfQuantizer):
    """Swap the experts before the weights are loaded, and arrange the model after.

    The quantizer of a GloBE model is a subclass of this class and of the quantizer of its other layers, by `_joined`:
    `super()` is that quantizer here. `saved_config` is the `quantization_config` of config.json.
    """

    saved_config: Any
    _verification: Verification | None = None

    def update_attn_implementation(self, config: Any) -> Any:
        self._take_guard(config)
        return super().update_attn_implementation(config)

    def update_tp_plan(self, config: Any) -> Any:
        """The hook of transformers before 5.20."""
        self._take_guard(config)
        return super().update_tp_plan(config)  # pyright: ignore[reportAttributeAccessIssue]

    def _take_guard(self, config: Any) -> None:
        """Put the file of the weights in the place of the sentence that stops a transformers without globe_kernels."""
        if self.saved_config.weights is not None:
            setattr(config, GUARD_KEY, self.saved_config.weights)
        else:
            _take_away(config)

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files=None, **kwargs):
        config = self.saved_config.globe
        targets = plan_replacement(model, config)
        self.dtype, self.top_k = targets[0].module.down_proj.dtype, top_k_of(model, targets[0])
        for target in targets:
            model.set_submodule(target.name, globe_experts(config, target))
            block = model.get_submodule(target.name.rpartition(".")[0])
            if not [*block.parameters(recurse=False), *block.buffers(recurse=False)]:
                block._is_hf_initialized = True  # transformers would draw dense experts through the block
        # before the bank is there: some quantizers leave the last module of a model plain
        super()._process_model_before_weight_loading(model, checkpoint_files=checkpoint_files, **kwargs)
        setattr(model, BANK_NAME, GlobeBank(config, "meta"))
        write_plans(model, [target.name for target in targets])
        if checkpoint_files:
            check_exported_files(checkpoint_files, model)
            self._verification = verification(checkpoint_files, self.saved_config.files)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs):
        require_all_weights(model)
        if self._verification is not None:
            self._verification.require()
            self._verification = None  # it cannot be copied with the model
        super()._process_model_after_weight_loading(model, **kwargs)
        bank = getattr(model, BANK_NAME)
        _bring(bank)
        bank.requires_grad_(False)
        require_finite_factors(bank, BANK_NAME, FAMILIES)
        for name, module in globe_modules(model).items():
            for family in FAMILIES:
                check_codes(module.code(family).index, self.saved_config.globe.num_atoms, name)
            require_finite_factors(module, name, ("gate_adapter", "gate_code_value", "up_adapter", "up_code_value"))
            # transformers 5.17 leaves a tensor that its converters merge (down_proj) in the dtype of the file; every
            # version makes parameters that require gradients
            module.to(self.dtype).requires_grad_(False)
        modules = list(globe_modules(model).values())
        take_share(bank, modules)
        arrange(bank, modules, plan_arrangement(bank, modules, self.top_k, AUTO))
        install_bank(model, bank)
        _take_away(model.config)
        model.config.quantization_config = self.saved_config
        model.config.__class__ = _joined(_Guard, type(model.config))
        return model

    def get_state_dict_and_metadata(self, model: Any) -> Any:
        """Refuse to save a directory that could not be loaded; return the answer of transformers otherwise."""
        layers = {module.layer for module in globe_modules(model).values()}
        if missing := self.saved_config.globe.base.num_experts.keys() - layers:
            raise RequestError(
                f"This process has no layers {', '.join(map(str, sorted(missing)))}, so it cannot save the model; copy "
                "the directory that it was loaded from."
            )
        if conversions := getattr(model, "_weight_conversions", None):
            model._weight_conversions = [conversion for conversion in conversions if _has_reverse(conversion)]
        return super().get_state_dict_and_metadata(model)

    def remove_quantization_config(self, model: Any) -> None:
        """Leave a model on GloBE whose other layers were dequantized."""
        super().remove_quantization_config(model)
        set_quantizer(model, self.saved_config.globe)


@register_quantizer(QUANT_METHOD)
class GlobeHfQuantizer(_Experts):
    """The quantizer of a model whose other layers are plain; of other layers that are not, the joined quantizer."""

    def __new__(cls, quantization_config: Any = None, **kwargs: Any):
        if quantization_config is None or quantization_config.other_layers is None:
            return super().__new__(cls)
        return _join(AutoHfQuantizer.from_config(quantization_config.other_layers, **kwargs), quantization_config)

    def __init__(self, quantization_config: Any, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self.saved_config = quantization_config

    def _process_model_after_weight_loading(self, model: Any, **kwargs):
        # a quantized model refuses .half() and .float(), and the factors stand every cast
        model.is_quantized = False
        return super()._process_model_after_weight_loading(model, **kwargs)

    def get_state_dict_and_metadata(self, model: Any) -> Any:
        refuse_quantized(model)
        return super().get_state_dict_and_metadata(model)

    def is_serializable(self) -> Any:
        return True

    @property
    def is_trainable(self) -> Any:
        return True  # the layers around the experts

    @property
    def is_compileable(self) -> bool:
        return True


def _has_reverse(conversion: Any) -> bool:
    """Whether transformers can undo a conversion to save; if it cannot, the state_dict has the tensors of the disk."""
    try:
        conversion.reverse_transform()
    except NotImplementedError:  # such as the reading of the codes of bitsandbytes
        return False
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


def set_quantizer(model: Any, config: GlobeConfig | None) -> None:
    """Mark a transformers model as running on GloBE, or (None) as it was before.

    A quantizer that has loaded the model stays, and saves it with GloBE.
    """
    if not hasattr(model, "config"):
        return
    quantizer: Any = getattr(model, "hf_quantizer", None)
    present: Any = getattr(model.config, "quantization_config", None)
    if config is None:
        model.config.__class__ = getattr(type(model.config), "unguarded", type(model.config))
        if isinstance(quantizer, GlobeHfQuantizer):
            del model.hf_quantizer, model.quantization_method, model.config.quantization_config
        elif quantizer is not None:
            quantizer.__class__, model.config.quantization_config = type(quantizer).unguarded, present.other_layers
            del quantizer.saved_config
        return
    saved_config: Any = GlobeQuantizationConfig(**config.to_dict() | {"other_layers": present})
    if quantizer is None:
        model.hf_quantizer = GlobeHfQuantizer(saved_config, pre_quantized=True)
        model.quantization_method = QUANT_METHOD
    else:
        _join(quantizer, saved_config)
    model.config.quantization_config = saved_config
    model.config.__class__ = _joined(_Guard, type(model.config))


def _join(quantizer: Any, saved_config: Any) -> Any:
    """Make `quantizer`, of the other layers of a model, the quantizer of its experts too; return it."""
    quantizer.__class__, quantizer.saved_config = _joined(_Experts, type(quantizer)), saved_config
    return quantizer


class _Guard:
    """A configuration that `save_pretrained` writes with the sentence of an export.

    transformers drops the key of the sentence when it saves, so the key cannot be an attribute of the configuration.
    """

    def to_diff_dict(self) -> dict[str, Any]:
        return {**super().to_diff_dict(), GUARD_KEY: EXPORT_GUARD}  # pyright: ignore[reportAttributeAccessIssue]


@lru_cache
def _joined(first: Any, unguarded: Any) -> Any:
    """Return the subclass of both, named as `unguarded`: by its name transformers finds the classes of a model."""
    if issubclass(unguarded, first):
        return unguarded

    def reduce(self: Any) -> tuple:  # for pickle, which could not import the class
        return _with_state, (first, unguarded, self.__dict__)

    return type(unguarded.__name__, (first, unguarded), {"__reduce__": reduce, "unguarded": unguarded})


def _with_state(first: Any, unguarded: Any, state: dict[str, Any]) -> Any:
    instance = unguarded.__new__(_joined(first, unguarded))
    instance.__dict__.update(state)
    return instance


def _globe_experts_forward(*_: Any) -> None:
    raise RuntimeError(
        "experts_implementation='globe' names experts that globe_kernels replaces, and this module is still dense; "
        "call globe_kernels.patch(model, path) or load an exported GloBE directory."
    )


# `experts_implementation="globe"` validates only when the name is known; the experts themselves are GlobeMoEFFN.
ALL_EXPERTS_FUNCTIONS.register(QUANT_METHOD, _globe_experts_forward)
