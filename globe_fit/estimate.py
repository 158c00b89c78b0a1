"""What a fit will take, before it runs: bytes at its peak and seconds, by the sizes and by timing one block."""

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from globe_fit.codes import largest_support
from globe_fit.config import FitConfig, resolve_device
from globe_fit.distributed import ALONE, Ranks
from globe_fit.objective import FamilyWeights, Statistics, block_experts
from globe_fit.source import ExpertSource
from globe_fit.state import BankState
from globe_fit.varpro import backward_block
from globe_kernels.checkpoint import GlobeConfig
from globe_kernels.families import FAMILIES

if TYPE_CHECKING:
    from globe_fit.offload import RunPlan  # imports transformers, which takes seconds

_OTHER_PASSES = 4  # statistics, start, refit, baselines
# What is alive at once, in tensors of that size: the solver holds bank and codes, their gradients and what is added to
# the bank's, two of Adam and the best state; a step holds two blocks of weights, what the adapters make of one, the
# residual, its square and its gradient, and of the bases mixture, gradient and product with the weights.
_BANKS, _CODES, _BLOCKS, _BASES = 6, 6, 6, 3
# A calibrated fit holds C and L of every layer in fp32, and a block and its bases in the metric too.
_MATRICES, _BLOCKS_IN_METRIC, _BASES_IN_METRIC = 2, 1, 2


@dataclass(frozen=True)
class Estimate:
    """Of the fit of both families, one after the other; of several ranks, of the first, which takes the most."""

    solver_bytes: int  # on the device of the fit
    block_bytes: int  # likewise
    factor_bytes: int  # in host memory
    ranks: int = 1
    calibration_bytes: int = 0  # likewise, of a calibrated fit
    run_bytes: int = 0  # of the run of the dense model before it

    @property
    def peak_bytes(self) -> int:
        """On the device and in host memory together: on a CPU, what the process grows by."""
        return max(self.solver_bytes + self.block_bytes + self.factor_bytes + self.calibration_bytes, self.run_bytes)


def estimate(sizes: GlobeConfig, ranks: int = 1, run: "RunPlan | None" = None) -> Estimate:
    """By the sizes alone: nothing is read and nothing allocated. `run` is that of a calibrated fit."""
    base = sizes.base
    columns = -(-base.hidden_size // ranks)  # of the rank that has most
    bank = sizes.num_atoms * sizes.rank * base.hidden_size * 4
    codes = base.total_experts * sizes.num_atoms * 4
    experts = block_experts(max(base.num_experts.values()), base.intermediate_size, base.hidden_size)
    weights = experts * base.intermediate_size * columns * 4
    bases = experts * sizes.rank * columns * 4
    adapters = base.total_experts * base.intermediate_size * sizes.rank * sizes.torch_dtype.itemsize
    calibration = _MATRICES * len(base.num_experts) * base.hidden_size**2 * 4
    in_metric = _BLOCKS_IN_METRIC * weights + _BASES_IN_METRIC * bases
    return Estimate(
        solver_bytes=_BANKS * bank * columns // base.hidden_size + _CODES * codes,
        block_bytes=_BLOCKS * weights + _BASES * bases + (0 if run is None else in_metric),
        factor_bytes=bank // 4 * sizes.torch_dtype.itemsize + adapters,
        ranks=ranks,
        calibration_bytes=0 if run is None else calibration,
        run_bytes=0 if run is None else run.peak_bytes,
    )


def estimate_seconds(source: ExpertSource, sizes: GlobeConfig, config: FitConfig, ranks: Ranks = ALONE) -> float:
    """Reads one block of experts and takes its step, while the support is free and when it is fixed; holds a bank and
    its gradient meanwhile."""
    device = resolve_device(config.device)
    weights = FamilyWeights(source, FAMILIES[0], device, Statistics(0.0, 1.0, {}), ranks=ranks)
    columns = weights.columns.stop - weights.columns.start
    bank = torch.randn(*sizes.bank_shape()[:2], columns, device=device, requires_grad=True)
    free = torch.randn(sizes.base.total_experts, sizes.num_atoms, device=device)
    fixed = free * largest_support(free, sizes.support)
    _seconds_per_pass(weights, BankState(bank, free, sizes.phi), config)  # reads from the disk and warms up
    while_free, when_fixed = (
        _seconds_per_pass(weights, BankState(bank, codes.requires_grad_(), sizes.phi), config)
        for codes in (free, fixed)
    )
    per_step = while_free + (1 - config.varpro.support_at) * (when_fixed - while_free)
    return len(FAMILIES) * (config.steps + _OTHER_PASSES) * per_step


def _seconds_per_pass(weights: FamilyWeights, state: BankState, config: FitConfig) -> float:
    """Of a pass for the gradient, judged by its first block."""
    began = time.perf_counter()
    block = next(weights.normalised())
    backward_block(weights, block, state, config.varpro.ridge)
    if weights.device != "cpu":
        torch.cuda.synchronize(weights.device)
    return (time.perf_counter() - began) * weights.source.base.total_experts / len(block.experts)
