"""Build a tiny random model of every model type of transformers that has routed experts."""

import dataclasses
import functools
import inspect
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


def _sizes(**by_size: str) -> dict[str, Any]:
    return {name: int(size[1:]) for size, names in by_size.items() for name in names.split()}


# Every config that has a field of one of these names takes the size. They are odd enough that a transposed axis shows.
_TEXT = {
    **{"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 0, "topk_method": "greedy"},
    **_sizes(
        _512="max_position_embeddings max_seq_len",
        _128="vocab_size vocab_size_per_layer_input unpadded_vocab_size",
        _96="intermediate_size dense_intermediate_size intermediate_size_mlp prefix_dense_intermediate_size",
        _64="hidden_size d_model projector_hidden_size out_hidden_size thinker_hidden_size",
        _48="moe_intermediate_size expert_ffn_hidden_size d_ff encoder_ffn_dim decoder_ffn_dim ffn_hidden_size",
        _32="shared_expert_intermediate_size shared_experts_intermediate_size shared_intermediate_size "
        "share_expert_dim moe_shared_expert_intermediate_size moe_hidden_size mamba_head_dim",
        _24="q_lora_rank router_hidden_size",
        _16="head_dim swa_head_dim linear_head_dim linear_key_head_dim linear_value_head_dim qk_nope_head_dim "
        "v_head_dim d_kv kv_channels kv_lora_rank o_lora_rank hidden_size_per_layer_input index_head_dim "
        "global_head_dim ssm_state_size mamba_d_state mamba_chunk_size chunk_size rel_extent block_size hc_lowrank "
        "canvas_length",
        _8="num_experts num_local_experts n_routed_experts moe_num_experts qk_rope_head_dim rotary_dim index_topk",
        _4="num_hidden_layers num_layers n_layers encoder_layers decoder_layers num_decoder_layers num_attention_heads "
        "num_heads n_heads swa_num_attention_heads encoder_attention_heads decoder_attention_heads linear_num_heads "
        "linear_num_value_heads mamba_n_heads mamba_num_heads layer_group_size",
        _2="num_experts_per_tok moe_k moe_top_k moe_topk top_k_experts num_key_value_heads swa_num_key_value_heads "
        "kv_n_heads linear_num_key_heads n_groups o_groups index_n_heads zero_expert_num accept_hidden_layer "
        "num_code_groups",
        _1="n_shared_experts num_shared_experts moe_num_shared_experts first_k_dense_replace num_dense_layers "
        "n_group topk_group",
    ),
}
# The same for the towers of images and sound, which no test runs.
_TOWER = _sizes(
    _112="image_size",
    _64="out_hidden_size text_hidden_size output_dim output_proj_dims adapter_out_dim projector_output_dim",
    _32="hidden_size d_model intermediate_size moe_intermediate_size encoder_ffn_dim mlp_dim adapter_in_dim "
    "adapter_input_size projection_intermediate_size projection_hidden_dim projector_input_dim vision_output_dim "
    "output_channels downsample_hidden_size decoder_dim",
    _16="head_dim num_position_embeddings position_embedding_size codebook_size mel_vocab_size",
    _2="num_attention_heads num_heads num_key_value_heads encoder_attention_heads num_local_experts num_quantizers",
    _1="num_hidden_layers depth encoder_layers",
)
# Exceptions of a model type. They go to the text config where a config is nested; a dictionary goes to the nested
# config of that name.
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}
_SAM = {"sam_config": {"downsample_channels": [32, 32]}}
_OWN: dict[str, dict[str, Any]] = {
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_ocr2": {"vision_config": _SAM},
    "deepseek_v2": {"n_group": 2},
    "deepseek_v3": {"n_group": 2},
    "deepseek_v4": {
        "num_key_value_heads": 1,
        "mlp_layer_types": ["hash_moe", "moe", "moe", "moe"],
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
    },
    "dots3_note": {
        **{f"swa_{name}": 4 for name in ("num_attention_heads", "num_key_value_heads")},
        **{f"swa_{name}": 16 for name in ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim")},
        "swa_head_dim": 24,
        "vision_config": {"mlp_layer_types": ["sparse"]},
    },
    "ernie4_5_vl_moe": {
        "moe_intermediate_size": [48, 32],  # of experts for text and for images
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 4]},
    },
    "gemma4": {"enable_moe_block": True},
    "glm4_moe": {"head_dim": 16},
    "glm4v_moe": {"rope_parameters": _MROPE},
    "glm5_next": {"qk_rope_head_dim": 0, "index_kpool": 4},
    "gpt_oss": {
        "num_hidden_layers": 3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},  # YaRN is for a longer context
    },
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "inkling": {"audio_config": {"n_mel_bins": 8}},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 0},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"head_dim": 8, "ffn_hidden_size": 96},
    "mixtral": {"num_hidden_layers": 3},
    "muse_spark": {
        "audio_config": {"patch_sizes": [2], "hidden_sizes": [32], "depths": [1]},
    },
    "nemotron_h": {"layers_block_type": ["mamba", "moe", "attention", "moe"]},
    "nllb_moe": {"encoder_sparse_step": 2, "decoder_sparse_step": 2},
    "olmoe": {"num_hidden_layers": 3},
    "qwen2_moe": {"mlp_only_layers": [1]},
    "qwen3_moe": {"num_hidden_layers": 3, "head_dim": 16},
    "qwen3_omni_moe": {
        "shared_expert_intermediate_size": 32,
        "talker_config": {"spatial_merge_size": 2},
        "vision_config": {"deepstack_visual_indexes": [0]},
    },
    "qwen3_vl_moe": {"vision_config": {"deepstack_visual_indexes": [0]}},
    "qwen4_exp": {
        **{"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8},
        **{"indexer_compress_ratio": 4, "ple_layer_ids": [2], "ngram_vocab_size_base": 97, "split_ngram_parts": 2},
        **{"heads_per_ngram": 2},
    },
    "step3p7": {"sliding_window": 8, "swiglu_limits": [None, None, None, 7.0]},
    "switch_transformers": {"num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 2},
    "unlimited_ocr": {"vision_config": _SAM},
    "zaya": {"num_experts_per_tok": 1},  # the only number that it takes
}
# Tensors that transformers starts as zeros or ones, and that stay so: no test of experts depends on them.
_KEPT = re.compile(r"norm|attn\.\w+\.bias$")


def moe_model_types() -> list[str]:
    """Return the names of the folders of transformers' models that have routed experts, sorted.

    A folder counts if its modeling file uses `use_experts_implementation`, or defines a class whose name ends in
    Experts: a new model of transformers appears without a change here.
    """
    import transformers  # globe_kernels must import without transformers

    files = (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")
    experts = re.compile(r"^@use_experts_implementation|^class \w+Experts\(", re.MULTILINE)
    return sorted({file.parent.name for file in files if experts.search(file.read_text(encoding="utf-8"))})


def tiny_model(model_type: str, seed: int = 0, **overrides: Any) -> Any:
    """Build a random model of a model type (a name of `moe_model_types`) in fp32, small enough for a test.

    Its class is that of the published checkpoints. `overrides` are fields of its config, or of its text config where
    that is nested.
    """
    model_class = _model_class(model_type)
    config = _tiny_config(model_class.config_class, {**_OWN.get(model_type, {}), **overrides}, {})
    torch.manual_seed(seed)
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # a tensor that transformers leaves as it was allocated is NaN then
    try:
        model = model_class(config).float().eval()
    finally:
        torch.use_deterministic_algorithms(deterministic)
    for name, tensor in model.state_dict().items():
        if name.endswith("tid2eid"):  # of each token id its experts
            tensor.copy_(torch.rand(len(tensor), config.n_routed_experts).topk(tensor.shape[1]).indices)
        elif tensor.is_floating_point() and tensor.isnan().any():
            tensor.normal_(std=0.02)
        elif tensor.is_floating_point() and not _KEPT.search(name) and (tensor == tensor.flatten()[0]).all():
            tensor.add_(torch.randn_like(tensor), alpha=0.02)  # zeros or ones, whose loss no test would see
    return model


@functools.cache
def _model_class(model_type: str) -> Any:
    import transformers
    from transformers.models.auto import modeling_auto as auto
    from transformers.models.auto.configuration_auto import model_type_to_module_name

    for names in (
        auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    ):
        found = {name: value for name, value in names.items() if model_type_to_module_name(name) == model_type}
        if found:
            return getattr(transformers, found.get(model_type) or next(iter(found.values())))
    raise KeyError(model_type)


def _tiny_config(config_class: Any, shared: dict[str, Any], own: dict[str, Any], tower: bool = False) -> Any:
    """Build a config whose fields have the sizes of the tables, down to its nested configs.

    `shared` goes to every config that is not a tower, `own` to this one alone.
    """
    fields = {field.name for field in dataclasses.fields(config_class)}
    nested = {name: type(value) for name, value in vars(config_class()).items() if hasattr(value, "model_type")}
    values = {name: size for name, size in (_TOWER if tower else _TEXT).items() if name in fields}
    if not tower and "moe_intermediate_size" not in fields and "intermediate_size" in fields:
        values["intermediate_size"] = _TEXT["moe_intermediate_size"]  # of an expert
    if "kv_lora_rank" in fields:
        values["num_key_value_heads"] = _TEXT["num_attention_heads"]
    values |= {name: value for name, value in shared.items() if name in fields or not (nested or "_config" in name)}
    values |= own
    if not tower and "mlp_layer_types" in fields and "mlp_layer_types" not in values:
        values["mlp_layer_types"] = ["dense"] + ["sparse"] * (values["num_hidden_layers"] - 1)
    for name, nested_class in nested.items():
        is_tower = tower or bool(re.search("vision|audio|code2wav", name))
        values[name] = _tiny_config(nested_class, {} if is_tower else shared, values.get(name, {}), is_tower)
    return config_class(**values)


def text_inputs(model: Any, shape: tuple[int, int] = (2, 16), seed: int = 0) -> dict[str, torch.Tensor]:
    """Return random token ids of the shape (batch, length) as the keyword arguments of a forward of `model`."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.config.get_text_config().vocab_size
    names = {"input_ids", "decoder_input_ids"} & {*inspect.signature(model.forward).parameters} or {"input_ids"}
    return {name: torch.randint(1, vocabulary, shape, generator=generator) for name in sorted(names)}


@torch.no_grad()
def text_logits(model: Any, shape: tuple[int, int] = (2, 16), seed: int = 0) -> torch.Tensor:
    """Return the logits of `model` for its `text_inputs`."""
    runs = getattr(model, "thinker", model)  # qwen3_omni_moe has no forward of its own
    return runs(**text_inputs(model, shape, seed)).logits


def auto_class(model: Any) -> Any:
    """Return the Auto class of transformers that loads a model of this class."""
    import transformers

    names = ("CausalLM", "ImageTextToText", "MultimodalLM", "Seq2SeqLM", "TokenClassification")
    autos = [getattr(transformers, f"AutoModelFor{name}") for name in names]
    return next(auto for auto in autos if auto._model_mapping.get(type(model.config), None) is type(model))


def save_layouts(model: Any, folder: Path) -> dict[str, Path]:
    """Save `model` in the layouts of its tensors on disk, and return the directory of each.

    "original" is the layout of published checkpoints as far as transformers restores it, mostly a matrix per expert;
    of qwen3_vl_moe it does not restore the transposed experts. "fused" is the layout of the live model, left out where
    it is the same.
    """
    paths = {"original": folder / "original", "fused": folder / "fused"}
    for layout, path in paths.items():
        model.save_pretrained(path, max_shard_size="100KB", save_original_format=layout == "original")
    if _tensors(paths["original"]) == _tensors(paths["fused"]):
        shutil.rmtree(paths.pop("fused"))
    return paths


def _tensors(path: Path) -> dict[str, torch.Size]:
    files = [load_file(file) for file in path.glob("*.safetensors")]
    return {name: tensor.shape for file in files for name, tensor in file.items()}
