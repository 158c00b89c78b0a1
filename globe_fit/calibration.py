"""What the inputs of the experts look like: the metric of a calibrated fit.

    C_l = sum_t x_t x_t^T / T        over the tokens t of a text, x_t the input of the experts of layer l

A calibrated fit minimises sum_i ||(W_i - What_i) C_l^(1/2)||^2, the error of what the experts compute instead of that
of their weights. C_l is divided by the mean of its diagonal, so that layers weigh as they do without it, and shrunk by
a multiple of the identity: a text of finite length says nothing of some directions. All experts of a layer share C_l,
which is never averaged over layers.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from globe_fit.evaluate import load_model, token_windows
from globe_fit.snapshots import Snapshots
from globe_fit.source import ExpertSource
from globe_kernels.errors import GlobeError
from globe_kernels.files import sha256

_NAME = "calibration"
_SHRINKAGE = 0.1
_BATCH = 8

OnBatch = Callable[[int, int], None]  # batches done, batches in all


@dataclass(frozen=True)
class Calibration:
    """The text of a calibrated fit and what it said of the inputs."""

    text: str  # name of the file, for people
    sha256: str
    tokens: int
    moments: dict[int, torch.Tensor]  # layer id -> C_l (D, D) float32, on the CPU

    def roots(self) -> dict[int, torch.Tensor]:
        """{layer id: L (D, D) lower triangular}, L L^T = C_l / mean(diag C_l) + 0.1 I."""
        return {layer: metric_root(moment) for layer, moment in self.moments.items()}

    @property
    def facts(self) -> dict:
        return {"text": self.text, "sha256": self.sha256, "tokens": self.tokens}


def calibrate(
    source: ExpertSource,
    text: str | Path,
    device: str = "cpu",
    *,
    snapshots: Snapshots | None = None,
    on_batch: OnBatch | None = None,
) -> Calibration:
    """Run the dense model of `source`, loaded onto `device`, once over a text.

    With `snapshots`, what an interrupted fit had collected is taken over. Raises RequestError for a text that is
    missing or too short, GlobeError for a model whose inputs are not finite.
    """
    saved = None if snapshots is None else snapshots.load(_NAME)
    if saved is not None:
        tensors, facts = saved
        return Calibration(**facts["calibration"], moments={int(layer): moment for layer, moment in tensors.items()})
    windows = token_windows(source.model_dir, text)
    moments = _second_moments(source, windows, device, on_batch)
    for layer, moment in moments.items():
        if not torch.isfinite(moment).all():
            raise GlobeError(
                f"The inputs of the experts of layer {layer} are not finite on {text}; calibrate on another text."
            )
    result = Calibration(Path(text).name, sha256(Path(text)), windows.numel(), moments)
    if snapshots is not None:
        tensors = {str(layer): moment for layer, moment in moments.items()}
        snapshots.save(_NAME, 0, tensors, {"calibration": result.facts})
    return result


@torch.inference_mode()
def _second_moments(
    source: ExpertSource, windows: torch.Tensor, device: str, on_batch: OnBatch | None
) -> dict[int, torch.Tensor]:
    model: Any = load_model(source.model_dir, device)
    batches = windows.split(_BATCH)
    with _accumulating(model, source) as moments:
        for number, batch in enumerate(batches):
            model.model(batch.to(device))  # without the head: its logits are not needed
            if on_batch is not None:
                on_batch(number + 1, len(batches))
    return {layer: (moment / windows.numel()).float().cpu() for layer, moment in moments.items()}


@contextmanager
def _accumulating(model: Any, source: ExpertSource) -> Iterator[dict[int, torch.Tensor]]:
    """Sums of x x^T by layer, of all that the experts of `model` are given inside."""
    width = source.base.hidden_size
    moments: dict[int, torch.Tensor] = {}
    hooks = []
    for layer, path in source.architecture.live_experts(model):
        experts = model.get_submodule(path)
        # fp32 on a GPU: fp64 is slow there, and the moments of a text err more than its sums
        dtype = torch.float64 if next(experts.parameters()).device.type == "cpu" else torch.float32
        moments[layer] = torch.zeros(width, width, dtype=dtype, device=next(experts.parameters()).device)

        def add(_: Any, inputs: tuple, total: torch.Tensor = moments[layer]) -> None:
            x = inputs[0].reshape(-1, width).to(total.dtype)
            total.addmm_(x.mT, x)

        hooks.append(experts.register_forward_pre_hook(add))
    try:
        yield moments
    finally:
        for hook in hooks:
            hook.remove()


def metric_root(moment: torch.Tensor) -> torch.Tensor:
    """(D, D) float32 lower triangular L with L L^T = C / mean(diag C) + 0.1 I."""
    moment = moment.double()
    level = moment.diagonal().mean()
    shrunk = moment / torch.where(level > 0, level, 1.0)
    shrunk.diagonal().add_(_SHRINKAGE)
    return torch.linalg.cholesky(shrunk).float()
