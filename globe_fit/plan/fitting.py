"""A fit before it runs: the requests that no fit can meet, the bytes at its peak, and its seconds by timing a block."""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

import torch

from globe_fit.calibration.offload import RunPlan, plan_run
from globe_fit.config import SELF, FitConfig, resolve_device
from globe_fit.data.source import ExpertSource
from globe_fit.data.stream import Block, FamilyWeights, Statistics, block_experts
from globe_fit.plan.footprint import footprint
from globe_fit.run.distributed import ALONE, Ranks, join
from globe_fit.run.snapshots import snapshot_bytes
from globe_fit.sizes import resolve_sizes
from globe_fit.solvers.base import BankState
from globe_fit.solvers.registry import make_solver
from globe_fit.solvers.start import initial_codes
from globe_kernels.errors import RequestError
from globe_kernels.format.checkpoint import BaseModel, GlobeConfig
from globe_kernels.format.directories import holds_fit, require_place
from globe_kernels.format.names import FAMILIES
from globe_kernels.format.writing import require_room
from globe_kernels.units import format_bytes, parse_bytes

_OTHER_PASSES = 4  # statistics, start, refit, baselines: each about as long as the first pass of a solver
_TRIALS = 2  # of a pass that is timed: the first trial also warms up
# Tensors that are alive at once. Of the size of the bank: bank, gradient, the addition to the gradient, two of Adam,
# best state. Of the size of the codes: the same. Of the size of a block of weights: two blocks, the product of
# adapters and bases, the residual, its square, its gradient. Of the size of the bases of a block: mixture, gradient,
# product with the weights.
_BANKS, _CODES, _BLOCKS, _BASES = 6, 6, 6, 3
_BANKS_OF_KERNELS = 5  # the kernels add to the gradient in place
# A calibrated fit holds C and L of every layer in fp32, and a block and its bases in the metric too.
_MATRICES, _BLOCKS_IN_METRIC, _BASES_IN_METRIC = 2, 1, 2
# Tensors of a snapshot: of the size of the bank, of the codes in fp32, of the codes as booleans. VarPro: the state, two
# of Adam, the best state; allowed atoms. Alternating: the state, the best state; allowed atoms, support. Entmax adds
# the scores and two of Adam.
_SAVED = {"varpro": (4, 4, 1), "alternating": (2, 2, 2)}
_SAVED_OF_ENTMAX = 3  # of the size of the codes
_RECORD_BYTES, TEXT_BYTES = 400, 200_000  # of a step in the metric stream; of reports, histories and headers
_TEXT_SHARE = 0.01  # of the tensors: the text of a report grows with the layers and the rows of an expert
# The experts of a family stay on a GPU where they and the fit take less than this share of its memory. The rest is for
# the context, the workspaces of libraries and the fragments that the allocator cannot join.
_GPU_SHARE = 0.9


@dataclass(frozen=True)
class Estimate:
    """Bytes of the fit of both families, one after the other; of several ranks, the bytes of the first, the largest."""

    solver_bytes: int  # on the device of the fit
    block_bytes: int  # on the device of the fit
    factor_bytes: int  # in host memory
    ranks: int = 1
    calibration_bytes: int = 0  # of a calibrated fit, on its device
    run_bytes: int = 0  # of the run of the dense model before a calibrated fit
    kept_bytes: int = 0  # on a GPU: the experts of a family as they are stored, where there is room

    @property
    def peak_bytes(self) -> int:
        """On the device and in host memory together: on a CPU, the growth of the process."""
        return max(self.device_bytes + self.factor_bytes, self.run_bytes)

    @property
    def least_bytes(self) -> int:
        """The peak where no experts are kept on the device."""
        return max(self.device_bytes - self.kept_bytes + self.factor_bytes, self.run_bytes)

    @property
    def device_bytes(self) -> int:
        """On the device of the fit."""
        return self.solver_bytes + self.block_bytes + self.calibration_bytes + self.kept_bytes


