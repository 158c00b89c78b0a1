"""Choose the launch configuration of a call, among the configurations that its card can run.

Nothing is tuned while a user waits. `benchmarks/tune.py` measures on a card and writes `tables/<device>.json`; `tuned`
gives a call the entry nearest to its shape and rows, and without one the default of its op. `supports` decides what a
card can run: one predicate for the tuner, the launcher and the tests.

The configurations of the grouped GEMMs of experts are here, the configurations of another op in its file: a frozen
dataclass of sizes (the shape), a frozen dataclass of launches (a Launches), and defaults by rows.
"""

import json
import math
import re
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self, TypeVar

import torch

from globe_kernels.ops.triton_import import triton

TABLES = Path(__file__).parent / "tables"


@dataclass(frozen=True)
class Target:
    """The resources of one program on a card."""

    shared_bytes: int
    accumulators: int = 64  # fp32 per thread, so that nothing spills: mma.sync holds its inputs in registers as well


# By architecture. wgmma and tcgen05 read their inputs from shared memory and leave registers to accumulators.
TARGETS = {
    "sm_80": Target(163 * 1024),
    "sm_86": Target(99 * 1024),
    "sm_87": Target(163 * 1024),
    "sm_89": Target(99 * 1024),
    "sm_90": Target(227 * 1024, accumulators=128),
    "sm_100": Target(227 * 1024, accumulators=128),
    "sm_120": Target(99 * 1024),
    "gfx942": Target(64 * 1024),
}
SMALLEST_TARGET = Target(64 * 1024)  # a card that is not listed
# A tuned entry says nothing about a call whose sizes differ by more than this factor.
_NEAR = 2.0
# Calls whose choice is remembered: a server meets many numbers of tokens.
REMEMBERED = 4096


class Launches(Protocol):
    """The configuration of an op, a frozen dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def needs(self, item_size: int) -> Iterator[tuple[float, int]]:
        """Yield (fp32 accumulators per thread, bytes of shared memory) of each launch, at `item_size` bytes a value."""
        ...

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Read the "config" of an entry, which `asdict` wrote."""
        ...


AnyLaunches = TypeVar("AnyLaunches", bound=Launches)


@dataclass(frozen=True)
class GemmConfig:
    """One launch of a GEMM. The rows of its tile are those of the RoutingPlan, which all stages share."""

    block_n: int
    block_k: int
    group_m: int
    num_warps: int
    num_stages: int

    def launch(self) -> dict[str, int]:
        """Return the keyword arguments of a launch, without BLOCK_M."""
        return {
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "GROUP_M": self.group_m,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }

    def accumulators(self, block_m: int, count: int) -> float:
        """Return the fp32 values per thread of `count` tiles."""
        return count * block_m * self.block_n / (32 * self.num_warps)

    def shared_bytes(self, block_m: int, item_size: int) -> int:
        """Return the shared memory of the software pipeline: a tile of rows and a tile of weights per stage."""
        return self.num_stages * (block_m + self.block_n) * self.block_k * item_size


@dataclass(frozen=True)
class FfnConfig:
    """The launches of one layer: BLOCK_M of the plan, and one grouped GEMM per stage."""

    block_m: int
    low_rank_in: GemmConfig
    gate_up: GemmConfig
    down: GemmConfig

    def stages(self) -> Iterator[tuple[str, GemmConfig, int]]:
        """Yield (name, launch, accumulators of its tile) of each stage."""
        yield "low_rank_in", self.low_rank_in, 1
        yield "gate_up", self.gate_up, 2
        yield "down", self.down, 1

    def needs(self, item_size: int) -> Iterator[tuple[float, int]]:
        for _, gemm, count in self.stages():
            yield gemm.accumulators(self.block_m, count), gemm.shared_bytes(self.block_m, item_size)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        return cls(data["block_m"], *(GemmConfig(**data[name]) for name in ("low_rank_in", "gate_up", "down")))


