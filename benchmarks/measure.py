"""Timing of functions side by side, and the ceilings of the machine they run on."""

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

_FLUSH_BYTES = 256 * 2**20  # several times the L2 cache of any card


@dataclass(frozen=True)
class Timing:
    """Microseconds of one function."""

    median_us: float
    p20_us: float
    p80_us: float


def time_side_by_side(
    functions: Mapping[str, Callable[[], object]],
    device: str,
    repeats: int,
    warmup: int = 3,
    clock: Callable[[], float] = time.perf_counter,
    warm: Sequence[torch.Tensor] = (),
) -> dict[str, Timing]:
    """Time every function `repeats` times; the functions take turns in another order each time.

    So a drift of the machine, and what the function before leaves in caches and on the heap, meet all of them.
    On a GPU the L2 cache is overwritten before each call, at last by `warm`, which a call then finds there as far as it
    has room, and time is that of device events; on a CPU it is that of `clock`.
    """
    samples: dict[str, list[float]] = {name: [] for name in functions}
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device) if device == "cuda" else None
    order = random.Random(0)
    for number in range(warmup + repeats):
        for name in order.sample(list(functions), len(functions)):
            took = _time_once(functions[name], flush, clock, warm)
            if number >= warmup:
                samples[name].append(took)
    return {name: summarise(values) for name, values in samples.items()}


def _time_once(
    function: Callable[[], object],
    flush: torch.Tensor | None,
    clock: Callable[[], float],
    warm: Sequence[torch.Tensor],
) -> float:
    if flush is None:
        began = clock()
        function()
        return 1e6 * (clock() - began)
    flush.zero_()
    for tensor in warm:
        tensor.mul_(1)
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    stop.record()
    stop.synchronize()
    return 1e3 * start.elapsed_time(stop)


def captured(function: Callable[[], object]) -> Callable[[], object] | None:
    """Return the replay of `function` as a CUDA graph, as a decoding engine runs it; None where there is none."""
    try:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(2):  # compiles and allocates before capture
                function()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
    except RuntimeError:  # it waits for the device
        torch.cuda.synchronize()
        return None
    return graph.replay


def summarise(values: list[float]) -> Timing:
    """Return median and quantiles of the microseconds of all calls."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return Timing(statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)])


@dataclass(frozen=True)
class Ceilings:
    """The best rates of the machine, measured in the same run."""

    copy_gb_per_s: float
    matmul_tflop_per_s: float


def measure_ceilings(device: str, dtype: torch.dtype, clock: Callable[[], float] = time.perf_counter) -> Ceilings:
    """Time a large copy (bytes read and written) and a large square matrix product as `time_side_by_side` does."""
    on_gpu = device == "cuda"
    count = 2**29 if on_gpu else 2**25
    source = torch.randn(count // 4, device=device).view(torch.uint8)
    target = torch.empty_like(source)
    side = 8192 if on_gpu else 1024
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    calls = {"copy": lambda: target.copy_(source), "matmul": lambda: a @ b}
    times = time_side_by_side(calls, device, repeats=10, clock=clock)
    return Ceilings(
        2 * source.numel() / times["copy"].p20_us / 1e3,
        2 * side**3 / times["matmul"].p20_us / 1e6,
    )


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"