@dataclass(frozen=True)
class FitPlan:
    """A fit that was checked and not begun: its model, settings with the device resolved, sizes, ranks and bytes."""

    source: ExpertSource
    config: FitConfig
    sizes: GlobeConfig
    ranks: Ranks
    memory_limit: int | None  # bytes
    needs: Estimate
    disk_bytes: int  # in the directory of the fit, at its peak, beside an older fit

    def require_room(self, out: str | Path, beside: int = 0) -> None:
        """Require room for the fit in `out`, where snapshots of it may be, and for `beside` more bytes.

        Raises GlobeError for a full disk.
        """
        require_room(Path(out), self.disk_bytes + beside - snapshot_bytes(out))

    def figures(self) -> dict:
        """Predict the sizes, bytes and seconds of the fit; all ranks call this together. JSON types only."""
        return {
            "rank": self.sizes.rank,
            "atoms": self.sizes.num_atoms,
            "bytes": {"dense_experts": self.sizes.base.dense_bytes, "globe_on_disk": self.sizes.tensor_bytes},
            **asdict(self.needs),
            "disk_bytes": self.disk_bytes,
            "sizes": footprint(self.sizes, self.source.facts, device=self.config.device),
            "peak_bytes": self.needs.peak_bytes,
            "seconds": estimate_seconds(self.source, self.sizes, self.config, self.ranks),
        }


def plan_fit(
    model_dir: str | Path,
    out: str | Path,
    config: FitConfig,
    *,
    calibrate: str | Path | None = None,
    memory_limit: float | str | None = None,
) -> FitPlan:
    """Check a fit by the headers of its model alone, and join the ranks of torchrun; arguments as of `compress`.

    Raises RequestError for sizes out of range, a combination that no fit supports, too little memory and an `out` with
    other files, GlobeError for damaged files.
    """
    source, config = ExpertSource(model_dir), replace(config, device=resolve_device(config.device))
    sizes, ranks = resolve_sizes(source.base, config), join(config.device)
    require_supported(source.base, config, calibrate is not None, ranks)
    require_place(out, holds_fit, "fit")
    limit = None if memory_limit is None else parse_bytes(memory_limit)
    run = None if calibrate is None else plan_run(source, config.device, limit, writes=calibrate == SELF)
    needs = estimate(
        sizes,
        ranks.world,
        calibrated=run is not None,
        run_bytes=0 if run is None else run.peak_bytes,
        device=config.device,
        stored_bytes=source.stored_bytes(FAMILIES[0]),
    )
    if limit is not None and needs.least_bytes > limit:
        raise RequestError(
            f"The fit needs {format_bytes(needs.least_bytes)} at its peak{per_rank(ranks.world)} and the memory limit "
            f"is {format_bytes(limit)}; give a smaller ratio, fewer atoms or a smaller rank."
        )
    disk = disk_bytes(sizes, config, ranks.world, run)
    return FitPlan(source, config, sizes, ranks, limit, needs, disk)


def per_rank(ranks: int) -> str:
    return "" if ranks == 1 else f" on each of {ranks} ranks"


def require_supported(base: BaseModel, config: FitConfig, calibrated: bool, ranks: Ranks) -> None:
    """Raise RequestError for a combination of solver, calibration and ranks that no fit supports."""
    if calibrated and config.solver != "varpro":
        raise RequestError(
            f"solver is {config.solver} and a text to calibrate on is given; only varpro fits to a text, so give "
            "solver varpro or no text."
        )
    if ranks.world == 1:
        return
    if config.solver != "varpro" or calibrated:
        kind = "A calibrated fit" if calibrated else f"The solver {config.solver}"
        raise RequestError(f"{kind} runs on one rank and torchrun started {ranks.world}; run it without torchrun.")
    if base.hidden_size < ranks.world:
        raise RequestError(
            f"The experts have {base.hidden_size} columns to split and torchrun started {ranks.world} ranks; start at "
            "most one rank per column."
        )


