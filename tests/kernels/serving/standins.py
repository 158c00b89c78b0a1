"""Stand-ins for the parts of vLLM that the plugin meets: enough to make the layers of a model and to load them."""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import nn

VERSION = "0.32.0+cpu"


class MoEActivation(Enum):
    SILU = "silu"
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"
    SWIGLUOAI = "swigluoai"
    SWIGLUOAI_UNINTERLEAVE = "swigluoai_uninterleave"
    SITU = "situ"


@dataclass
class FusedMoEParallelConfig:
    tp_size: int = 1
    tp_rank: int = 0


@dataclass
class FusedMoEConfig:
    num_experts: int
    experts_per_token: int
    intermediate_size: int
    has_bias: bool = False
    activation: MoEActivation = MoEActivation.SILU
    device: str = "cpu"
    moe_parallel_config: FusedMoEParallelConfig = field(default_factory=FusedMoEParallelConfig)

    @property
    def tp_size(self) -> int:
        return self.moe_parallel_config.tp_size

    @property
    def tp_rank(self) -> int:
        return self.moe_parallel_config.tp_rank


class FusedMoEMethodBase:
    def __init__(self, moe):
        self.moe = moe

    def create_weights(
        self, layer, num_experts, hidden_size, intermediate_size_per_partition, params_dtype, **extra_weight_attrs
    ): ...

    def process_weights_after_loading(self, layer): ...

    def get_fused_moe_quant_config(self, layer): ...

    def apply(self, layer, x, topk_weights, topk_ids, shared_experts, shared_experts_input): ...


class RoutedExperts(nn.Module):
    """The experts of a layer, of which this process has those with a place in `expert_map`."""

    def __init__(
        self,
        moe_config: FusedMoEConfig,
        expert_map: torch.Tensor | None = None,
        apply_router_weight_on_input: bool = False,
        swiglu_alpha: float | None = None,
        swiglu_limit: float | None = None,
        swiglu_beta: float | None = None,
    ):
        super().__init__()
        self.moe_config, self._expert_map = moe_config, expert_map
        self.apply_router_weight_on_input = apply_router_weight_on_input
        self.swiglu_alpha, self.swiglu_limit, self.swiglu_beta = swiglu_alpha, swiglu_limit, swiglu_beta

    @property
    def expert_map(self) -> torch.Tensor | None:
        return self._expert_map


class LinearBase(nn.Module):
    pass


class UnquantizedLinearMethod:
    def process_weights_after_loading(self, layer): ...


class QuantizationConfig:
    def __init__(self):
        self.packed_modules_mapping = {}

    def get_name(self): ...

    def get_supported_act_dtypes(self): ...

    @classmethod
    def get_min_capability(cls): ...

    @staticmethod
    def get_config_filenames(): ...

    @classmethod
    def from_config(cls, config): ...

    def maybe_update_config(self, model_name, hf_config=None, revision=None): ...

    def get_quant_method(self, layer, prefix): ...

    @staticmethod
    def get_checkpoint_weight_mapper(): ...


@dataclass
class WeightsMapper:
    orig_to_new_regex: dict[re.Pattern, None] = field(default_factory=dict)

    def map_name(self, key: str) -> str | None:
        return None if any(pattern.search(key) for pattern in self.orig_to_new_regex) else key

    def apply(self, weights):
        return ((name, tensor) for name, tensor in weights if self.map_name(name) is not None)


def extract_layer_index(layer_name: str, num_attn_module: int = 1) -> int:
    (number,) = (int(part) for part in layer_name.split(".") if part.isdecimal())
    return number


@dataclass
class ParallelConfig:
    pipeline_parallel_size: int = 1
    tensor_parallel_size: int = 1
    data_parallel_size: int = 1
    enable_expert_parallel: bool = False
    enable_eplb: bool = False


@dataclass
class LoadConfig:
    load_format: str = "auto"
    download_dir: str | None = None


@dataclass
class LoRAConfig:
    target_modules: list[str] | None = None


@dataclass
class VllmConfig:
    model_config: Any
    load_config: LoadConfig
    parallel_config: ParallelConfig
    lora_config: LoRAConfig | None
    additional_config: dict[str, Any]


def vllm_config(
    *,
    additional: Any = None,
    load_format: str = "auto",
    download_dir: str | None = None,
    model: str = "",
    lora: LoRAConfig | None = None,
    **parallel: Any,
) -> VllmConfig:
    """Make the configuration of an engine, as far as the plugin reads it."""
    return VllmConfig(
        SimpleNamespace(model=model),
        LoadConfig(load_format, download_dir),
        ParallelConfig(**parallel),
        lora,
        {} if additional is None else additional,
    )


def install(monkeypatch, config: Any) -> dict[str, Any]:
    """Put the stand-ins in the place of vllm, with `config` as the current one; return its quantization methods."""
    methods: dict[str, Any] = {}  # vLLM has a list of the names

    def get_current_vllm_config():
        return config

    def get_world_group():
        return SimpleNamespace(local_rank=0)

    def register_quantization_config(quantization: str):
        return lambda method: methods.setdefault(quantization, method)

    layers = "vllm.model_executor.layers"
    members: dict[str, Sequence[Any]] = {
        "vllm.config": [LoRAConfig, LoadConfig, ParallelConfig, VllmConfig, get_current_vllm_config],
        "vllm.distributed.parallel_state": [get_world_group],
        "vllm.model_executor.models.utils": [WeightsMapper, extract_layer_index],
        f"{layers}.linear": [LinearBase, UnquantizedLinearMethod],
        f"{layers}.quantization": [register_quantization_config],
        f"{layers}.quantization.base_config": [QuantizationConfig],
        f"{layers}.fused_moe.activation": [MoEActivation],
        f"{layers}.fused_moe.config": [FusedMoEConfig, FusedMoEParallelConfig],
        f"{layers}.fused_moe.fused_moe_method_base": [FusedMoEMethodBase],
        f"{layers}.fused_moe.routed_experts": [RoutedExperts],
    }
    paths = [name.split(".") for name in members]
    for name in {".".join(path[:end]) for path in paths for end in range(1, len(path) + 1)}:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for name, values in members.items():
        for value in values:
            setattr(sys.modules[name], value.__name__, value)
    vars(sys.modules[f"{layers}.quantization"])["QUANTIZATION_METHODS"] = methods
    vars(sys.modules["vllm"])["__version__"] = VERSION
    for name in [name for name in sys.modules if name.startswith("globe_kernels.serving.vllm_")]:
        monkeypatch.delitem(sys.modules, name)
    return methods
