"""Every family of models whose routed experts vLLM runs by its RoutedExperts: GloBE gives the numbers of dense.

A family is a tiny random model, fitted for a few steps. Its export runs in vLLM beside its dense export, in fp32.
"""

import gc
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from vllm import SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.model_executor.models.registry import ModelRegistry

from globe_fit import ExpertSource, fit, save_fit
from globe_kernels import RequestError
from globe_kernels.model.discovery import routed_experts
from globe_kernels.testing import tiny_model
from tests.conftest import TINY_FIT
from tests.serving.conftest import Exports
from tests.serving.engine import Generated, engine, require_same

TOLERANCE = 1e-5  # of a log-probability
PROMPTS = [torch.randint(3, 128, (length,), generator=torch.Generator().manual_seed(length)) for length in (5, 12, 20)]
TOKENS = 6
SMALL = {
    **{"max_num_batched_tokens": 128, "max_num_seqs": 4, "num_gpu_blocks_override": 32},
    **{"skip_tokenizer_init": True, "language_model_only": True},
    "attention_backend": "CPU_MLA",  # of latent attention: the backend that vLLM prefers on some CPUs needs bf16
}


class Family(NamedTuple):
    """A tiny model that vLLM's kernels for a CPU take."""

    model_type: str
    sizes: Mapping[str, Any]  # of its config
    keys: Mapping[str, Any] = {}  # of published config.json files, which vLLM reads and transformers does not write
    is_text: bool = False  # without the towers for images and sound
    is_fused: bool = False  # its experts on disk