@dataclass(frozen=True)
class FfnShape:
    """The sizes of one layer that its best configuration depends on."""

    experts: int  # E
    hidden: int  # D
    intermediate: int  # P
    rank: int  # R


def _default(block_m: int, block_n: int, block_k: int, group_m: int, num_warps: int) -> FfnConfig:
    """Give gate_up half of the columns: its two accumulators then take as many registers as a single accumulator."""
    gemm = GemmConfig(block_n, block_k, group_m, num_warps, num_stages=4)
    return FfnConfig(block_m, gemm, replace(gemm, block_n=min(block_n, max(64, block_n // 2))), gemm)


# By rows per expert, fewest first: (up to this many rows, configuration). Few rows are bound by reading weights: narrow
# row tiles, several loads in flight, and with one row per expert or less, where few experts are active, narrow column
# tiles, so that every multiprocessor has one. Many rows are bound by arithmetic: from 64 a tile is one wgmma on sm_90.
DEFAULTS = (
    (1, _default(block_m=16, block_n=32, block_k=128, group_m=1, num_warps=4)),
    (16, _default(block_m=16, block_n=64, block_k=128, group_m=1, num_warps=4)),
    (32, _default(block_m=32, block_n=64, block_k=128, group_m=1, num_warps=4)),
    (64, _default(block_m=64, block_n=128, block_k=64, group_m=4, num_warps=4)),
    (None, _default(block_m=128, block_n=256, block_k=64, group_m=8, num_warps=8)),
)


def supports(config: Launches, item_size: int, target: Target) -> bool:
    """Whether `target` can run `config` on values of `item_size` bytes, without spilling registers."""
    return all(
        accumulators <= target.accumulators and shared_bytes <= target.shared_bytes
        for accumulators, shared_bytes in config.needs(item_size)
    )


def fit_gemm(gemm: GemmConfig, block_m: int, item_size: int, target: Target, count: int = 1) -> GemmConfig:
    """Cut `gemm` until `target` can run it: first its columns, to the registers, then its stages, then its depth.

    Its tile of `block_m` rows has `count` accumulators.
    """
    while gemm.accumulators(block_m, count) > target.accumulators:
        gemm = replace(gemm, block_n=gemm.block_n // 2)
    while gemm.shared_bytes(block_m, item_size) > target.shared_bytes:
        if gemm.num_stages > 2:
            gemm = replace(gemm, num_stages=gemm.num_stages - 1)
        else:
            gemm = replace(gemm, block_k=gemm.block_k // 2)
    return gemm


def fit_to(config: FfnConfig, item_size: int, target: Target) -> FfnConfig:
    """Cut every stage of `config` by `fit_gemm`."""
    stages = (fit_gemm(gemm, config.block_m, item_size, target, count) for _, gemm, count in config.stages())
    return FfnConfig(config.block_m, *stages)


def rows_per_expert(num_rows: int, num_experts: int) -> int:
    """Return the mean number of rows per expert, rounded up."""
    return -(-num_rows // num_experts)


def by_rows(defaults: tuple[tuple[int | None, AnyLaunches], ...], rows: int) -> AnyLaunches:
    """Return the configuration for `rows`, from (up to this many rows, configuration) pairs, fewest rows first."""
    return next(config for limit, config in defaults if limit is None or rows <= limit)


def default_config(rows: int, item_size: int, target: Target) -> FfnConfig:
    """Return a configuration for `rows` rows per expert that no card was measured for, cut to fit `target`."""
    return fit_to(by_rows(DEFAULTS, rows), item_size, target)


def compiler_name(device: torch.device) -> str:
    """Return the name of a GPU for its compiler: "sm_90", "gfx942"."""
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


@lru_cache
def target_of(device: torch.device) -> Target:
    return TARGETS.get(compiler_name(device), SMALLEST_TARGET) if device.type == "cuda" else SMALLEST_TARGET


@lru_cache(REMEMBERED)
def choose(shape: FfnShape, num_rows: int, item_size: int, device: torch.device, op: str = "moe_ffn") -> FfnConfig:
    """Return the configuration for `num_rows` routed rows of a layer on `device`."""
    odd = {name: size for name, size in asdict(shape).items() if name != "experts" and size % 16}
    if odd and device.type == "cuda":
        sentence = f"{odd}: not multiples of 16, so the kernels load weights one value at a time, which is slow."
        _warn_once(sentence, sentence)
    rows = rows_per_expert(num_rows, shape.experts)
    return tuned(default_config(rows, item_size, target_of(device)), op, shape, rows, item_size, device)


def tuned(default: AnyLaunches, op: str, shape: Any, rows: int, item_size: int, device: torch.device) -> AnyLaunches:
    """Return the entry of the table of `device` for a call of `op`, else `default`. Reads a file: cache the result.

    `shape` is a dataclass of the sizes that matter; `rows` are rows per expert, tokens, or 1 where a shape says all.
    The first call on a card that is not as tuned warns.
    """
    if device.type != "cuda":
        return default
    name, sizes, read = torch.cuda.get_device_name(device), asdict(shape), type(default).from_dict
    entry = nearest(
        [
            entry
            for entry in load_table(name)
            if entry["op"] == op
            and entry["item_size"] == item_size
            and supports(read(entry["config"]), item_size, target_of(device))
        ],
        sizes,
        rows,
    )
    if entry is None:
        _warn_once(name, _untuned(name, op, sizes, "configurations that suit any card are used"))
        return default
    if any(_factors(entry, sizes)) or _minor(entry["triton"]) != _minor(triton.__version__):
        used = f"configurations with {format_sizes(entry['shape'])} and Triton {entry['triton']} are used"
        _warn_once(name, _untuned(name, op, sizes, used))
    return read(entry["config"])


def slug(name: str) -> str:
    """Write a name of a device or a model as part of a file path."""
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower()


@lru_cache
def load_table(device_name: str) -> list[dict[str, Any]]:
    """Read the tuned entries of a card; none for a card without a table.

    One entry: {"op": str, "shape": the sizes of that op's shape, "rows": int, "item_size": int, "triton": version,
    "median_us": float, "default_us": float, "config": that op's Launches}. `rows` as in `tuned`.
    """
    path = TABLES / f"{slug(device_name)}.json"
    return json.loads(path.read_text(encoding="utf-8"))["entries"] if path.is_file() else []


def nearest(entries: list[dict[str, Any]], sizes: dict[str, int], rows: int) -> dict[str, Any] | None:
    """Return the entry of the nearest shape, then of the nearest rows, then of this version of Triton.

    None when none lies within a factor of two in every size.
    """

    def distance(entry: dict[str, Any]) -> tuple[float, float, bool]:
        return sum(_factors(entry, sizes)), _factor(entry["rows"], max(1, rows)), entry["triton"] != triton.__version__

    usable = [entry for entry in entries if max(_factors(entry, sizes)) <= math.log2(_NEAR)]
    return min(usable, key=distance, default=None)


def _factors(entry: dict[str, Any], sizes: dict[str, int]) -> list[float]:
    """Return |log2| of the ratio of each size."""
    return [_factor(entry["shape"][name], size) for name, size in sizes.items()]


def _factor(size: int, other: int) -> float:
    return abs(math.log2(size / other))


def _minor(version: str) -> list[str]:
    return version.split(".")[:2]


def _untuned(device_name: str, op: str, sizes: dict[str, int], used: str) -> str:
    return (
        f"GloBE has no configurations of {op} with {format_sizes(sizes)} tuned on {device_name} with Triton "
        f"{triton.__version__}; {used}. Results are the same, speed may not be; benchmarks/tune.py measures and writes "
        "them. Other calls on this card may lack a tuned configuration as well; this warning comes once per process."
    )


def format_sizes(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name}={size}" for name, size in sizes.items())


def _warn_once(about: str, sentence: str) -> None:
    if about not in _WARNED:
        _WARNED.add(about)
        warnings.warn(sentence, stacklevel=4)


_WARNED: set[str] = set()  # subjects of earlier warnings
