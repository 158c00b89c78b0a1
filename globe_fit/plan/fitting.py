"""A fit before it runs: the requests that no fit can meet, and the bytes at its peak."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from globe_fit.calibration.offload import RunPlan, plan_run
from globe_fit.config import AUTO, SELF, SOLVERS, FitConfig, resolve_device
from globe_fit.data.model import predictor
from globe_fit.data.source import ExpertSource
from globe_fit.data.stream import block_experts
from globe_fit.plan.footprint import footprint
from globe_fit.run.distributed import Ranks, join
from globe_fit.run.snapshots import snapshot_bytes
from globe_fit.sizes import resolve_sizes
from globe_kernels.errors import RequestError
from globe_kernels.format.checkpoint import BaseModel, GlobeConfig
from globe_kernels.format.directories import holds_fit, require_place
from globe_kernels.format.names import FAMILIES
from globe_kernels.format.writing import require_room
from globe_kernels.units import format_bytes, parse_bytes

# Bytes of a value of the bank that are alive at once, beside the best state in the stored dtype.
_BANK, _GRADIENT = 4, 4
ADAM_BYTES = 2 * 2  # its two moments, in bf16
_ADDITION = 4  # to the gradient, on a CPU: the kernels of a GPU add in place
_CONJUGATE_GRADIENTS = 4 * 4  # of the alternating solver, in place of gradient and moments: four tensors
# Tensors that are alive at once. Of the size of the codes: codes, gradient, addition to it, two of Adam, best state. Of
# the size of a block of weights: two blocks, the product of adapters and bases, the residual, its square, its gradient.
# Of the size of the bases of a block: mixture, gradient, product with the weights.
_CODES, _BLOCKS, _BASES = 6, 6, 3
_BLOCKS_OF_ADDITION, _BASES_OF_ADDITION = 2, 1
# A calibrated fit holds a block and its bases in the metric too. Of several ranks it holds the larger of both with the
# columns of all ranks: as they arrive, and joined.
_BLOCKS_IN_METRIC, _BASES_IN_METRIC, _WHOLE = 1, 2, 2
_STAGED = 2  # blocks in host memory on their way to a GPU
# A snapshot: bytes of a value of the bank beside the best state, tensors of the size of the codes in fp32, the same as
# booleans. VarPro: the state, two moments, the best state; allowed atoms. Alternating: the state, the best state;
# allowed atoms, support. Entmax adds the scores and two of Adam.
_SAVED = {"varpro": (_BANK + ADAM_BYTES, 4, 1), "alternating": (_BANK, 2, 2)}
_SAVED_OF_ENTMAX = 3  # of the size of the codes
_RECORD_BYTES, TEXT_BYTES = 400, 200_000  # of a step in the metric stream; of reports, histories and headers
_TEXT_SHARE = 0.01  # of the tensors: the text of a report grows with the layers and the rows of an expert
# The experts of a family stay on a GPU where they and the fit take less than this share of its memory. The rest is for
# the context, the workspaces of libraries and the fragments that the allocator cannot join.
_GPU_SHARE = 0.9


@dataclass(frozen=True)
class Estimate:
    """Bytes of the fit of both families, one after the other; of several ranks, the bytes of the first, the largest.

    The factors of a finished family and the adapters of a family that is finished last are in files, whose pages give
    way: a fit without snapshots holds them in host memory too.
    """

    solver_bytes: int  # on the device of the fit
    block_bytes: int  # on the device of the fit
    host_bytes: int  # in host memory beside the device
    ranks: int = 1
    calibration_bytes: int = 0  # of a calibrated fit, on its device
    run_bytes: int = 0  # of the run of the dense model before a calibrated fit
    kept_bytes: int = 0  # on a GPU: the experts of a family as they are stored, where there is room

    @property
    def peak_bytes(self) -> int:
        """On the device and in host memory together: on a CPU, the growth of the process."""
        return max(self.device_bytes + self.host_bytes, self.run_bytes)

    @property
    def least_bytes(self) -> int:
        """The peak where no experts are kept on the device."""
        return max(self.device_bytes - self.kept_bytes + self.host_bytes, self.run_bytes)

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
    calibrate: str | Path | None  # the text, as of `compress`; AUTO is resolved
    note: str | None  # why there is no text by default

    @property
    def calibrated(self) -> bool:
        """Whether the fit minimises the error of the outputs of the experts on a text."""
        return self.calibrate is not None

    def require_room(self, out: str | Path, beside: int = 0) -> None:
        """Require room for the fit in `out`, where snapshots of it may be, and for `beside` more bytes.

        Raises GlobeError for a full disk.
        """
        require_room(Path(out), self.disk_bytes + beside - snapshot_bytes(out))

    def figures(self) -> dict:
        """Predict the sizes and bytes of the fit; JSON types only. Nothing is read and nothing is allocated."""
        return {
            "rank": self.sizes.rank,
            "atoms": self.sizes.num_atoms,
            "bytes": {"dense_experts": self.sizes.base.dense_bytes, "globe_on_disk": self.sizes.tensor_bytes},
            **asdict(self.needs),
            "disk_bytes": self.disk_bytes,
            "sizes": footprint(self.sizes, self.source.facts, device=self.config.device),
            "peak_bytes": self.needs.peak_bytes,
        }


def plan_fit(
    model_dir: str | Path,
    out: str | Path,
    config: FitConfig,
    *,
    calibrate: str | Path | None = AUTO,
    memory_limit: float | str | None = None,
) -> FitPlan:
    """Check a fit by the headers of its model alone, and join the ranks of torchrun; arguments as of `compress`.

    Raises RequestError for sizes out of range, a combination that no fit supports, too little memory and an `out` with
    other files, GlobeError for damaged files.
    """
    source, config = ExpertSource(model_dir), replace(config, device=resolve_device(config.device))
    sizes, ranks = resolve_sizes(source.base, config), join(config.device)
    limit, note = None if memory_limit is None else parse_bytes(memory_limit), None
    if calibrate == AUTO:
        calibrate, note = _text_by_default(source, config, limit)
    require_supported(source.base, config, calibrate is not None, ranks)
    require_place(out, holds_fit, "fit")
    run = None if calibrate is None else plan_run(source, config.device, limit, writes=calibrate == SELF)
    needs = estimate(
        sizes,
        ranks.world,
        calibrated=run is not None,
        run_bytes=0 if run is None else run.peak_bytes,
        device=config.device,
        stored_bytes=source.stored_bytes(FAMILIES[0]),
        solver=config.solver,
    )
    if limit is not None and needs.least_bytes > limit:
        raise RequestError(
            f"The fit needs {format_bytes(needs.least_bytes)} at its peak{per_rank(ranks.world)} and the memory limit "
            f"is {format_bytes(limit)}; give a smaller ratio, fewer atoms or a smaller rank."
        )
    disk = disk_bytes(sizes, config, ranks.world, run)
    return FitPlan(source, config, sizes, ranks, limit, needs, disk, calibrate, note)


def _text_by_default(source: ExpertSource, config: FitConfig, limit: int | None) -> tuple[str | None, str | None]:
    """Return SELF where the model can write a text; otherwise None, and for a person the reason."""
    if config.solver != "varpro":
        return None, None
    try:
        predictor(source.outline.model)
        plan_run(source, config.device, limit, writes=True)
    except RequestError as reason:
        return None, f"The fit is not calibrated and lowers the error of the weights alone. {reason}"
    return SELF, None


def per_rank(ranks: int) -> str:
    return "" if ranks == 1 else f" on each of {ranks} ranks"


def require_supported(base: BaseModel, config: FitConfig, calibrated: bool, ranks: Ranks) -> None:
    """Raise RequestError for a combination of solver, calibration and ranks that no fit supports."""
    if calibrated and config.solver != "varpro":
        raise RequestError(
            f"solver is {config.solver} and a text to calibrate on is given; only varpro fits to a text, so give "
            "solver varpro or no text."
        )
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
    memory_bytes: float | None = None,
    solver: str = SOLVERS[0],
) -> Estimate:
    """Predict the bytes of a fit by its sizes alone: nothing is read and nothing is allocated.

    `run_bytes` are the bytes that the run of the dense model takes before a calibrated fit, `stored_bytes` the bytes of
    the experts of one family on disk, `memory_bytes` the memory of a GPU that is not here.
    """
    base, on_gpu = sizes.base, torch.device(device).type == "cuda"
    columns = -(-base.hidden_size // ranks)  # of the rank that has most
    experts = block_experts(max(base.num_experts.values()), base.intermediate_size, base.hidden_size)
    of_solver, block = step_bytes(sizes, experts, ranks, calibrated=calibrated, on_gpu=on_gpu, solver=solver)
    matrices = len(base.num_experts) * base.hidden_size**2 * 4  # C or L of every layer
    rows = len(FAMILIES) * base.total_experts * base.intermediate_size * 4
    staged = _STAGED * experts * base.intermediate_size * columns * 4
    needs = Estimate(
        solver_bytes=of_solver,
        block_bytes=block,
        host_bytes=(staged if on_gpu else 0) + (matrices + rows if calibrated else 0),
        ranks=ranks,
        calibration_bytes=matrices + rows // len(FAMILIES) if calibrated else 0,
        run_bytes=run_bytes,
    )
    if not on_gpu:
        return needs
    kept = replace(needs, kept_bytes=stored_bytes * columns // base.hidden_size)
    return kept if kept.device_bytes <= _GPU_SHARE * (memory_bytes or _memory_of(device)) else needs


def step_bytes(
    sizes: GlobeConfig,
    experts: int,
    ranks: int = 1,
    *,
    calibrated: bool = False,
    on_gpu: bool = False,
    solver: str = SOLVERS[0],
) -> tuple[int, int]:
    """Return the bytes of a solver and of its blocks of `experts` experts, on the device of the fit."""
    base = sizes.base
    columns = -(-base.hidden_size // ranks)  # of the rank that has most
    bank = sizes.num_atoms * sizes.rank * columns
    codes = base.total_experts * sizes.num_atoms * 4
    weights = experts * base.intermediate_size * columns * 4
    bases = experts * sizes.rank * columns * 4
    of_varpro = _GRADIENT + ADAM_BYTES
    of_bank = _BANK + (of_varpro if solver == "varpro" else _CONJUGATE_GRADIENTS) + sizes.torch_dtype.itemsize
    of_blocks = _BLOCKS * weights + _BASES * bases
    if calibrated:
        of_blocks += _BLOCKS_IN_METRIC * weights + _BASES_IN_METRIC * bases
        of_blocks += _WHOLE * ranks * max(weights, bases) if ranks > 1 else 0
    if solver == "varpro" and not on_gpu:  # most temporaries are gone when the gradient is added to
        of_blocks = max(of_blocks, _ADDITION * bank + _BLOCKS_OF_ADDITION * weights + _BASES_OF_ADDITION * bases)
    return of_bank * bank + _CODES * codes, of_blocks


def disk_bytes(sizes: GlobeConfig, config: FitConfig, ranks: int = 1, run: RunPlan | None = None) -> int:
    """Predict the bytes on disk at the peak of a fit, of all ranks together; `run` is of a calibrated fit.

    F is the snapshot of a finished family, S of a step. A snapshot is written beside the snapshot before, and the
    snapshot of the second family from factors that are on the disk, the checkpoint beside all snapshots:

        max(F + 2 S, 3 F + S, 4 F) + sums of a calibration, 1 % more, + text
    """
    base = sizes.base
    of_bank, codes, flags = _SAVED[config.solver]
    if config.solver == "alternating" and config.alternating.coding.method == "entmax":
        codes += _SAVED_OF_ENTMAX
    bank = sizes.num_atoms * sizes.rank * base.hidden_size
    step = (of_bank + sizes.torch_dtype.itemsize) * bank + ranks * (
        4 * codes + flags
    ) * base.total_experts * sizes.num_atoms
    of_ranks = (ranks - 1) * base.total_experts * sizes.support * 8  # every rank keeps the codes of a finished family
    family = sizes.tensor_bytes // len(FAMILIES) + of_ranks
    sums = rewritten = 0
    if run is not None:
        rows = len(FAMILIES) * base.total_experts * base.intermediate_size
        sums, rewritten = 4 * (len(base.num_experts) * base.hidden_size**2 + rows), run.rewritten_bytes
    tensors = max(sums + max(family + 2 * step, 3 * family + step, 4 * family), rewritten)
    return int(tensors * (1 + _TEXT_SHARE)) + len(FAMILIES) * config.steps * _RECORD_BYTES + TEXT_BYTES


def _memory_of(device: str) -> int:
    return torch.cuda.get_device_properties(device).total_memory