# vLLM's attention on a CPU takes heads of 32 and its latent attention takes 576 numbers of a token alone
_HEADS, _HEAD_DIM = {"num_attention_heads": 2, "num_key_value_heads": 2}, {"head_dim": 32}
_LATENT = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 32, "v_head_dim": 32}
_FULL = {"layer_types": ["full_attention"] * 4}  # vLLM's linear attention on a CPU needs bf16
_YARN = {
    **{"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 256},
    **{"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False},
}
FAMILIES = {
    "afmoe": Family("afmoe", _HEAD_DIM, {"score_func": "sigmoid", "route_norm": True, "n_group": 1, "topk_group": 1}),
    "aria": Family("aria", _HEAD_DIM),
    "cohere2_moe": Family("cohere2_moe", _HEAD_DIM | {"logit_scale": 1.0}),
    "deepseek_v2": Family("deepseek_v2", _LATENT),
    "deepseek_v3": Family("deepseek_v3", _LATENT, {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}),
    "ernie4_5_moe": Family("ernie4_5_moe", _HEAD_DIM),
    "exaone_moe": Family("exaone_moe", _HEAD_DIM),
    "flex_olmo": Family("flex_olmo", _HEADS),
    "gemma4": Family("gemma4", _HEAD_DIM | {"global_head_dim": 32}, is_text=True),
    "glm4_moe": Family("glm4_moe", _HEAD_DIM),
    "glm4_moe_lite": Family("glm4_moe_lite", _LATENT, {"first_k_dense_replace": 1, "topk_method": "noaux_tc"}),
    "gpt_oss": Family("gpt_oss", {"head_dim": 64, "intermediate_size": 64, "rope_parameters": _YARN}),
    "granitemoe": Family("granitemoe", _HEADS),
    "granitemoe_swa": Family("granitemoe_swa", _HEADS),
    "granitemoehybrid": Family("granitemoehybrid", _HEADS),
    "granitemoeshared": Family("granitemoeshared", _HEADS),
    "hunyuan_v1_moe": Family("hunyuan_v1_moe", _HEAD_DIM),
    "hy_v3": Family(
        *("hy_v3", _HEAD_DIM),
        {"first_k_dense_replace": 1, "expert_hidden_dim": 48, "route_norm": True, "qk_norm": True},
    ),
    "lfm2_moe": Family("lfm2_moe", _HEADS),
    "mellum": Family("mellum", _HEAD_DIM),
    # its own scores are sigmoids, by which vLLM cannot route on a CPU
    "minimax_m2": Family(
        "minimax_m2", _HEAD_DIM | {"rotary_dim": 16}, {"scoring_func": "softmax", "use_routing_bias": True}
    ),
    "mixtral": Family("mixtral", _HEAD_DIM),
    "olmoe": Family("olmoe", _HEADS),
    "phimoe": Family(
        *("phimoe", _HEADS | {"attention_bias": True, "lm_head_bias": True}), {"architectures": ["PhiMoEForCausalLM"]}
    ),
    "qwen2_moe": Family("qwen2_moe", _HEADS),
    "qwen3_5_moe": Family("qwen3_5_moe", _HEAD_DIM | _FULL, is_text=True),
    "qwen3_moe": Family("qwen3_moe", _HEAD_DIM),
    "qwen3_moe, fused": Family("qwen3_moe", _HEAD_DIM, is_fused=True),
    "qwen3_next": Family("qwen3_next", _HEAD_DIM | _FULL),
    "zaya": Family("zaya", _HEAD_DIM),
}
_NEEDS_TORCHVISION = {"qwen3_5_moe"}  # vLLM imports the model with its processor of videos


@pytest.fixture(autouse=True)
def no_collections(monkeypatch):
    """An engine asks for eight garbage collections, which take longer than all else that it does here."""
    monkeypatch.setattr(gc, "collect", lambda generation=2: 0)


@pytest.fixture(scope="module")
def export_family(tmp_path_factory, export_both):
    """The exports of a family, once."""
    made: dict[str, Exports] = {}

    def export(name: str) -> Exports:
        if name not in made:
            folder = tmp_path_factory.mktemp("family")
            save(FAMILIES[name], folder / "base")
            source = ExpertSource(folder / "base")
            save_fit(fit(source, TINY_FIT), source, folder / "checkpoint")
            made[name] = export_both(folder / "checkpoint", folder / "base", dtype=torch.float32)
        return made[name]

    return export


@torch.no_grad()
def save(family: Family, directory: Path) -> None:
    """Write the model of a family, with experts so large that the logits are theirs."""
    model = tiny_model(family.model_type, **family.sizes)
    if family.is_text:
        config = model.config.get_text_config()
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM._model_mapping[type(config)](config).float()
    for experts in routed_experts(model).values():
        for parameter in experts.module.parameters():
            parameter.normal_(std=1.0)  # far enough for the limits of clamped activations
    model.save_pretrained(directory, save_original_format=not family.is_fused)
    config_json = directory / "config.json"
    config_json.write_text(json.dumps(json.loads(config_json.read_text()) | family.keys))


def score(directory: Path, **options: Any) -> list[Generated]:
    """Return the greedy tokens after every prompt, and the log-probabilities of its own tokens and of these."""
    (architecture,) = json.loads((directory / "config.json").read_text())["architectures"]
    if (known := ModelRegistry.models.get(architecture)) is not None:
        ModelRegistry.register_model(architecture, known.load_model_cls())  # or vLLM looks at it in a new process
    sampling = SamplingParams(
        temperature=0, max_tokens=TOKENS, logprobs=0, prompt_logprobs=0, ignore_eos=True, detokenize=False
    )
    with engine(directory, **SMALL | options) as llm:
        found = llm.generate([{"prompt_token_ids": each.tolist()} for each in PROMPTS], sampling, use_tqdm=False)
    results = []
    for each in found:
        output = each.outputs[0]
        own = zip(each.prompt_token_ids[1:], each.prompt_logprobs[1:], strict=True)
        new = zip(output.token_ids, output.logprobs, strict=True)
        results.append(Generated(list(output.token_ids), [part[token].logprob for token, part in [*own, *new]]))
    return results


@pytest.mark.parametrize("name", FAMILIES)
def test_globe_as_dense(name, export_family, record_property):
    if name in _NEEDS_TORCHVISION:
        pytest.importorskip("torchvision")
    exports = export_family(name)
    record_property("largest", require_same(score(exports.globe), score(exports.dense), TOLERANCE))


def test_experts_outside_of_routed_experts_are_refused(export_family):
    """The Transformers backend of vLLM keeps experts with biases as they are."""
    try:
        with pytest.raises(RequestError, match="by code that takes no quantization method; serve the dense export"):
            score(export_family("gpt_oss").globe, model_impl="transformers")
    finally:
        cleanup_dist_env_and_memory()
