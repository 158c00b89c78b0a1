"""What compression does to a model: perplexity, KL(dense || compressed), top-1 agreement, throughput."""

import copy
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from globe_fit.data.source import ExpertLayer, ExpertSource
from globe_kernels.errors import GlobeError, RequestError
from globe_kernels.format.architectures import FAMILIES

WINDOW = 256
_BATCH = 16
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")

OnBatch = Callable[[int, int], None]  # batches done, batches in all


@dataclass(frozen=True)
class Quality:
    """One model on one text. `kl` (nats per token) and `top1` compare with the reference model."""

    perplexity: float
    kl: float
    top1: float  # share of positions where both models prefer the same next token
    tokens_per_s: float


def load_model(
    path: str | Path,
    device: str = "cpu",
    dtype: torch.dtype | str = "auto",
    *,
    offload_folder: Path | None = None,
) -> nn.Module:
    """A causal language model from a local directory, dense or exported by GloBE, in evaluation mode.

    With `offload_folder` its layers stay on disk, there or in the checkpoint, until they are called.
    """
    path = Path(path)
    if not (path / "config.json").is_file():
        raise RequestError(f"{path} holds no config.json; give the local directory of a Hugging Face model.")
    try:
        if offload_folder is not None:
            on_device = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb"), device)
            places = on_device | dict.fromkeys(("model.layers", "lm_head"), "disk")
            options = {"device_map": places, "offload_folder": offload_folder}
            return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **options).eval()
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    except GlobeError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise GlobeError(f"{path} cannot be loaded by transformers ({error}); restore or export it again.") from error
    return model.to(device).eval()


def shared_copy(model: nn.Module) -> nn.Module:
    """`model` again over the same tensors, for `patch`: only its modules are copies. Do not move or cast either."""
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def with_experts(
    source: ExpertSource, weights: Callable[[ExpertLayer, str], torch.Tensor], device: str = "cpu"
) -> nn.Module:
    """The dense model of `source` with the gate and up experts (E, P, D) that `weights` gives per layer and family."""
    model = load_model(source.model_dir, device)
    live = dict(source.architecture.live_experts(model))
    for layer in source.layers:
        experts: Any = model.get_submodule(live[layer.layer])
        for family in FAMILIES:
            source.architecture.part(experts.gate_up_proj.data, family).copy_(weights(layer, family))
    return model


def token_windows(model_dir: str | Path, text_file: str | Path) -> torch.Tensor:
    """(N, WINDOW) int64: the text in the tokenizer of `model_dir`, cut into windows without overlap.

    Raises RequestError when the text is missing, or too short for one window.
    """
    text_file = Path(text_file)
    if not text_file.is_file():
        raise RequestError(f"{text_file} is not a file; give a text file to evaluate on.")
    try:
        text = text_file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"{text_file} is not UTF-8 text ({error}); convert it first.") from error
    tokenizer = load_tokenizer(model_dir)
    tokens = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
    if len(tokens) < WINDOW:
        raise RequestError(f"{text_file} has {len(tokens)} tokens; give a text of at least {WINDOW}.")
    return tokens[: len(tokens) // WINDOW * WINDOW].view(-1, WINDOW)


def load_tokenizer(model_dir: str | Path):
    """The tokenizer of a model directory. Raises RequestError when it has none."""
    # without its files transformers makes up a tokenizer with an empty vocabulary
    if not any((Path(model_dir) / name).is_file() for name in _TOKENIZER_FILES):
        raise RequestError(f"{model_dir} holds none of {', '.join(_TOKENIZER_FILES)}; add the model's tokenizer.")
    try:
        return AutoTokenizer.from_pretrained(model_dir)
    except Exception as error:  # a broken file may raise anything in there
        raise RequestError(f"{model_dir} has no tokenizer that transformers can load ({error}).") from error


@torch.inference_mode()
def evaluate(
    models: Mapping[str, Any], windows: torch.Tensor, *, on_batch: OnBatch | None = None
) -> dict[str, Quality]:
    """Every model on the same windows; the first model is the reference of `kl` and `top1`.

    The models take turns batch by batch, so that throughput is measured side by side; the first batch of
    each warms up and is not timed where there is more than one. Raises RequestError when vocabularies differ.
    """
    vocabularies = {name: model.get_input_embeddings().num_embeddings for name, model in models.items()}
    if len(set(vocabularies.values())) > 1 or int(windows.max()) >= min(vocabularies.values()):
        sizes = ", ".join(f"{name} has {size}" for name, size in vocabularies.items())
        raise RequestError(
            f"The models and the text do not share a vocabulary: {sizes}, the text needs {int(windows.max()) + 1}; "
            "compare a model with its own base and tokenizer."
        )
    batches = windows.split(_BATCH)
    totals = {name: {"nll": 0.0, "kl": 0.0, "top1": 0.0, "seconds": 0.0, "timed": 0.0} for name in models}
    count = windows.shape[0] * (windows.shape[1] - 1)
    for number, batch in enumerate(batches):
        reference: torch.Tensor | None = None
        for name, model in models.items():
            device = next(model.parameters()).device
            began = time.perf_counter()
            logits = model(batch.to(device)).logits
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            total = totals[name]
            if number > 0 or len(batches) == 1:
                total["seconds"] += time.perf_counter() - began
                total["timed"] += batch.numel()
            compared = _compare(logits[:, :-1], batch[:, 1:].to(device), reference)
            for key, value in compared.items():
                total[key] += value
            if reference is None:
                reference = logits[:, :-1]
        if on_batch is not None:
            on_batch(number + 1, len(batches))
    return {
        name: Quality(
            perplexity=math.exp(min(total["nll"] / count, 700.0)),
            kl=total["kl"] / count,
            top1=total["top1"] / count,
            tokens_per_s=total["timed"] / total["seconds"],
        )
        for name, total in totals.items()
    }


def _compare(logits: torch.Tensor, target: torch.Tensor, reference: torch.Tensor | None) -> dict[str, float]:
    """Sums over all positions; window by window, since a vocabulary in fp32 is large. No reference: itself."""
    sums = {"nll": 0.0, "kl": 0.0, "top1": 0.0}
    for number, window in enumerate(logits):
        log_probs = F.log_softmax(window.float(), dim=-1)
        sums["nll"] += F.nll_loss(log_probs, target[number], reduction="sum").item()
        if reference is None:
            sums["top1"] += len(window)
            continue
        expected = F.log_softmax(reference[number].to(window.device).float(), dim=-1)
        sums["kl"] += (expected.exp() * (expected - log_probs)).sum().item()
        sums["top1"] += (expected.argmax(-1) == log_probs.argmax(-1)).sum().item()
    return sums


@torch.inference_mode()
def read_token_by_token(model: Any, window: torch.Tensor) -> float:
    """Tokens/s of `model` over a window (T,), a step per token; the first quarter warms up and is not timed."""
    device = next(model.parameters()).device
    cache, began, untimed = None, 0.0, len(window) // 4
    for number, token in enumerate(window.to(device).view(-1, 1, 1)):
        if number == untimed:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            began = time.perf_counter()
        cache = model(token, past_key_values=cache, use_cache=True).past_key_values
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (len(window) - untimed) / (time.perf_counter() - began)


@torch.inference_mode()
def continue_text(model: Any, model_dir: str | Path, prompt: str, max_new_tokens: int) -> str:
    """The greedy continuation of `prompt`."""
    tokenizer = load_tokenizer(model_dir)
    inputs = tokenizer(prompt, return_tensors="pt").to(next(model.parameters()).device)
    inputs.pop("token_type_ids", None)
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
