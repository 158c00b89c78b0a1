"""Write a fit to files: the GloBE checkpoint, the self-contained Hugging Face directory, the dense model."""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path

import torch

from globe_fit.data.source import ExpertSource, read_config
from globe_fit.model_card import model_card
from globe_fit.result import FitResult, reconstruct, slice_experts
from globe_kernels.errors import GlobeError, RequestError
from globe_kernels.format.architectures import ExpertKey
from globe_kernels.format.checkpoint import (
    GlobeCheckpoint,
    GlobeConfig,
    LayerFactors,
    exported_bank_key,
    exported_key,
    writing_checkpoint,
)
from globe_kernels.format.directories import is_earlier_export, require_place
from globe_kernels.format.files import ShardWriter, require_room, staged_directory
from globe_kernels.format.names import CARD_NAME, EXPORT_GUARD, FAMILIES, GUARD_KEY, MODEL_CONFIG_NAME, QUANT_METHOD

# An export takes over the files of the base that a model needs to run, and its licence; neither weights in other
# formats nor files of the training of the base.
_COPIED = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "generation_config.json",
    "*processor_config.json",
    "*.py",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
)
# Not the name that transformers looks for: without globe_kernels no option of from_pretrained finds the weights.
_GLOBE_STEM = "globe-model"
# The router chooses by small differences of this tensor: bf16 would turn them into ties.
_NEVER_CAST = "e_score_correction_bias"

WEIGHTS_KEY = "weights_sha256"  # in fit_report.json, among the facts about the base

OnTensor = Callable[[int, int], None]  # tensors done, tensors in all


def save_fit(result: FitResult, source: ExpertSource, path: str | Path) -> None:
    """Write the GloBE checkpoint of `result` atomically: after a failure `path` holds its old files."""
    banks = {family: factors.bank for family, factors in result.families.items()}
    with writing_checkpoint(path, result.config, banks) as writer:
        for layer, span in source.layer_spans:
            for family, factors in result.families.items():
                writer.add_layer(layer.layer, family, factors.at(span))
        writer.finish(result.report, result.history)


def export_globe(
    checkpoint: GlobeCheckpoint,
    base: ExpertSource,
    out: str | Path,
    *,
    dtype: torch.dtype | None = None,
    on_tensor: OnTensor | None = None,
) -> None:
    """Write a Hugging Face directory that `from_pretrained` loads as GloBE once globe_kernels is imported.

    All tensors of the base but gate and up experts are copied, one shard in memory at a time; fused down experts and
    biases get the layout of GlobeMoEFFN. Floating tensors are cast to `dtype` when it is given. Raises RequestError
    when the checkpoint is of another model.
    """
    require_same_model(checkpoint.config, base)
    require_same_weights(checkpoint, base)
    kept = [key for key in base.files.weight_map if not _is_compressed(base.expert_keys.get(key))]

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for key in kept:
            yield from _kept(base, key)
        for family in FAMILIES:
            yield exported_bank_key(family), checkpoint.bank(family)
        for layer in checkpoint.config.base.num_experts:
            for family in FAMILIES:
                factors = checkpoint.layer(layer, family)
                yield exported_key(layer, f"{family}_adapter"), factors.adapter
                yield exported_key(layer, f"{family}_code_index"), factors.code.index
                yield exported_key(layer, f"{family}_code_value"), factors.code.value

    split = sum(key.matrix == "gate_up_bias" for key in base.expert_keys.values())
    count = len(kept) + split + len(checkpoint.config.tensor_shapes())
    quantization = {"quant_method": QUANT_METHOD, **checkpoint.config.to_dict()}
    needed = _bytes(base, kept, dtype) + _checkpoint_bytes(checkpoint.config, dtype)
    card = model_card(checkpoint, base, dense=False)
    _write_model(base, Path(out), card, tensors(), count, needed, dtype, quantization, on_tensor)


def export_dense(
    checkpoint: GlobeCheckpoint,
    base: ExpertSource,
    out: str | Path,
    *,
    dtype: torch.dtype | None = None,
    on_tensor: OnTensor | None = None,
) -> None:
    """Write the reconstructed dense model in the layout of the base, for engines that do not know GloBE."""
    require_same_model(checkpoint.config, base)
    require_same_weights(checkpoint, base)
    banks = {family: checkpoint.bank(family) for family in FAMILIES}
    keys = list(base.files.weight_map)

    @lru_cache(maxsize=len(FAMILIES))
    def layer_factors(layer: int, family: str) -> LayerFactors:
        return checkpoint.layer(layer, family)

    def dense(key: ExpertKey, family: str) -> torch.Tensor:
        factors = layer_factors(key.layer, family)
        if key.expert is not None:
            factors = slice_experts(factors, slice(key.expert, key.expert + 1))
        return reconstruct(factors, banks[family], checkpoint.config.phi)

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name in keys:
            key, original = base.expert_keys.get(name), base.files.read(name)
            if key is not None and _is_compressed(key):
                original = torch.empty_like(original)
                for family in FAMILIES if key.matrix == "gate_up" else (key.matrix,):
                    part = original[None] if key.expert is not None else base.architecture.part(original, family)
                    part.copy_(dense(key, family))
            yield name, original

    card = model_card(checkpoint, base, dense=True)
    _write_model(base, Path(out), card, tensors(), len(keys), _bytes(base, keys, dtype), dtype, None, on_tensor)


