"""The interfaces of vLLM that the plugin uses, as vllm 0.32 has them.

`make vllm` compares this record with the real engine, and `make check` with the stand-ins of tests.
"""

from importlib import import_module
from inspect import signature
from typing import Any

_LAYERS = "vllm.model_executor.layers"
_METHOD = f"{_LAYERS}.fused_moe.fused_moe_method_base:FusedMoEMethodBase"
_QUANTIZATION = f"{_LAYERS}.quantization.base_config:QuantizationConfig"

# {module:name of a function or method: its parameters}
PARAMETERS = {
    "vllm.config:get_current_vllm_config": "",
    "vllm.distributed.parallel_state:get_world_group": "",
    "vllm.model_executor.models.utils:extract_layer_index": "layer_name num_attn_module",
    f"{_LAYERS}.quantization:register_quantization_config": "quantization",
    f"{_METHOD}.__init__": "self moe",
    f"{_METHOD}.create_weights": "self layer num_experts hidden_size intermediate_size_per_partition params_dtype "
    "extra_weight_attrs",
    f"{_METHOD}.process_weights_after_loading": "self layer",
    f"{_METHOD}.get_fused_moe_quant_config": "self layer",
    f"{_METHOD}.apply": "self layer x topk_weights topk_ids shared_experts shared_experts_input",
    f"{_QUANTIZATION}.__init__": "self",
    f"{_QUANTIZATION}.get_name": "self",
    f"{_QUANTIZATION}.get_supported_act_dtypes": "self",
    f"{_QUANTIZATION}.get_min_capability": "",
    f"{_QUANTIZATION}.get_config_filenames": "",
    f"{_QUANTIZATION}.from_config": "config",
    f"{_QUANTIZATION}.maybe_update_config": "self model_name hf_config revision",
    f"{_QUANTIZATION}.get_quant_method": "self layer prefix",
    f"{_QUANTIZATION}.get_checkpoint_weight_mapper": "",
    f"{_LAYERS}.linear:UnquantizedLinearMethod.process_weights_after_loading": "self layer",
}
# {module:name of a class: names that it or its instances have}
MEMBERS = {
    f"{_LAYERS}.fused_moe.activation:MoEActivation": "SILU GELU GELU_TANH SWIGLUOAI SWIGLUOAI_UNINTERLEAVE",
    f"{_LAYERS}.fused_moe.config:FusedMoEConfig": "num_experts experts_per_token intermediate_size has_bias activation "
    "device moe_parallel_config tp_size tp_rank",
    f"{_LAYERS}.fused_moe.config:FusedMoEParallelConfig": "tp_size tp_rank",
    f"{_LAYERS}.fused_moe.routed_experts:RoutedExperts": "expert_map moe_config apply_router_weight_on_input "
    "swiglu_alpha swiglu_limit swiglu_beta",
    f"{_LAYERS}.linear:LinearBase": "forward",
    "vllm.config:ParallelConfig": "data_parallel_size enable_eplb enable_expert_parallel pipeline_parallel_size "
    "tensor_parallel_size",
    "vllm.config:LoadConfig": "download_dir load_format",
    "vllm.config:LoRAConfig": "target_modules",
    "vllm.config:VllmConfig": "additional_config load_config lora_config model_config parallel_config",
    "vllm.model_executor.models.utils:WeightsMapper": "orig_to_new_regex map_name apply",
}


def found(name: str) -> Any:
    """Import the object that an entry of the record names."""
    module, _, path = name.partition(":")
    value = import_module(module)
    for part in path.split("."):
        value = getattr(value, part)
    return value


def differences() -> list[str]:
    """Describe where the vllm that is importable now differs from the record."""
    wrong = []
    for name, parameters in PARAMETERS.items():
        here = " ".join(signature(found(name)).parameters)
        if here != parameters:
            wrong.append(f"{name} takes {here!r} in place of {parameters!r}")
    for name, members in MEMBERS.items():
        owner = found(name)
        has = {*dir(owner), *getattr(owner, "__dataclass_fields__", ()), *signature(owner.__init__).parameters}
        wrong += [f"{name} has no {member}" for member in members.split() if member not in has]
    return wrong
