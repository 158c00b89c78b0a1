"""Plan the run of a dense model over a text: in memory or from disk, and how many windows make a batch.

The plan reads headers alone. A model that does not fit into memory runs with all its layers on disk: accelerate reads
the weights of each module when it is called and drops them after. No layer stays in memory, because a batch of as many
windows as memory allows needs each layer once.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from re import search

import torch

from globe_fit.calibration.self_text import AT_ONCE
from globe_fit.data.model import WINDOW
from globe_fit.data.source import ExpertSource
from globe_kernels.errors import RequestError
from globe_kernels.units import format_bytes

_IN_MEMORY_WINDOWS = 8  # more would hardly be faster
_MOST_WINDOWS = 1024  # a quarter of a million tokens: more would hardly save reading


@dataclass(frozen=True)
class RunPlan:
    """The plan of a run of the dense model over a text, and the memory that it takes."""

    offload: bool
    windows: int  # per batch
    in_memory_bytes: int  # the least memory of a run without offloading
    peak_bytes: int  # an upper bound; device and host memory together
    available_bytes: float
    rewritten_bytes: int  # disk that transformers writes: experts that it fuses cannot stay in their files


def plan_run(source: ExpertSource, device: str, limit: float | None = None, *, writes: bool = False) -> RunPlan:
    """Plan a run within `limit` bytes and the available memory; a model that `writes` makes its text first.

    Raises RequestError when not even one layer fits, when a model that writes does not fit, or when offloading needs
    accelerate.
    """
    available = min(available_bytes(device), math.inf if limit is None else limit)
    sizes = {key: source.files.dense_bytes(key) for key in source.files.keys}
    whole, outside, by_layer = sum(sizes.values()), 0, {}
    for key, size in sizes.items():
        layer = search(r"layers\.(\d+)\.", key)
        if layer is not None:
            by_layer[layer[1]] = by_layer.get(layer[1], 0) + size
        elif not key.startswith("lm_head."):  # the head does not run and stays on disk
            outside += size
    largest = max(by_layer.values())
    sums = len(source.layers) * source.base.hidden_size**2 * (8 if device == "cpu" else 4)
    window = WINDOW * _token_bytes(source)
    # loading converts a layer at a time, before the sums exist
    writing = AT_ONCE * _written_bytes(source) if writes else 0
    in_memory = whole + max(largest, sums + window, writing)
    if in_memory <= available:
        windows = int(min((available - whole - sums) / window, _IN_MEMORY_WINDOWS))
        peak = whole + max(largest, sums + windows * window, writing)
        return RunPlan(False, windows, in_memory, peak, available, 0)
    if writes:
        raise RequestError(
            f"{source.base.name} would take {format_bytes(in_memory)} to write a text and {format_bytes(available)} "
            "may be used; give a text file to calibrate on, over which the model can run layer by layer."
        )
    if source.files.has_quantized:
        raise RequestError(
            f"Running {source.base.name} over a text needs {format_bytes(in_memory)} and {format_bytes(available)} may "
            "be used, and the layers of a quantised checkpoint cannot run from disk; raise the limit, free some "
            "memory, or fit without a text."
        )
    # a layer that is converted is in memory twice
    least = outside + max(2 * largest, largest + sums + window)
    if least > available:
        raise RequestError(
            f"Running {source.base.name} over a text layer by layer needs {format_bytes(least)} and "
            f"{format_bytes(available)} may be used; raise the limit, free some memory, or fit without a text."
        )
    if find_spec("accelerate") is None:
        raise RequestError(
            f"Running {source.base.name} over a text needs {format_bytes(in_memory)} and {format_bytes(available)} "
            'may be used; install accelerate (pip install "globe-moe[fit]") to read its layers from disk.'
        )
    left = available - outside - largest - sums
    windows = int(min(max(left / window, 1), _MOST_WINDOWS))
    peak = outside + max(2 * largest, largest + sums + windows * window)
    # experts that are separate tensors
    rewritten = sum(sizes[key] for key, parsed in source.expert_keys.items() if parsed.expert is not None)
    return RunPlan(True, windows, in_memory, peak, available, rewritten)


def _token_bytes(source: ExpertSource) -> int:
    """Bound the bytes that a token takes while a layer runs: every tensor counts as fp32."""
    width, inner = source.base.hidden_size, source.base.intermediate_size
    experts = source.outline.top_k * (4 * width + 4 * inner)
    # scores of every head: some implementations of attention hold them
    attention = max(heads * (6 * head + 3 * WINDOW) for heads, _, head in _heads(source))
    names = ("intermediate_size", "shared_expert_intermediate_size")
    dense = max(getattr(layer, name, None) or 0 for layer in source.outline.layer_configs for name in names)
    return 4 * (8 * width + experts + attention + 3 * dense)


def _written_bytes(source: ExpertSource) -> int:
    """Bound the bytes that a window takes while the model writes it: keys, values, and the choice of a token."""
    layers = [kept * head for _, kept, head in _heads(source)]
    cache = 2 * WINDOW * (sum(layers) + max(layers)) * 4  # one layer is copied as it grows
    return cache + 4 * 4 * source.outline.model.config.get_text_config().vocab_size + _token_bytes(source)


def _heads(source: ExpertSource) -> Iterator[tuple[int, int, int]]:
    """Yield of each layer the heads of queries, the heads of keys and values, and the width of a head."""
    for layer in source.outline.layer_configs:
        heads = layer.num_attention_heads
        split = (getattr(layer, "qk_nope_head_dim", None) or 0) + (getattr(layer, "qk_rope_head_dim", None) or 0)
        head = max(getattr(layer, "head_dim", None) or source.base.hidden_size // heads, split)
        yield heads, getattr(layer, "num_key_value_heads", None) or heads, head


def available_bytes(device: str) -> float:
    """Return the free bytes: the fewer of host and device, because weights reach a GPU through the host."""
    host = min(_meminfo(), _container())
    return host if device == "cpu" else min(host, torch.cuda.mem_get_info(device)[0])


def _meminfo() -> float:
    """Return the bytes that the kernel reports as available."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) * 1024
    except (OSError, StopIteration):  # not Linux: only --memory-limit bounds the run
        return math.inf


def _container() -> float:
    """Return the bytes that the limit of a container leaves; cached files do not count, because they give way."""
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        used = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return limit - int(used["anon"])
    except (OSError, ValueError, KeyError):  # no limit, or another kind of control group
        return math.inf
