"""Write a fit to files: the GloBE checkpoint, the self-contained Hugging Face directory, the dense model."""

import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path

import torch

from globe_fit.data.beside import files_beside, files_of_a_model, state_dtype
from globe_fit.data.disk_names import ExpertKey
from globe_fit.data.quantized.config import without_quantization
from globe_fit.data.source import ExpertSource, read_config
from globe_fit.model_card import model_card
from globe_fit.result import FitResult, reconstruct, slice_experts
from globe_fit.run.reports import read_report
from globe_kernels.errors import GlobeError, RequestError, tolerating, warn
from globe_kernels.format.checkpoint import (
    GlobeCheckpoint,
    GlobeConfig,
    LayerFactors,
    exported_bank_key,
    writing_checkpoint,
)
from globe_kernels.format.directories import adapter_note, is_earlier_export, require_place
from globe_kernels.format.files import inner_file, sha256
from globe_kernels.format.layout import BIASES, GATE_UP
from globe_kernels.format.names import (
    CARD_MARK,
    CARD_NAME,
    EVALUATION_NAME,
    EXPORT_GUARD,
    FAMILIES,
    GUARD_KEY,
    INDEX_NAME,
    MODEL_CONFIG_NAME,
    PAGE_NAME,
    QUANT_METHOD,
    SINGLE_NAME,
)
from globe_kernels.format.writing import (
    ShardWriter,
    place_beside,
    require_room,
    staged_directory,
)

# Not the name that transformers looks for: without globe_kernels no option of from_pretrained finds the weights.
_GLOBE_STEM, _DENSE_STEM = "globe-model", "model"
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


def remove_figures(path: str | Path) -> None:
    """Remove the figures of the checkpoint that was in `path` before: its evaluation and its page."""
    with tolerating("Removing the figures of the fit before", f"the checkpoint in {path} is complete"):
        for name in (EVALUATION_NAME, PAGE_NAME):
            (Path(path) / name).unlink(missing_ok=True)


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
    checkpoint.verify()
    compressed = {key for key, parsed in base.expert_keys.items() if parsed.is_compressed}
    kept = [key for key in base.files.keys if key not in compressed]
    names = {parsed.layer: key for key, parsed in base.expert_keys.items()}
    paths = {
        layer.layer: base.names.exported_path(base.outline.experts[layer.layer].name, names[layer.layer])
        for layer in base.layers
    }

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for key in kept:
            yield from _kept(base, key, paths)
        for family in FAMILIES:
            yield exported_bank_key(family), checkpoint.bank(family)
        for layer in checkpoint.config.base.num_experts:
            for family in FAMILIES:
                factors = checkpoint.layer(layer, family)
                yield f"{paths[layer]}.{family}_adapter", factors.adapter
                yield f"{paths[layer]}.{family}_code_index", factors.code.index
                yield f"{paths[layer]}.{family}_code_value", factors.code.value

    split = sum(key.matrix == BIASES[GATE_UP] for key in base.expert_keys.values())
    count = len(kept) + split + len(checkpoint.config.tensor_shapes())
    quantization = {"quant_method": QUANT_METHOD, **checkpoint.config.to_dict()}
    needed = _bytes(base, kept, dtype) + _checkpoint_bytes(checkpoint.config, dtype)
    card = _card(checkpoint, base, dense=False)
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
    checkpoint.verify()
    banks = {family: checkpoint.bank(family) for family in FAMILIES}
    keys = list(base.files.keys)

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
            key = base.expert_keys.get(name)
            if key is None or not key.is_compressed:
                original = base.files.read(name)
            else:
                original = torch.empty(base.files.shape(name), dtype=base.files.dtype(name))
                for family in FAMILIES if key.matrix == GATE_UP else (key.matrix,):
                    part = original[None] if key.expert is not None else key.layout.part(original, family)
                    part.copy_(dense(key, family))
            yield name, original

    card = _card(checkpoint, base, dense=True)
    _write_model(base, Path(out), card, tensors(), len(keys), _bytes(base, keys, dtype), dtype, None, on_tensor)