def estimate(
    sizes: GlobeConfig,
    ranks: int = 1,
    *,
    calibrated: bool = False,
    run_bytes: int = 0,
    device: str = "cpu",
    stored_bytes: int = 0,
) -> Estimate:
    """Predict the bytes of a fit by its sizes alone: nothing is read and nothing is allocated.

    `run_bytes` are the bytes that the run of the dense model takes before a calibrated fit, `stored_bytes` the bytes of
    the experts of one family on disk.
    """
    base, on_gpu = sizes.base, torch.device(device).type == "cuda"
    columns = -(-base.hidden_size // ranks)  # of the rank that has most
    bank = sizes.num_atoms * sizes.rank * base.hidden_size * 4
    codes = base.total_experts * sizes.num_atoms * 4
    experts = block_experts(max(base.num_experts.values()), base.intermediate_size, base.hidden_size)
    weights = experts * base.intermediate_size * columns * 4
    bases = experts * sizes.rank * columns * 4
    adapters = base.total_experts * base.intermediate_size * sizes.rank * sizes.torch_dtype.itemsize
    calibration = _MATRICES * len(base.num_experts) * base.hidden_size**2 * 4
    in_metric = _BLOCKS_IN_METRIC * weights + _BASES_IN_METRIC * bases
    banks = _BANKS_OF_KERNELS if on_gpu else _BANKS
    needs = Estimate(
        solver_bytes=banks * bank * columns // base.hidden_size + _CODES * codes,
        block_bytes=_BLOCKS * weights + _BASES * bases + (in_metric if calibrated else 0),
        factor_bytes=bank // 4 * sizes.torch_dtype.itemsize + adapters,
        ranks=ranks,
        calibration_bytes=calibration if calibrated else 0,
        run_bytes=run_bytes,
    )
    kept = replace(needs, kept_bytes=stored_bytes * columns // base.hidden_size)
    return kept if on_gpu and kept.device_bytes <= _GPU_SHARE * _memory_of(device) else needs


def disk_bytes(sizes: GlobeConfig, config: FitConfig, ranks: int = 1, run: RunPlan | None = None) -> int:
    """Predict the bytes on disk at the peak of a fit, of all ranks together; `run` is of a calibrated fit.

    F is the snapshot of a finished family, S of a step. A snapshot is written beside the snapshot before, the
    checkpoint beside all snapshots:

        max(F + 2 S, 2 F + S, 4 F) + sums of a calibration, 1 % more, + text
    """
    base = sizes.base
    banks, codes, flags = _SAVED[config.solver]
    if config.solver == "alternating" and config.alternating.coding.method == "entmax":
        codes += _SAVED_OF_ENTMAX
    bank = sizes.num_atoms * sizes.rank * base.hidden_size * 4
    step = banks * bank + ranks * (4 * codes + flags) * base.total_experts * sizes.num_atoms
    of_ranks = (ranks - 1) * base.total_experts * sizes.support * 8  # every rank keeps the codes of a finished family
    family = sizes.tensor_bytes // len(FAMILIES) + of_ranks
    sums = rewritten = 0
    if run is not None:
        rows = len(FAMILIES) * base.total_experts * base.intermediate_size
        sums, rewritten = 4 * (len(base.num_experts) * base.hidden_size**2 + rows), run.rewritten_bytes
    tensors = max(sums + max(family + 2 * step, 2 * family + step, 4 * family), rewritten)
    return int(tensors * (1 + _TEXT_SHARE)) + len(FAMILIES) * config.steps * _RECORD_BYTES + TEXT_BYTES


def _memory_of(device: str) -> int:
    return torch.cuda.get_device_properties(device).total_memory


def estimate_seconds(source: ExpertSource, sizes: GlobeConfig, config: FitConfig, ranks: Ranks = ALONE) -> float:
    """Predict the seconds of a fit of all its steps: every pass that its solver counts, timed on one block.

    Holds a bank and sums of its size meanwhile. Where the fit keeps the experts on the device, the time to read
    them from disk does not count.
    """
    device = resolve_device(config.device)
    stored = source.stored_bytes(FAMILIES[0]) if device != "cpu" else 0
    kept = [] if estimate(sizes, ranks.world, device=device, stored_bytes=stored).kept_bytes else None
    weights = _FirstBlock(source, FAMILIES[0], device, Statistics(0.0, 1.0, {}), ranks=ranks, kept=kept)
    bank = torch.randn(*sizes.bank_shape()[:2], weights.columns.stop - weights.columns.start, device=device)
    codes = initial_codes(sizes, torch.Generator().manual_seed(config.seed)).to(device)
    solver = make_solver(weights, BankState(bank, codes, sizes.phi), sizes, config)
    seconds = first = 0.0
    for kind in solver.passes():
        if kind.count:
            of_pass = min(_seconds_per_pass(weights, kind.visit) for _ in range(_TRIALS))
            first = first or of_pass
            seconds += kind.count * of_pass
    return len(FAMILIES) * (seconds + _OTHER_PASSES * first)


class _FirstBlock(FamilyWeights):
    """The weights of a family; a pass reads only the first block."""

    def _blocks(self, read: Callable[..., torch.Tensor], span: slice | None) -> Iterator[Block]:
        return islice(super()._blocks(read, span), 1)


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
