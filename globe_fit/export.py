"""Write a fit to files: the GloBE checkpoint, the self-contained Hugging Face directory, the dense model."""

import json
import shutil
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import torch

from globe_fit.data.source import INDEX_NAME, ExpertSource, read_config
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
from globe_kernels.format.files import ShardWriter, holds_only_staging, require_room, staged_directory
from globe_kernels.format.names import CONFIG_NAME, FAMILIES, METRICS_NAME, QUANT_METHOD, REPORT_NAME

# An export takes over neither weights in any format nor files that describe the files of the base.
_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx"}
_NOT_COPIED = {
    "config.json",
    INDEX_NAME,
    "README.md",
    "pytorch_model.bin.index.json",
    CONFIG_NAME,  # a GloBE checkpoint may lie beside its base
    REPORT_NAME,
    METRICS_NAME,
}
# The router chooses by small differences of this tensor: bf16 would turn them into ties.
_NEVER_CAST = "e_score_correction_bias"

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
    needed = _bytes(base, kept) + checkpoint.bytes_on_disk
    _write_model(base, Path(out), tensors(), count, needed, dtype, quantization, on_tensor)


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

    _write_model(base, Path(out), tensors(), len(keys), _bytes(base, keys), dtype, None, on_tensor)


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


def _cast(key: str, tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    if dtype is None or not tensor.is_floating_point() or key.endswith((_NEVER_CAST, "_code_value")):
        return tensor
    cast = tensor.to(dtype)
    if not torch.isfinite(cast).all() and torch.isfinite(tensor).all():
        raise GlobeError(f"{key} has values that {dtype} cannot hold; export with another dtype, such as bf16.")
    return cast


def _bytes(base: ExpertSource, keys: list[str]) -> int:
    return sum(base.files.num_bytes(key) for key in keys)


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
    tensors: Iterator[tuple[str, torch.Tensor]],
    count: int,
    needed: int,
    dtype: torch.dtype | None,
    quantization: dict | None,
    on_tensor: OnTensor | None,
) -> None:
    """Write tensors, configuration, tokenizer and other small files of the base, and a model card."""
    if out.resolve() == base.model_dir.resolve():
        raise RequestError(f"{out} is the base model itself; give another output directory.")
    if out.exists() and not (out.is_dir() and _may_replace(out)):
        raise RequestError(f"{out} exists and is not an earlier export of GloBE; give a new directory.")
    require_room(out, needed if dtype is None else needed * dtype.itemsize // 2)
    config = read_config(base.model_dir)
    config.pop("quantization_config", None)
    if quantization is not None:
        config["quantization_config"] = quantization
    if dtype is not None:
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(dtype).removeprefix("torch.")
    stale = {path.name for path in out.glob("model*.safetensors*")}  # of the export that is replaced
    with staged_directory(out, last="config.json") as staging:
        for path in base.model_dir.iterdir():
            if path.is_file() and path.suffix not in _WEIGHT_SUFFIXES and path.name not in _NOT_COPIED:
                shutil.copyfile(path, staging / path.name)
        shards = ShardWriter(staging, "model", {"format": "pt"})
        for done, (key, tensor) in enumerate(tensors, start=1):
            shards.add(key, _cast(key, tensor, dtype))
            if on_tensor is not None:
                on_tensor(done, count)
        weight_map = shards.finish()
        written = set(weight_map.values())
        if len(written) > 1:
            written.add(INDEX_NAME)
            index = {"metadata": {"total_size": shards.total_bytes}, "weight_map": weight_map}
            (staging / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        (staging / "README.md").write_text(_model_card(base, quantization), encoding="utf-8")
        (staging / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name in stale - written:
        (out / name).unlink(missing_ok=True)


def _may_replace(out: Path) -> bool:
    """Tell whether an export may replace `out`: it is empty, or its model card says that an export wrote it."""
    card = out / "README.md"
    return holds_only_staging(out) or (card.is_file() and _CARD_MARK in card.read_text(encoding="utf-8"))


_CARD_MARK = "Compressed with GloBE"


def _model_card(base: ExpertSource, quantization: dict | None) -> str:
    header = f"---\nbase_model: {base.base.name}\ntags: [globe, moe]\n---\n\n# {base.base.name}, GloBE\n\n"
    if quantization is None:
        return header + (
            f"{_CARD_MARK} and reconstructed: a dense model in the layout of {base.base.name}, with the sizes of the "
            "original and the weights that the compressed model stands for.\n"
        )
    return header + (
        f"{_CARD_MARK}: the gate and up matrices of all experts share one bank of {quantization['num_atoms']} "
        f"atoms per family (rank {quantization['rank']}, {quantization['support']} atoms per expert).\n\n"
        "Import `globe_kernels` first; without it transformers loads random experts and only warns.\n\n"
        "```python\nimport globe_kernels\nfrom transformers import AutoModelForCausalLM\n\n"
        'model = AutoModelForCausalLM.from_pretrained("path/of/this/directory")\n```\n'
    )