def _kept(base: ExpertSource, key: str, paths: dict[int, str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a tensor of the base that is not compressed, under its names in an export; `paths` are of its experts."""
    parsed, tensor = base.expert_keys.get(key), base.files.read(key)
    if parsed is None or parsed.expert is not None:
        yield key, tensor
        return
    for kept_name, view in parsed.layout.kept(parsed.matrix, tensor).items():
        yield f"{paths[parsed.layer]}.{kept_name}", view


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
    return _cast_bytes(((key, base.files.shape(key), base.files.dtype(key)) for key in keys), dtype)


def _checkpoint_bytes(config: GlobeConfig, dtype: torch.dtype | None) -> int:
    """Count the bytes of the tensors of a checkpoint in an export in `dtype`."""
    return _cast_bytes(((name, *spec) for name, spec in config.tensor_shapes().items()), dtype)


def _cast_bytes(tensors: Iterable[tuple[str, tuple[int, ...], torch.dtype]], dtype: torch.dtype | None) -> int:
    total = 0
    for name, shape, stored in tensors:
        held = dtype if dtype is not None and _is_cast(name, stored.is_floating_point, dtype) else stored
        total += math.prod(shape) * held.itemsize
    return total


def require_same_weights(checkpoint: GlobeCheckpoint, base: ExpertSource) -> None:
    """Raises RequestError when a checkpoint was fitted on other weights, as far as it records its weights."""
    of_version_0_1 = (read_report(checkpoint).get("base") or {}).get("weights_sha256")
    recorded = checkpoint.config.provenance.get("weights_sha256", of_version_0_1)
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


def _card(checkpoint: GlobeCheckpoint, base: ExpertSource, dense: bool) -> str:
    with tolerating("Making the model card", "the export has a card without figures"):
        return model_card(checkpoint, base, dense=dense)
    return f"# {base.base.name}, {CARD_MARK}\n"


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
    config = without_quantization(read_config(base.model_dir))
    config.pop(GUARD_KEY, None)  # of the files of the base
    state_dtype(config, str(dtype or base.files.default_dtype).removeprefix("torch."), change=dtype is not None)
    if note := adapter_note(base.model_dir):
        warn(note, stacklevel=3)
    copied = [(name, inner_file(base.model_dir, str(name))) for name in files_beside(base.model_dir)]
    shared = [str(name) for name, _ in copied]
    if out.is_dir() and (others := {*files_of_a_model(out)} - {*shared}):
        raise RequestError(
            f"{out} has {min(others)} and {base.model_dir} does not: the export there is of another model, which would "
            "leave the file to this export; give a new directory, or remove the file."
        )
    stem = _DENSE_STEM if quantization is None else _GLOBE_STEM
    if stem == _DENSE_STEM:  # its weights have the names of the old weights, whatever the configuration says
        shared.append(MODEL_CONFIG_NAME)
    stems = (_DENSE_STEM, _GLOBE_STEM)
    with staged_directory(out, switch=MODEL_CONFIG_NAME, stems=stems, shared=shared) as staging:
        for name, path in copied:
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, staging / name)
        shards = ShardWriter(staging, out, stem, {"format": "pt"})
        for done, (key, tensor) in enumerate(tensors, start=1):
            if tensor.is_floating_point() and tensor.isnan().any():
                raise GlobeError(f"{key} of {base.model_dir} holds NaN; download the file again.")
            shards.add(key, _cast(key, tensor, dtype))
            if on_tensor is not None:
                on_tensor(done, count)
        entry = _index(shards, out, stem)
        if quantization is not None:
            weights = {"weights": entry, "files": shards.sha256}
            config |= {"quantization_config": quantization | weights, GUARD_KEY: EXPORT_GUARD}
        with tolerating("Writing the model card", "the export is complete without it"):
            (staging / CARD_NAME).write_text(card, encoding="utf-8")
        (staging / MODEL_CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _index(shards: ShardWriter, out: Path, stem: str) -> str:
    """Give the shards their names, and write their index where a reader needs it.

    Returns the file in which a reader begins. A dense model has the names that every engine looks for: its index takes
    the place of the old index in one rename, and one old file is read until it is removed.
    """
    weight_map = shards.finish()
    entry = min(weight_map.values())
    if len(shards.sha256) == 1 and (stem == _GLOBE_STEM or entry == SINGLE_NAME):
        return entry
    index = {"metadata": {"total_size": shards.total_bytes}, "weight_map": weight_map}
    path = shards.staging / INDEX_NAME
    path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return place_beside(path, out, stem, ".safetensors.index.json", sha256(path)) if stem == _GLOBE_STEM else path.name
