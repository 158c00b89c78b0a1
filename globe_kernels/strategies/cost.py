"""Predict the time of one layer of experts by strategy, and choose the cheapest for each number of tokens.

    time = sum over the stages of a strategy of max(bytes / copy, operations / matmul) + launches * launch_us

A CPU runs the references. There one thread reads, then multiplies, so bytes and operations add up. Products read at a
rate of their own; atoms that are copied before they are mixed are read at half the rate of a copy. In place of launches
the model counts calls of torch.

Tokens are routed uniformly: of E experts E (1 - (1 - K/E)^T) are active, for K experts per token and T tokens. Nothing
here is measured while a model runs.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch

from globe_kernels.errors import RequestError
from globe_kernels.strategies.base import LayerSizes, Pool, Stage, Strategy

MACHINES = Path(__file__).parent / "machines.json"
_UNKNOWN_CARD = "a100"  # the listed card with the least arithmetic per byte
_LARGEST_CALL = 2**17  # tokens: from here on nothing changes


@dataclass(frozen=True)
class References:
    """Rates at which products of few rows read on a CPU, and the microseconds of its torch calls.

    Each constant is the time of a call on tiny tensors, bytes and arithmetic left out. The constants dense_* belong to
    the grouped products of transformers.
    """

    read_gb_per_s: float
    call: float  # of a layer that runs from bases
    expert: float  # of an active expert, in all stages of that layer
    bank_first_call: float
    bank_first_expert: float
    atom: float  # of the product with one atom
    dense_call: float
    dense_expert: float
    lookup: float  # of a pass through the cache
    miss: float  # of an expert that is composed into the cache
    layer: float  # of a layer that is composed whole


@dataclass(frozen=True)
class Machine:
    """The constants of the cost model on one machine, and where they come from."""

    name: str
    device: str  # part of the name that torch gives the device
    copy_gb_per_s: float  # bytes read and bytes written
    matmul_tflop_per_s: float
    launch_us: float
    memory_gb: float
    item_size: int  # bytes of a value of the dtype that the constants are of
    origin: str
    references: References | None = None  # None where kernels run: a stage is one launch, however many experts
    fp32_tflop_per_s: float | None = None  # products of a fit without tensor cores; None: as fast as matmul


@lru_cache
def machines() -> dict[str, Machine]:
    """{name: Machine} of all that are listed in machines.json."""
    listed = json.loads(MACHINES.read_text(encoding="utf-8"))
    for constants in listed.values():
        if "references" in constants:
            constants["references"] = References(**constants["references"])
    return {name: Machine(name, **constants) for name, constants in listed.items()}


def machine_named(name: str) -> Machine:
    """Return the machine of that name. Raises RequestError for a name that is not listed."""
    if name not in machines():
        raise RequestError(f"machine {name!r} is not known; expected one of {', '.join(machines())}.")
    return machines()[name]


def machine_for(device: str | torch.device) -> Machine:
    """Return the machine of a torch device, or of the name that torch gives it; an unknown card counts as an A100."""
    name = device if isinstance(device, str) else device.type
    if not isinstance(device, str) and device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    for machine in machines().values():
        if re.search(rf"(?<!\w){re.escape(machine.device)}(?!\w)", name, re.IGNORECASE):
            return machine
    return replace(machines()[_UNKNOWN_CARD], name=f"{name}, taken for {_UNKNOWN_CARD}")


@dataclass(frozen=True)
class Prediction:
    """The predicted cost of one call of one layer."""

    us: float
    bytes: float
    flops: float


def predict(
    strategy: Strategy, sizes: LayerSizes, tokens: int, machine: Machine, pool: Pool | None = None
) -> Prediction:
    """Predict microseconds, bytes moved and floating point operations of one layer for `tokens` tokens."""
    stages = strategy.stages(sizes, tokens, pool)
    moved = [stage.values * sizes.item_size for stage in stages]
    us = (_stage_us(stage, stage_bytes, machine) for stage, stage_bytes in zip(stages, moved, strict=True))
    return Prediction(sum(us), sum(moved), sum(stage.flops for stage in stages))


def _stage_us(stage: Stage, moved: float, machine: Machine) -> float:
    # GB/s are 1e3 bytes per microsecond, TFLOP/s 1e6 operations
    copying, multiplying = moved / (1e3 * machine.copy_gb_per_s), stage.flops / (1e6 * machine.matmul_tflop_per_s)
    if (references := machine.references) is None:
        return max(copying, multiplying) + stage.launches * machine.launch_us
    reading = 2 * copying if stage.is_gathered else moved / (1e3 * references.read_gb_per_s)
    return reading + multiplying + sum(count * getattr(references, name) for name, count in stage.calls.items())


@dataclass(frozen=True)
class Policy:
    """The strategy of a call by its number of tokens: decided when a model is loaded, then looked up."""

    points: tuple[tuple[int | None, str], ...]  # (up to this many tokens, strategy), fewest first; the last: no limit

    def strategy(self, tokens: int) -> str:
        """Return the name of the strategy of a call with `tokens` tokens."""
        # a loop, which torch.compile follows with a number of tokens that it does not know
        return next(name for limit, name in self.points if limit is None or tokens <= limit)


def switch_points(
    strategies: Iterable[Strategy], sizes: LayerSizes, machine: Machine, pool: Pool | None = None
) -> tuple[tuple[int | None, str], ...]:
    """Return the points of a Policy: the cheapest of `strategies` at every power of two, equal neighbours merged.

    Of equal predictions the first strategy counts. A number of tokens between two powers takes the strategy of the
    larger power.
    """
    strategies = tuple(strategies)
    points: list[tuple[int | None, str]] = []
    tokens = 1
    while tokens <= _LARGEST_CALL:
        best = min(strategies, key=lambda strategy: predict(strategy, sizes, tokens, machine, pool).us).name
        if points and points[-1][1] == best:
            points.pop()
        points.append((tokens, best))
        tokens *= 2
    return (*points[:-1], (None, points[-1][1]))
