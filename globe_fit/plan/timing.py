"""Predict the seconds of a fit: every pass that its solver counts, timed on a block of experts.

The memory is that of the block, and of the atoms that its experts use: the variable projection runs on a model of this
block alone. Where that is too much, the block is smaller. The alternating solver counts its passes by the whole bank,
so it holds the whole bank.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace

import torch

from globe_fit.calibration.offload import available_bytes
from globe_fit.config import FitConfig, resolve_device
from globe_fit.data.source import ExpertSource
from globe_fit.data.stream import Block, ErrorMetric, FamilyWeights, Statistics, block_experts
from globe_fit.plan.fitting import FitPlan, estimate, step_bytes
from globe_fit.run.distributed import ALONE, Ranks
from globe_fit.solvers.base import BankState
from globe_fit.solvers.registry import make_solver
from globe_fit.solvers.start import initial_codes
from globe_kernels.format.checkpoint import GlobeConfig
from globe_kernels.format.names import FAMILIES

_OTHER_PASSES = 4  # statistics, start, refit, baselines: each about as long as the first pass of a solver
_TRIALS = 2  # of a pass that is timed: the first trial also warms up
_SHARE = 0.5  # of the memory that is free


@dataclass(frozen=True)
class Timing:
    """The seconds of a fit as a block tells them."""

    seconds: float  # of both families
    step_seconds: float  # of a step of a family, on the average of its steps
    experts: int  # of the block that was timed


def times(plan: FitPlan) -> dict:
    """Time a block for `plan`; all ranks call this together. JSON types only, None where no expert has room."""
    timing = time_fit(plan.source, plan.sizes, plan.config, plan.ranks, calibrated=plan.calibrated)
    return {"seconds": None, "step_seconds": None, "experts": None} if timing is None else asdict(timing)


def time_fit(
    source: ExpertSource, sizes: GlobeConfig, config: FitConfig, ranks: Ranks = ALONE, *, calibrated: bool = False
) -> Timing | None:
    """Time a block; None where half of the free memory does not hold one expert and its atoms.

    All ranks call this together. Where the fit keeps the experts on the device, the time to read them from disk does
    not count.
    """
    device = resolve_device(config.device)
    stored = source.stored_bytes(FAMILIES[0]) if device != "cpu" else 0
    needs = estimate(sizes, ranks.world, device=device, stored_bytes=stored, solver=config.solver)
    kept = [] if needs.kept_bytes else None
    free = available_bytes(device) / (ranks.world if device == "cpu" else 1)
    room = min(of_rank for (of_rank,) in ranks.every(_SHARE * free))
    chosen = _choose(sizes, config, ranks.world, calibrated, device, room)
    if chosen is None:
        return None
    experts, small = chosen
    weights = _OneBlock(source, FAMILIES[0], device, Statistics(0.0, 1.0, {}), ranks=ranks, kept=kept, experts=experts)
    if calibrated:
        weights = replace(weights, metric=_metric(source, experts, device))
    bank = torch.randn(*small.bank_shape()[:2], weights.columns.stop - weights.columns.start, device=device)
    codes = initial_codes(small, torch.Generator().manual_seed(config.seed)).to(device)
    solver = make_solver(weights, BankState(bank, codes, small.phi), small, config)
    seconds = first = 0.0
    for kind in solver.passes():
        if kind.count:
            of_pass = min(_seconds_per_pass(weights, kind.visit) for _ in range(_TRIALS))
            first = first or of_pass
            seconds += kind.count * of_pass
    whole = len(FAMILIES) * (seconds + _OTHER_PASSES * first)
    return Timing(whole, seconds / max(config.steps, 1), experts)


@dataclass(frozen=True)
class _OneBlock(FamilyWeights):
    """The first experts of a family; they are all that a pass reads."""

    experts: int = 1

    def _blocks(self, read: Callable[..., torch.Tensor], span: slice | None) -> Iterator[Block]:
        layer, experts = self.source.layers[0], range(self.experts)
        yield Block(layer, experts, slice(0, self.experts), read(layer, self.family, experts, self.columns))


def _choose(
    sizes: GlobeConfig, config: FitConfig, ranks: int, calibrated: bool, device: str, room: float
) -> tuple[int, GlobeConfig] | None:
    """Return how many experts of a block are timed within `room` bytes, and the sizes of their model; None for none."""
    base = sizes.base
    experts = block_experts(next(iter(base.num_experts.values())), base.intermediate_size, base.hidden_size)
    root = 4 * base.hidden_size**2 if calibrated else 0
    while experts:
        small = _of_block(sizes, config, experts) if config.solver == "varpro" else sizes
        on_gpu, solver = torch.device(device).type == "cuda", config.solver
        parts = step_bytes(small, experts, ranks, calibrated=calibrated, on_gpu=on_gpu, solver=solver)
        if sum(parts) + root <= room:
            return experts, small
        experts //= 2
    return None


def _of_block(sizes: GlobeConfig, config: FitConfig, experts: int) -> GlobeConfig:
    """Return the sizes of a model of `experts` of the first layer, and of the atoms that they are expected to use.

    An expert sees c of M atoms before its support is fixed, so E experts use M (1 - (1 - c/M)^E). With a palette they
    all see the same.
    """
    layer, of_layer = next(iter(sizes.base.num_experts.items()))
    atoms = sizes.num_atoms
    if sizes.scope == "layer":
        atoms = max(sizes.support, atoms * of_layer // sizes.base.total_experts)
    seen = min(max(config.varpro.candidates, sizes.palette or sizes.support), atoms)
    used = seen if sizes.palette is not None else math.ceil(atoms * (1 - (1 - seen / atoms) ** experts))
    return replace(
        sizes,
        base=replace(sizes.base, num_experts={layer: experts}),
        num_atoms=used,
        scope="global",
        palette=None if sizes.palette is None else min(sizes.palette, used),
    )


def _metric(source: ExpertSource, experts: int, device: str) -> ErrorMetric:
    """Return a metric of the shapes of a text: the values do not change the time."""
    base = source.base
    root = torch.eye(base.hidden_size, device=device)
    return ErrorMetric({source.layers[0].layer: root}, torch.ones(experts, base.intermediate_size, device=device))


def _seconds_per_pass(weights: FamilyWeights, visit: Callable[[Block], object]) -> float:
    """Time a pass over the only block and scale the time to all experts."""
    _wait(weights.device)
    began, experts = time.perf_counter(), 0
    for block in weights.normalised():
        visit(block)
        experts += len(block.experts)
    _wait(weights.device)
    return (time.perf_counter() - began) * weights.source.base.total_experts / experts


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)
