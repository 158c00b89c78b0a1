"""Helpers for tests and benchmarks: tolerances that a wrong answer cannot meet, and tiny random models."""

from typing import Any

import torch

# Sizes that every architecture understands; three MoE layers, odd enough that a transposed axis shows.
_COMMON = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "max_position_embeddings": 512,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 0,
}
_QWEN = {"num_experts": 8, "moe_intermediate_size": 48, "intermediate_size": 96}
_SHARED_EXPERTS = {
    "n_routed_experts": 8,
    "moe_intermediate_size": 48,
    "intermediate_size": 96,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 4,
    "topk_group": 1,
}
_DEEPSEEK = {
    **_SHARED_EXPERTS,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_group": 2,
}
_OWN: dict[str, dict[str, Any]] = {
    "qwen2_moe": {**_QWEN, "shared_expert_intermediate_size": 32, "mlp_only_layers": [1], "num_hidden_layers": 4},
    "qwen3_moe": {**_QWEN, "head_dim": 16},
    "olmoe": {"num_experts": 8, "intermediate_size": 48},
    "mixtral": {"num_local_experts": 8, "intermediate_size": 48},
    "deepseek_v2": {**_DEEPSEEK, "topk_method": "greedy"},
    "deepseek_v3": _DEEPSEEK,
    "glm4_moe": {**_SHARED_EXPERTS, "head_dim": 16, "n_group": 1},
    "gpt_oss": {
        "num_local_experts": 8,
        "intermediate_size": 48,
        "head_dim": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},  # YaRN is for a longer context
    },
}


def tiny_model(model_type: str, seed: int = 0, **overrides: Any) -> Any:
    """Build a random causal language model of the given architecture in fp32, small enough for a test."""
    from transformers import AutoConfig, AutoModelForCausalLM  # globe_kernels must import without transformers

    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **{**_COMMON, **_OWN[model_type], **overrides})
    model = AutoModelForCausalLM.from_config(config).float().eval()
    for name, parameter in model.named_parameters():
        if name.endswith("_proj_bias"):  # of experts: transformers starts them at zero, where no test would see them
            torch.nn.init.normal_(parameter, std=config.initializer_range)
    return model


def relative_errors(actual: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """Return (rms, peak), relative to the rms and the peak of `expected`; an all-zero `actual` scores 1 and 1."""
    difference = (actual.double() - expected.double()).abs()
    reference = expected.double().abs()
    rms = (difference.square().mean().sqrt() / reference.square().mean().sqrt()).item()
    return rms, (difference.max() / reference.max()).item()


def assert_close(actual: torch.Tensor, expected: torch.Tensor, rms: float, peak: float) -> None:
    """Fail when shapes differ, a value is not finite, or a relative error exceeds its limit."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert torch.isfinite(actual).all(), "NaN or infinity in the result"
    found_rms, found_peak = relative_errors(actual, expected)
    assert found_rms <= rms, f"relative rms {found_rms:.3g}, limit {rms:g}"
    assert found_peak <= peak, f"relative peak {found_peak:.3g}, limit {peak:g}"
