"""What a layer of experts costs on a machine, by each way to run it, and which way is the cheapest for how many tokens.

    time = sum over stages of max(bytes / copy, operations / matmul) + launches * launch_us

A CPU runs the references: there one thread reads, then multiplies, so bytes and operations add up, at the rate at which
products read or, where atoms are copied before they are mixed, at half of that of a copy; and instead of launches torch
calls are counted.
A weight that a stage needs is read once, rows that a stage leaves for the next are written and read once. Tokens are
routed uniformly: of E experts E (1 - (1 - K/E)^T) are active. Nothing here is measured while a model runs.

Ways ("paths") to run the gate and up matrices of one checkpoint:

    composed    every basis is resident:  bases, adapters, down
    bank_first  phi = identity only:      z = x B_palette^T, mix, adapters, down; nothing is composed
    cached      a pool of bases:          those that miss are composed, then as composed
    scratch     one layer's bases:        the whole layer is composed, then as composed
    dense       what they stand beside:   gate and up in one stage, down

Symbols: T tokens, K choices, S = T K rows, E experts, P intermediate size, D hidden size, R rank, C support, U palette.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from globe_kernels.errors import RequestError

if TYPE_CHECKING:
    import torch

PATHS = ("composed", "bank_first", "cached", "scratch")
DENSE = "dense"
MACHINES = Path(__file__).parent / "machines.json"
_UNKNOWN_CARD = "a100"  # of those listed the card with the least arithmetic per byte
_LARGEST_CALL = 2**17  # tokens: from here on nothing changes


@dataclass(frozen=True)
class References:
    """How the references of torch run: how fast products of few rows read, and microseconds of torch calls.

    The calls are those of sizes of nothing; dense are transformers' grouped products.
    """

    read_gb_per_s: float
    call: float  # of a layer with bases
    expert: float  # in all of its stages
    bank_first_call: float
    bank_first_expert: float
    atom: float  # the product with one
    dense_call: float
    dense_expert: float
    lookup: float  # a pass through the cache
    miss: float  # an expert that is composed into the cache
    layer: float  # composing one


@dataclass(frozen=True)
class Machine:
    """The constants of the model, and where they come from."""

    name: str
    device: str  # as it stands in the name that torch gives the device
    copy_gb_per_s: float  # bytes read and bytes written
    matmul_tflop_per_s: float
    launch_us: float
    memory_gb: float
    item_size: int  # bytes of a value of the dtype that the constants are of
    origin: str
    references: References | None = None  # None where kernels run, one launch for all experts of a stage


@lru_cache
def machines() -> dict[str, Machine]:
    """{name: Machine} of all that are known."""
    listed = json.loads(MACHINES.read_text(encoding="utf-8"))
    for constants in listed.values():
        if "references" in constants:
            constants["references"] = References(**constants["references"])
    return {name: Machine(name, **constants) for name, constants in listed.items()}


def machine_named(name: str) -> Machine:
    """Raises RequestError for a name that is not listed."""
    if name not in machines():
        raise RequestError(f"machine {name!r} is not known; expected one of {', '.join(machines())}.")
    return machines()[name]


def machine_for(device: "str | torch.device") -> Machine:
    """The machine that a device, or the name that torch gives it, belongs to; an unknown card is taken for an A100."""
    name = device if isinstance(device, str) else device.type
    if not isinstance(device, str) and device.type == "cuda":
        import torch  # the arithmetic does without

        name = torch.cuda.get_device_name(device)
    for machine in machines().values():
        if re.search(rf"(?<!\w){re.escape(machine.device)}(?!\w)", name, re.IGNORECASE):
            return machine
    return replace(machines()[_UNKNOWN_CARD], name=f"{name}, taken for {_UNKNOWN_CARD}")


@dataclass(frozen=True)
class LayerSizes:
    """The sizes of one layer that its time depends on."""

    experts: int  # E
    choices: int  # K
    hidden: int  # D
    intermediate: int  # P
    rank: int  # R
    support: int  # C
    palette: float  # U: distinct atoms per family, on average over the families
    phi: str
    item_size: int
    active: float | None = None  # experts that the tokens of a call choose, as measured; None: by uniform routing

    def active_experts(self, tokens: int) -> float:
        """Number of experts that `tokens` tokens choose."""
        if self.active is not None:
            return self.active
        return self.experts * (1 - (1 - self.choices / self.experts) ** tokens)


@dataclass(frozen=True)
class Pool:
    """The cache of composed bases that all layers share."""

    slots: int
    experts: int  # n, of all layers
    miss_rate: float | None = None  # as measured; None: that of uniform routing

    def misses(self, share_active: float) -> float:
        """Misses per active expert when a step activates `share_active` of every layer's experts.

        What was used last stays: an expert hits when it comes back before the slots are used up, which under uniform
        routing is the share of experts that have a slot. When one step over all layers needs more, none lasts.
        """
        share = self.slots / self.experts
        if self.miss_rate is not None:
            return self.miss_rate
        return 1 - min(share, 1.0) if share >= share_active else 1.0


class Stage(NamedTuple):
    """One step of a layer."""

    values: float  # read and written, of item_size bytes each
    flops: float
    calls: Mapping[str, float] = MappingProxyType({})  # of the references: how many of each
    launches: int = 1
    is_gathered: bool = False  # the references read by copying


@dataclass(frozen=True)
class Prediction:
    """Of one layer."""

    us: float
    bytes: float
    flops: float


def break_even_rank(intermediate: int, hidden: int) -> int:
    """p d / (p + d): above this rank adapter and composed basis have more values than the dense matrix."""
    return intermediate * hidden // (intermediate + hidden)


def paths_of(phi: str) -> tuple[str, ...]:
    """The paths that a checkpoint of this phi can take."""
    return tuple(path for path in PATHS if phi == "identity" or path != "bank_first")


def stages(path: str, sizes: LayerSizes, tokens: int, pool: Pool | None = None) -> list[Stage]:
    """What `path` does for `tokens` tokens, in order; `pool` is that of the path cached."""
    width, inner, rank, palette = sizes.hidden, sizes.intermediate, sizes.rank, sizes.palette
    rows, active = tokens * sizes.choices, sizes.active_experts(tokens)
    kind = f"{path}_" if path in (DENSE, "bank_first") else ""
    plan = Stage(rows, 0, {f"{kind}call": 1, f"{kind}expert": active})
    down = [
        Stage(active * width * inner + rows * (inner + width), 2 * rows * inner * width),
        Stage((rows + tokens) * width, rows * width),  # the sum over the choices of a token
    ]
    if path == DENSE:
        gate_up = 2 * active * inner * width + tokens * width + rows * inner
        return [plan, Stage(gate_up, 4 * rows * inner * width), *down]
    adapters = Stage(2 * active * inner * rank + rows * (2 * rank + inner), 4 * rows * inner * rank)
    if path == "bank_first":
        z = 2 * tokens * palette * rank  # of all atoms of the layer, whoever uses them
        read = 2 * palette * rank * width + tokens * width
        product = Stage(read + z, 2 * z * width, {"atom": 2 * palette}, launches=2)
        mix = Stage(z + 2 * rows * rank, 4 * rows * palette * rank)
        return [plan, product, mix, adapters, *down]
    bases = Stage(2 * active * rank * width + tokens * width + 2 * rows * rank, 4 * rows * rank * width)
    if path == "composed":
        return [plan, bases, adapters, *down]
    if path == "scratch":
        # a product over the palette, which takes 16-bit atoms twice (ops/compose_layer.py)
        products = 1 if sizes.item_size == 4 else 2
        mixed = 4 * products * sizes.experts * palette * rank * width
        composed = Stage(2 * (palette + sizes.experts) * rank * width, mixed, {"layer": 1}, launches=2)
        return [composed, plan, bases, adapters, *down]
    assert path == "cached" and pool is not None, path
    passes = -(-min(rows, sizes.experts) // pool.slots)
    misses = active * pool.misses(active / sizes.experts)
    composed = 2 * misses * rank * width
    calls = {"lookup": passes, "miss": misses}
    mixed = 2 * composed * sizes.support
    compose = Stage(composed * (sizes.support + 1), mixed, calls, launches=2 * passes, is_gathered=True)
    return [plan, compose, bases._replace(launches=passes), adapters, *down]


def predict(path: str, sizes: LayerSizes, tokens: int, machine: Machine, pool: Pool | None = None) -> Prediction:
    """Time, bytes moved and floating point operations of one layer for `tokens` tokens."""
    all_stages = stages(path, sizes, tokens, pool)
    moved = [stage.values * sizes.item_size for stage in all_stages]
    us = (_stage_us(stage, own, machine) for stage, own in zip(all_stages, moved, strict=True))
    return Prediction(sum(us), sum(moved), sum(stage.flops for stage in all_stages))


def _stage_us(stage: Stage, moved: float, machine: Machine) -> float:
    # GB/s are 1e3 bytes per microsecond, TFLOP/s 1e6 operations
    copying, multiplying = moved / (1e3 * machine.copy_gb_per_s), stage.flops / (1e6 * machine.matmul_tflop_per_s)
    if (references := machine.references) is None:
        return max(copying, multiplying) + stage.launches * machine.launch_us
    reading = 2 * copying if stage.is_gathered else moved / (1e3 * references.read_gb_per_s)
    return reading + multiplying + sum(count * getattr(references, name) for name, count in stage.calls.items())


@dataclass(frozen=True)
class Policy:
    """Which path a call takes: decided when a model is loaded, looked up by the number of tokens."""

    points: tuple[tuple[int | None, str], ...]  # (up to this many tokens, path), fewest first; the last has no limit

    def path(self, tokens: int) -> str:
        # a loop, which torch.compile follows with a number of tokens that it does not know
        return next(path for limit, path in self.points if limit is None or tokens <= limit)


def switch_points(
    paths: tuple[str, ...], sizes: LayerSizes, machine: Machine, pool: Pool | None = None
) -> tuple[tuple[int | None, str], ...]:
    """The cheapest of `paths` at powers of two, of equals the first, merged into the ranges of a Policy.

    Between two powers the path of the larger one.
    """
    points: list[tuple[int | None, str]] = []
    tokens = 1
    while tokens <= _LARGEST_CALL:
        best = min(paths, key=lambda path: predict(path, sizes, tokens, machine, pool).us)
        if points and points[-1][1] == best:
            points.pop()
        points.append((tokens, best))
        tokens *= 2
    return (*points[:-1], (None, points[-1][1]))
