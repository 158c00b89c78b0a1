"""What a fit will take, before it runs: bytes at its peak and seconds, by the sizes and by timing one block."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

import torch

from globe_fit.config import FitConfig, resolve_device
from globe_fit.data.source import ExpertSource
from globe_fit.data.stream import Block, FamilyWeights, Statistics, block_experts
from globe_fit.run.distributed import ALONE, Ranks
from globe_fit.solvers.base import BankState
from globe_fit.solvers.registry import make_solver
from globe_fit.solvers.start import initial_codes
from globe_kernels.format.architectures import FAMILIES
from globe_kernels.format.checkpoint import GlobeConfig

_OTHER_PASSES = 4  # statistics, start, refit, baselines: each about as long as the first pass of a solver
_TRIALS = 2  # of a pass that is timed: the first also warms up
# What is alive at once, in tensors of that size: the solver holds bank and codes, their gradients and what is added to
# the bank's, two of Adam and the best state; a step holds two blocks of weights, what the adapters make of one, the
# residual, its square and its gradient, and of the bases mixture, gradient and product with the weights.
_BANKS, _CODES, _BLOCKS, _BASES = 6, 6, 6, 3
_BANKS_OF_KERNELS = 5  # which add to the gradient in place
# A calibrated fit holds C and L of every layer in fp32, and a block and its bases in the metric too.
_MATRICES, _BLOCKS_IN_METRIC, _BASES_IN_METRIC = 2, 1, 2
# Of the memory of a GPU: the experts of a family stay there where they and the fit take less. The rest is for the
# context, the workspaces of libraries and what the allocator cannot join.
_GPU_SHARE = 0.9


@dataclass(frozen=True)
class Estimate:
    """Of the fit of both families, one after the other; of several ranks, of the first, which takes the most."""

    solver_bytes: int  # on the device of the fit
    block_bytes: int  # likewise
    factor_bytes: int  # in host memory
    ranks: int = 1
    calibration_bytes: int = 0  # likewise, of a calibrated fit
    run_bytes: int = 0  # of the run of the dense model before it
    kept_bytes: int = 0  # on a GPU: the experts of a family as they are stored, where there is room

    @property
    def peak_bytes(self) -> int:
        """On the device and in host memory together: on a CPU, what the process grows by."""
        return max(self.device_bytes + self.factor_bytes, self.run_bytes)

    @property
    def least_bytes(self) -> int:
        """The same where nothing is kept."""
        return max(self.device_bytes - self.kept_bytes + self.factor_bytes, self.run_bytes)

    @property
    def device_bytes(self) -> int:
        """On the device of the fit."""
        return self.solver_bytes + self.block_bytes + self.calibration_bytes + self.kept_bytes


def estimate(
    sizes: GlobeConfig,
    ranks: int = 1,
    *,
    calibrated: bool = False,
    run_bytes: int = 0,
    device: str = "cpu",
    stored_bytes: int = 0,
) -> Estimate:
    """By the sizes alone: nothing is read and nothing allocated. `run_bytes` is what the run of the dense model before
    a calibrated fit takes, `stored_bytes` what the experts of one family take on disk."""
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


def _memory_of(device: str) -> int:
    return torch.cuda.get_device_properties(device).total_memory


def estimate_seconds(source: ExpertSource, sizes: GlobeConfig, config: FitConfig, ranks: Ranks = ALONE) -> float:
    """Predict the seconds of a fit of all its steps, from the time that each pass of its solver takes on one block.

    Holds a bank and a tensor of its size meanwhile. Reading from the disk does not count where the fit keeps the
    experts on the device.
    """
    device = resolve_device(config.device)
    stored = source.stored_bytes(FAMILIES[0]) if device != "cpu" else 0
    kept = [] if estimate(sizes, ranks.world, device=device, stored_bytes=stored).kept_bytes else None
    weights = _FirstBlock(source, FAMILIES[0], device, Statistics(0.0, 1.0, {}), ranks=ranks, kept=kept)
    bank = torch.randn(*sizes.bank_shape()[:2], weights.columns.stop - weights.columns.start, device=device)
    codes = initial_codes(sizes, torch.Generator().manual_seed(config.seed)).to(device)
    solver = make_solver(weights, BankState(bank, codes, sizes.phi), sizes, config)
    seconds = other = 0.0
    for kind in solver.passes():
        if kind.count:
            of_pass = min(_seconds_per_pass(weights, kind.visit) for _ in range(_TRIALS))
            seconds += kind.count * of_pass
            other = other or _OTHER_PASSES * of_pass
    return len(FAMILIES) * (seconds + other)


class _FirstBlock(FamilyWeights):
    """The weights of a family, of which a pass reads nothing but the first block."""

    def _blocks(self, read: Callable[..., torch.Tensor], span: slice | None) -> Iterator[Block]:
        return islice(super()._blocks(read, span), 1)


def _seconds_per_pass(weights: FamilyWeights, visit: Callable[[Block], object]) -> float:
    """Time a pass on its only block and scale the time to all experts."""
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