def _is_compressed(key: ExpertKey | None) -> bool:
    return key is not None and key.matrix in ("gate", "up", "gate_up")


def _kept(base: ExpertSource, key: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a tensor of the base that is not compressed, under its names in the model that runs as GloBE."""
    parsed, tensor = base.expert_keys.get(key), base.files.read(key)
    if parsed is None or parsed.expert is not None:
        yield key, tensor
        return
    prefix, _, name = key.rpartition(".")
    for kept_name, view in base.architecture.kept(name, tensor).items():
        yield f"{prefix}.{kept_name}", view


def _is_cast(key: str, is_floating_point: bool, dtype: torch.dtype | None) -> bool:
    """Whether an export in `dtype` casts a tensor."""
    return dtype is not None and is_floating_point and not key.endswith((_NEVER_CAST, "_code_value"))


def _cast(key: str, tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    if not _is_cast(key, tensor.is_floating_point(), dtype):
        return tensor
    cast = tensor.to(dtype)
    if not torch.isfinite(cast).all() and torch.isfinite(tensor).all():
        raise GlobeError(f"{key} has values that {dtype} cannot hold; export with another dtype, such as bf16.")
    return cast


def _bytes(base: ExpertSource, keys: list[str], dtype: torch.dtype | None) -> int:
    """Count the bytes of tensors of the base in an export in `dtype`."""
    total = 0
    for key in keys:
        view = base.files.view(key)
        if dtype is not None and _is_cast(key, "F" in view.get_dtype(), dtype):
            total += math.prod(view.get_shape()) * dtype.itemsize
        else:
            total += base.files.num_bytes(key)
    return total


def _checkpoint_bytes(config: GlobeConfig, dtype: torch.dtype | None) -> int:
    """Count the bytes of the tensors of a checkpoint in an export in `dtype`."""
    total = 0
    for name, (shape, stored) in config.tensor_shapes().items():
        is_cast = dtype is not None and _is_cast(name, stored.is_floating_point, dtype)
        total += math.prod(shape) * (dtype if is_cast else stored).itemsize
    return total


def require_same_weights(checkpoint: GlobeCheckpoint, base: ExpertSource) -> None:
    """Raises RequestError when a checkpoint was fitted on other weights, as far as its report records them."""
    recorded = (checkpoint.report().get("base") or {}).get(WEIGHTS_KEY)
    if recorded is not None and recorded != base.weights_sha256:
        raise RequestError(
            f"{checkpoint.path} was fitted on other weights than the weights of {base.model_dir}: the experts have "
            "changed since; give the model that it was fitted on, or fit again with --restart."
        )


def require_same_model(sizes: GlobeConfig, base: ExpertSource) -> None:
    """Raises RequestError when a checkpoint of `sizes` was not fitted on a model like `base`."""
    for name in ("model_type", "hidden_size", "intermediate_size", "num_experts", "left_dense"):
        expected, found = getattr(sizes.base, name), getattr(base.base, name)
        if expected != found:
            raise RequestError(
                f"The checkpoint was fitted on {sizes.base.name} with {name} {expected} and {base.model_dir} has "
                f"{found}; give the directory of {sizes.base.name}."
            )


def _write_model(
    base: ExpertSource,
    out: Path,
    card: str,
    tensors: Iterator[tuple[str, torch.Tensor]],
    count: int,
    needed: int,
    dtype: torch.dtype | None,
    quantization: dict | None,
    on_tensor: OnTensor | None,
) -> None:
    """Write tensors, configuration, tokenizer and other small files of the base, and the model card."""
    if out.resolve() == base.model_dir.resolve():
        raise RequestError(f"{out} is the base model itself; give another output directory.")
    require_place(out, is_earlier_export, "export")
    require_room(out, needed)
    config = read_config(base.model_dir)
    config.pop("quantization_config", None)
    if dtype is not None:
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(dtype).removeprefix("torch.")
    stem = "model" if quantization is None else _GLOBE_STEM
    stale = {path.name for each in ("model", _GLOBE_STEM) for path in out.glob(f"{each}*.safetensors*")}
    with staged_directory(out, last=MODEL_CONFIG_NAME) as staging:
        for path in base.model_dir.iterdir():
            if path.is_file() and any(fnmatch(path.name, pattern) for pattern in _COPIED):
                shutil.copyfile(path, staging / path.name)
        shards = ShardWriter(staging, stem, {"format": "pt"})
        for done, (key, tensor) in enumerate(tensors, start=1):
            shards.add(key, _cast(key, tensor, dtype))
            if on_tensor is not None:
                on_tensor(done, count)
        weight_map = shards.finish()
        written = set(weight_map.values())
        entry = f"{stem}.safetensors"
        if len(written) > 1:
            entry = f"{stem}.safetensors.index.json"
            written.add(entry)
            index = {"metadata": {"total_size": shards.total_bytes}, "weight_map": weight_map}
            (staging / entry).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        if quantization is not None:
            config |= {"quantization_config": quantization | {"weights": entry}, GUARD_KEY: EXPORT_GUARD}
        (staging / CARD_NAME).write_text(card, encoding="utf-8")
        (staging / MODEL_CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name in stale - written:
        (out / name).unlink(missing_ok=True)
