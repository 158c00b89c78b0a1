"""Keep the routed inputs of the experts on disk while the dense model runs over a text.

A file per layer has a row for each token: the hidden state (D) in bf16, the ids of its experts (K) int32, and their
router weights (K) float32. A row takes 2 D + 8 K bytes.
"""

import zlib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch

from globe_fit.calibration.moments import OnBatch, before_forward
from globe_fit.data.model import running, text_part
from globe_fit.data.source import ExpertSource
from globe_kernels.errors import GlobeError
from globe_kernels.format.writing import replacing_file
from globe_kernels.model.discovery import routed_experts


@dataclass(frozen=True)
class RoutedInputs:
    """The inputs of the experts of one layer, over all tokens T of a text."""

    hidden: torch.Tensor  # (T, D) bfloat16
    index: torch.Tensor  # (T, K) int64; an id that names no expert contributes nothing
    weight: torch.Tensor  # (T, K) float32

    def __getitem__(self, tokens: torch.Tensor | slice) -> "RoutedInputs":
        return RoutedInputs(self.hidden[tokens], self.index[tokens], self.weight[tokens])

    def __len__(self) -> int:
        return len(self.hidden)

    def to(self, device: str) -> "RoutedInputs":
        return RoutedInputs(self.hidden.to(device), self.index.to(device), self.weight.to(device))


@dataclass
class _Stream:
    """The rows of one layer: `hear` takes them in the model, `write` runs outside, where a disk may be full."""

    file: BinaryIO
    checksum: int = 0
    top_k: int = 0
    heard: list[bytes] = field(default_factory=list)

    def hear(self, inputs: tuple) -> None:
        hidden, index, weight = inputs
        parts = (hidden.bfloat16(), index.int(), weight.float())
        rows = torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=1)
        self.top_k = index.shape[1]
        self.heard.append(rows.cpu().numpy().tobytes())

    def write(self) -> None:
        for rows in self.heard:
            self.checksum = zlib.crc32(rows, self.checksum)
            self.file.write(rows)
        self.heard.clear()


@torch.no_grad()
def record_inputs(
    model: Any,
    source: ExpertSource,
    batches: Sequence[torch.Tensor],
    device: str,
    directory: Path,
    on_batch: OnBatch | None = None,
) -> dict[str, list[int]]:
    """Run `model` over all `batches` of windows, and write the inputs of its experts into `directory`.

    Returns {layer id: [K, checksum]} in JSON types, with which `read_inputs` reads them. Raises GlobeError for a full
    disk.
    """
    body, live = text_part(model).base_model, routed_experts(model)
    streams: dict[str, _Stream] = {}
    with ExitStack() as stack:
        for layer in source.layers:
            path = stack.enter_context(replacing_file(_path(directory, layer.layer)))
            stream = streams[str(layer.layer)] = _Stream(stack.enter_context(path.open("wb")))
            stack.callback(before_forward(live[layer.layer].module, stream.hear))
        for number, batch in enumerate(batches):
            with running("The model"):
                body(batch.to(device), use_cache=False)
            for stream in streams.values():
                stream.write()
            if on_batch is not None:
                on_batch(number + 1, len(batches))
    return {layer: [stream.top_k, stream.checksum] for layer, stream in streams.items()}


def read_inputs(source: ExpertSource, directory: Path, layer: int, facts: list[int]) -> RoutedInputs:
    """Read the inputs of a layer; `facts` of `record_inputs`. Raises GlobeError for a file that was changed since."""
    (top_k, checksum), width, path = facts, source.base.hidden_size, _path(directory, layer)
    data = bytearray(path.read_bytes()) if path.is_file() else bytearray()
    if zlib.crc32(data) != checksum:
        raise GlobeError(f"{path} is not the file that healing wrote; begin the healing again with --restart.")
    rows = torch.frombuffer(data, dtype=torch.uint8).view(-1, 2 * width + 8 * top_k)
    parts = [part.contiguous() for part in rows.split([2 * width, 4 * top_k, 4 * top_k], dim=1)]
    hidden, index, weight = (
        part.view(dtype) for part, dtype in zip(parts, (torch.bfloat16, torch.int32, torch.float32), strict=True)
    )
    return RoutedInputs(hidden, index.long(), weight)


def inputs_bytes(source: ExpertSource, tokens: int) -> int:
    """Return the bytes on disk of the inputs of all layers over a text of `tokens`."""
    return len(source.layers) * tokens * (2 * source.base.hidden_size + 8 * source.outline.top_k)


def _path(directory: Path, layer: int) -> Path:
    return directory / f"inputs.{layer}.bin"
