"""Measure the effect of compression: perplexity, KL(dense || compressed), agreement of tokens and routes, speed."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any, NotRequired, TypedDict

import torch
import torch.nn.functional as F
from torch import nn

from globe_fit.data.model import load_tokenizer, predictor, running
from globe_kernels.errors import GlobeError, RequestError
from globe_kernels.format.checkpoint import GlobeCheckpoint
from globe_kernels.format.files import inner_file, read_json
from globe_kernels.format.json_text import to_json
from globe_kernels.format.names import EVALUATION_NAME
from globe_kernels.format.typed import Above, checked
from globe_kernels.format.writing import replacing_file
from globe_kernels.model.discovery import routed_experts
from globe_kernels.model.targets import globe_modules

_BATCH = 16

Chosen = dict[int, torch.Tensor]
OnBatch = Callable[[int, int], None]  # batches done, batches in all


@dataclass(frozen=True)
class Quality:
    """The quality of a model on a text. `kl` (nats per token) and `top1` compare with the reference model."""

    perplexity: float
    kl: float
    top1: float  # share of positions where both models prefer the same next token
    tokens_per_s: float
    timed_batches: int
    # share of (token, layer, choice) where both models route the token to the same expert; None without routed experts
    router_agreement: float | None


@torch.inference_mode()
def evaluate(
    models: Mapping[str, Any], windows: torch.Tensor, *, on_batch: OnBatch | None = None
) -> dict[str, Quality]:
    """Evaluate every model on the same windows (N, T); the first model is the reference of `kl` and `top1`.

    The models take turns batch by batch, so that throughput is measured side by side: the median over the batches, of
    which the first warms up and does not count where there are others. Raises RequestError when vocabularies differ,
    GlobeError when a model fails or gives NaN.
    """
    models = {name: predictor(model) for name, model in models.items()}
    vocabularies = {name: model.get_input_embeddings().num_embeddings for name, model in models.items()}
    if len(set(vocabularies.values())) > 1 or int(windows.max()) >= min(vocabularies.values()):
        sizes = ", ".join(f"{name} has {size}" for name, size in vocabularies.items())
        raise RequestError(
            f"The models and the text do not share a vocabulary: {sizes}, the text needs {int(windows.max()) + 1}; "
            "compare a model with its own base and tokenizer."
        )
    batches = windows.split(_BATCH)
    routes = {name: _Routes(model) for name, model in models.items()}
    totals = {name: {"nll": 0.0, "kl": 0.0, "top1": 0.0, "same_experts": 0.0, "choices": 0.0} for name in models}
    speeds: dict[str, list[float]] = {name: [] for name in models}
    count = windows.shape[0] * (windows.shape[1] - 1)
    for number, batch in enumerate(batches):
        reference: torch.Tensor | None = None
        expected: Chosen = {}
        for name, model in models.items():
            device = next(model.parameters()).device
            began = time.perf_counter()
            with routes[name].listening() as chosen:
                logits = _run(model, batch.to(device), name)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            total = totals[name]
            if number > 0 or len(batches) == 1:
                speeds[name].append(batch.numel() / (time.perf_counter() - began))
            compared = _compare(logits[:, :-1], batch[:, 1:].to(device), reference)
            for key, value in compared.items():
                total[key] += value
            if reference is None:
                reference, expected = logits[:, :-1], chosen
            for layer in expected.keys() & chosen.keys():
                same = _same_experts(expected[layer], chosen[layer])
                total["same_experts"] += int(same.sum())
                total["choices"] += same.numel()
        if on_batch is not None:
            on_batch(number + 1, len(batches))
    for name, total in totals.items():
        if not all(map(math.isfinite, total.values())):
            raise GlobeError(f"{called(name)} gives NaN or infinite logits on this text; restore its files.")
    return {
        name: Quality(
            perplexity=math.exp(min(total["nll"] / count, 700.0)),
            kl=total["kl"] / count,
            top1=total["top1"] / count,
            tokens_per_s=median(speeds[name]),
            timed_batches=len(speeds[name]),
            router_agreement=total["same_experts"] / total["choices"] if total["choices"] else None,
        )
        for name, total in totals.items()
    }


class _Routes:
    """Hears to which experts a model routes its tokens, dense or compressed."""

    def __init__(self, model: nn.Module):
        self._experts: dict[int, nn.Module] = {module.layer: module for module in globe_modules(model).values()}
        with suppress(RequestError):  # a model whose experts are all compressed, or that has none
            self._experts = {layer: dense.module for layer, dense in routed_experts(model).items()} | self._experts

    @contextmanager
    def listening(self) -> Iterator[Chosen]:
        """Yield {layer id: ids (T, K)} of the experts that the calls inside choose."""
        chosen: Chosen = {}

        def hear(layer: int, _: nn.Module, inputs: tuple) -> None:
            chosen[layer] = inputs[1]

        hooks = [module.register_forward_pre_hook(partial(hear, layer)) for layer, module in self._experts.items()]
        try:
            yield chosen
        finally:
            for hook in hooks:
                hook.remove()


def _same_experts(expected: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """Mark the choices of `found` (T, K) that `expected` (T, K) has for the same token."""
    return (found[:, :, None] == expected.to(found.device)[:, None, :]).any(-1)


def _run(model: Any, tokens: torch.Tensor, name: str) -> torch.Tensor:
    with running(called(name)):
        return model(tokens).logits


def called(name: str) -> str:
    """Return how a sentence calls a model, of several by its name."""
    return "The model" if name == "model" else f"The {name} model"


def record_evaluation(checkpoint: GlobeCheckpoint, evaluation: dict) -> None:
    """Keep the figures of `globe eval` beside the checkpoint, for its report and its model card."""
    with replacing_file(checkpoint.path / EVALUATION_NAME) as path:
        kept = evaluation | {"fingerprint": checkpoint.fingerprint}
        path.write_text(to_json(kept, indent=2) + "\n", encoding="utf-8")


def read_evaluation(checkpoint: GlobeCheckpoint) -> dict | None:
    """Return the figures of the last `globe eval` of this checkpoint; None without one, or of a fit before it."""
    path = checkpoint.path / EVALUATION_NAME
    if not path.is_file():
        return None
    try:
        kept = read_json(inner_file(checkpoint.path, EVALUATION_NAME), "run globe eval again", finite=True)
        kept = checked(_Evaluation, kept, str(path), "run globe eval again")
    except GlobeError:  # an export and a report are worth more than these figures
        return None
    return kept if kept.get("fingerprint") == checkpoint.fingerprint else None


class _Dense(TypedDict):
    perplexity: Annotated[float, Above(0)]
    tokens_per_s: Annotated[float, Above(0)]


class _Globe(_Dense):
    kl: float
    top1: float
    timed_batches: NotRequired[int]
    router_agreement: NotRequired[float | None]


class _Evaluation(TypedDict):
    """The figures that the report and the model card show."""

    text: str
    tokens: int
    command: str
    device: str
    threads: int
    dense: _Dense
    globe: _Globe


def _compare(logits: torch.Tensor, target: torch.Tensor, reference: torch.Tensor | None) -> dict[str, float]:
    """Return sums over all positions of logits (B, T, vocabulary); without a reference, against the model itself."""
    sums = {"nll": 0.0, "kl": 0.0, "top1": 0.0}
    # window by window, because the logits of a batch in fp32 are large
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
    """Return the tokens/s of `model` over a window (T,), a step per token; the first quarter is not timed."""
    device = next(model.parameters()).device
    cache, began, untimed = None, 0.0, len(window) // 4
    model = predictor(model)
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
    """Return the greedy continuation of `prompt`."""
    tokenizer = load_tokenizer(model_dir)
    inputs = tokenizer(prompt, return_tensors="pt").to(next(model.parameters()).device)
    inputs.pop("token_type_ids", None)
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
