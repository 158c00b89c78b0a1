"""Load a whole model with transformers, its tokenizer, and texts as tokens."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel

from globe_fit.data.outline import Outline, model_class, read_transformers_config
from globe_fit.data.quantized.config import quantization_of
from globe_fit.data.quantized.tensors import StoredTensors
from globe_fit.data.source import ExpertLayer, ExpertSource, TensorFiles, read_config
from globe_fit.data.whole import require_whole
from globe_kernels.errors import GlobeError, RequestError, explaining
from globe_kernels.format.directories import holds_export, holds_model, not_a_model, weights_entry
from globe_kernels.format.files import inner_file
from globe_kernels.format.hub import index_of, local_directory
from globe_kernels.format.names import FAMILIES
from globe_kernels.model.discovery import routed_experts
from globe_kernels.model.loaded import require_all_weights

WINDOW = 256
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_BESIDE_TOKENIZERS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt")


def load_model(
    path: str | Path,
    device: str = "cpu",
    dtype: torch.dtype | str = "auto",
    *,
    offload_folder: Path | None = None,
) -> nn.Module:
    """Load a causal language model from a directory or the Hub, dense or exported by GloBE, in evaluation mode.

    With `offload_folder` its layers stay on disk, in this folder or in the checkpoint, until they are called. A
    quantised model is loaded with the values of its weights, as a fit reads them. Raises RequestError for another
    directory, GlobeError for a model that transformers cannot load.
    """
    path = local_directory(path)
    if not holds_model(path):
        raise not_a_model(path)
    config = read_transformers_config(path)
    whole = model_class(config)
    _require_own_files(path)
    exported = holds_export(path)  # globe_kernels checks its tensors
    quantization = {} if exported else quantization_of(read_config(path))
    pickled = weights_entry(path) is None and not quantization  # files that transformers alone reads
    tensors = None if exported or pickled else StoredTensors(TensorFiles(path), quantization)
    if tensors is not None:
        require_whole(path, Outline.read(path).model, tensors)
    # a configuration of wrong values fails anywhere in the code of a model
    with explaining(f"transformers cannot load {path}", "restore the directory or export it again"):
        if tensors is not None and quantization:
            return _dequantized(whole, config, tensors, dtype).to(device).eval()
        if offload_folder is not None:
            options = {"device_map": _layers_on_disk(Outline.read(path), device), "offload_folder": offload_folder}
            return whole.from_pretrained(path, dtype=dtype, **options).eval()
        model: Any = whole.from_pretrained(path, dtype=dtype)
        if pickled:
            require_all_weights(model)
    for name, parameter in model.named_parameters():
        if name.endswith("weight") and not parameter.is_floating_point():  # transformers casts no integers
            raise GlobeError(f"{name} in {path} is stored as {parameter.dtype}; download or export it again.")
    return model.to(device).eval()


def running(name: str) -> AbstractContextManager[None]:
    """Let an error of the model that runs inside be a GlobeError; `name` begins its sentence."""
    # a configuration of wrong values fails anywhere in the code of a model
    return explaining(f"{name} fails on this text", "restore its files, or give it a device with more memory")


def _layers_on_disk(outline: Outline, device: str) -> dict[str, str]:
    """Return a device map that leaves the layers of the language model, and the head, on disk."""
    on_disk = {experts.name.rpartition(".layers.")[0] + ".layers" for experts in outline.experts.values()}
    head = outline.model.get_output_embeddings()
    if head is not None and head.weight is not outline.model.get_input_embeddings().weight:
        on_disk |= {name for name, module in outline.model.named_modules() if module is head}
    devices: dict[str, str] = {}

    def place(name: str, module: nn.Module) -> None:
        if name in on_disk or not any(path.startswith(f"{name}.") for path in on_disk):
            devices[name] = "disk" if name in on_disk else device
            return
        devices.update({f"{name}.{own}": device for own, _ in module.named_parameters(recurse=False)})
        for child, inner in module.named_children():
            place(f"{name}.{child}", inner)

    for name, module in outline.model.named_children():
        place(name, module)
    return devices


def _require_own_files(path: Path) -> None:
    """Raise GlobeError when a file of the weights lies outside of the directory: transformers follows any link."""
    if (entry := weights_entry(path)) is not None:
        listed = index_of(inner_file(path, entry)).values() if entry.endswith(".json") else ()
        for name in {entry, *listed}:
            inner_file(path, name)


def _dequantized(whole: Any, config: Any, tensors: StoredTensors, dtype: torch.dtype | str) -> Any:
    """Load a model of class `whole` from the values of its tensors, which are read one by one as transformers asks."""
    for part in (config, config.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    if dtype == "auto":
        dtype = getattr(config, "dtype", None) or torch.bfloat16
    return whole.from_pretrained(None, config=config, state_dict=tensors.views(), dtype=dtype)


def text_part(model: Any) -> Any:
    """Return the part of a model that runs over tokens: the model, unless it has no forward of its own."""
    if type(model).forward is not nn.Module.forward:
        return model
    parts = (part for part in model.children() if isinstance(part, PreTrainedModel))
    return next(part for part in parts if part.get_output_embeddings() is not None)


def predictor(model: Any) -> Any:
    """Return the part of a model that predicts the next token. Raises RequestError for a model of another task."""
    part = text_part(model)
    if part.get_output_embeddings() is None:
        raise RequestError(
            f"{type(part).__name__} predicts no next token, so it neither writes a text nor has a perplexity; "
            "calibrate on a text file, and measure such a model by its own task."
        )
    return part


def shared_copy(model: nn.Module) -> nn.Module:
    """Copy the modules of `model` but not its tensors, for `patch`. Do not move or cast either model."""
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def with_experts(
    source: ExpertSource,
    weights: Callable[[ExpertLayer, str], torch.Tensor],
    device: str = "cpu",
    dtype: torch.dtype | str = "auto",
) -> nn.Module:
    """Load the dense model of `source` and set its gate and up experts (E, P, D) to `weights(layer, family)`."""
    model = load_model(source.model_dir, device, dtype)
    live = routed_experts(model)
    for layer in source.layers:
        experts = live[layer.layer]
        for family in FAMILIES:
            experts.layout.part(experts.module.gate_up_proj.data, family).copy_(weights(layer, family))
    return model


def token_windows(model_dir: str | Path, text_file: str | Path) -> torch.Tensor:
    """Cut a text, in tokens of `model_dir`, into windows (N, WINDOW) int64 without overlap.

    Raises RequestError when the text is missing, is not UTF-8, or is too short for a window.
    """
    text_file = Path(text_file)
    if not text_file.is_file():
        raise RequestError(f"{text_file} is not a file; give a UTF-8 text file.")
    try:
        text = text_file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"{text_file} is not UTF-8 text ({error}); convert the file to UTF-8.") from error
    tokenizer = load_tokenizer(model_dir)
    try:
        tokens = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
    except Exception as error:  # a broken file may raise any exception here too
        raise _no_tokenizer(model_dir, error) from error
    if len(tokens) < WINDOW:
        raise RequestError(f"{text_file} has {len(tokens)} tokens; give a text of at least {WINDOW}.")
    return tokens[: len(tokens) // WINDOW * WINDOW].view(-1, WINDOW)


def load_tokenizer(model_dir: str | Path):
    """Load the tokenizer of a model directory. Raises RequestError when it has none."""
    model_dir = local_directory(model_dir)
    # without the files of a tokenizer, transformers invents a tokenizer with an empty vocabulary
    if not any((model_dir / name).is_file() for name in _TOKENIZER_FILES):
        raise RequestError(f"{model_dir} holds none of {', '.join(_TOKENIZER_FILES)}; add the tokenizer of the model.")
    for name in (*_TOKENIZER_FILES, *_BESIDE_TOKENIZERS):
        inner_file(model_dir, name)
    try:
        return AutoTokenizer.from_pretrained(model_dir)
    except Exception as error:  # a broken file may raise any exception
        raise _no_tokenizer(model_dir, error) from error


def _no_tokenizer(model_dir: str | Path, error: Exception) -> RequestError:
    return RequestError(
        f"{model_dir} has no tokenizer that transformers can use ({type(error).__name__}: {error}); download its files "
        "again."
    )
