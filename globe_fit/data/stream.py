"""Stream the experts of a family onto a device, and state the objective of a fit.

For one family, over all n experts i with weights W_i (P, D):

    minimise  sum_i || W_i - A_i phi(sum_j alpha_ij B_j) ||^2 / sum_i || W_i ||^2

A_i (P, R) adapters, B_j (R, D) atoms, alpha_i codes. The solvers see weights that are normalised by one mean and one
scale per family. A report always measures the stored factors on the raw weights.

A calibrated fit measures errors in the metric of each layer l, and weights row k of expert i by d_ik
(globe_fit.calibration.metric): before a norm is taken, every matrix of D columns is multiplied by L_l, and row k of
expert i by sqrt(d_ik). The row weights do not change the best A_i for a basis, because each row is a separate
least-squares problem.

Each of several ranks (globe_fit.run.distributed) holds its columns of every W_i. A column of W_i L_l needs all columns
of W_i, so in a calibrated fit every rank gets the whole matrices of a block and computes its columns of the product. A
rank sends its columns of the E matrices of a block, in fp32: for each block one message of the weights, E P D / ranks
values, and two of E R D / ranks, of the bases and of their gradient. No exact way sends less: sums of the partial
products W_i[:, columns] L_l[columns] are of the size of whole products.
"""

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch

from globe_fit.data.source import ExpertLayer, ExpertSource
from globe_fit.run.distributed import ALONE, Ranks
from globe_kernels.errors import GlobeError


@dataclass(frozen=True)
class Statistics:
    """The mean and scale by which a fit normalises the weights of a family, and the energy of each layer.

    They are the mean and the standard deviation over all weights; of weights that are all alike 0 and the RMS.
    """

    mean: float
    scale: float
    energy: dict[int, float]  # layer id -> sum of squares of the raw weights

    @property
    def total_energy(self) -> float:
        return sum(self.energy.values())

    @property
    def unit(self) -> float:
        """A power of two near the scale: weights in this unit have squares that float32 holds, and lose no bit."""
        return 2.0 ** math.frexp(self.scale)[1]


@dataclass(frozen=True)
class Block:
    """The experts that a pass over the weights visits together, all of one layer."""

    layer: ExpertLayer
    experts: range  # within the layer
    span: slice  # among all n experts
    weights: torch.Tensor  # (len(experts), P, D) float32; D counts the columns that the pass reads


@dataclass(frozen=True)
class ErrorMetric:
    """The metric in which a calibrated fit of one family measures errors."""

    roots: dict[int, torch.Tensor]  # layer id -> L (D, D)
    row_scales: torch.Tensor  # (n, P), sqrt(d)


def share(part: float, whole: float) -> float:
    """Return part / whole; 0 where the whole is 0, as for a layer of zeros."""
    return part / whole if whole else 0.0


# A pass holds the weights of two blocks, the block in use and the block being read, and up to five temporaries of the
# same size. Blocks of an eighth of a layer keep the sum below one layer. Smaller blocks than the minimum only cost
# launches, larger blocks than the maximum only cost memory.
_BLOCKS_PER_LAYER = 8
_ALIKE = 1e-10  # of the mean square: a variance that float32 weights do not have but by rounding
_MIN_BLOCK_BYTES = 4 * 2**20
_MAX_BLOCK_BYTES = 256 * 2**20


@dataclass(frozen=True)
class FamilyWeights:
    """The experts of one family, which stream onto `device` in blocks of at most one layer."""

    source: ExpertSource
    family: str
    device: str
    statistics: Statistics
    metric: ErrorMetric | None = None  # None: the fit is not calibrated
    normalised_energy: float = 1.0  # sum of squares of the normalised weights, in the metric
    ranks: Ranks = ALONE
    kept: list[Block] | None = None  # of a GPU: the first whole pass fills it with the experts as stored

    @classmethod
    def measure(
        cls,
        source: ExpertSource,
        family: str,
        device: str,
        metric: ErrorMetric | None = None,
        ranks: Ranks = ALONE,
    ) -> "FamilyWeights":
        """Measure the statistics of the weights in one pass and, with `metric`, their energy in the metric in another.

        Raises GlobeError when a weight is NaN or infinite, and when the weights are too small.
        """
        total, energy = 0.0, dict.fromkeys((layer.layer for layer in source.layers), 0.0)
        count = source.base.total_experts * source.base.intermediate_size * source.base.hidden_size
        unmeasured = cls(source, family, device, Statistics(0.0, 1.0, {}), ranks=ranks)
        for block in unmeasured.raw():
            source.require_finite(block.layer, family, block.experts, block.weights)
            total += block.weights.sum(dtype=torch.float64).item()
            # per expert: an fp64 copy of an expert, not of the block
            energy[block.layer.layer] += sum(expert.double().square().sum().item() for expert in block.weights)
            del block  # before the next block is read
        total, *energies = ranks.sums(total, *energy.values())
        energy = dict(zip(energy, energies, strict=True))
        mean, mean_square = total / count, sum(energy.values()) / count
        variance = mean_square - mean**2
        if variance < _ALIKE * mean_square:
            mean, variance = 0.0, mean_square
        scale = variance**0.5
        if 0 < scale < torch.finfo(torch.float32).tiny:
            raise GlobeError(
                f"The {family} experts of {source.model_dir} have weights of about {scale:.0e}, too small for float32; "
                "scale them up, and down_proj down by as much."
            )
        # without a metric: 1 per weight, by definition of the scale
        measured = cls(source, family, device, Statistics(mean, scale or 1.0, energy), metric, float(count), ranks)
        if metric is None:
            return measured
        (in_metric,) = ranks.sums(
            sum(measured.weighted(block, block.weights).square().sum().item() for block in measured.normalised())
        )
        return replace(measured, normalised_energy=in_metric or float(count))

    def in_metric(self, block: Block, matrices: torch.Tensor) -> torch.Tensor:
        """Bring the columns of `matrices` (..., D), of the experts of a block, into the metric."""
        if self.metric is None:
            return matrices
        root = self.metric.roots[block.layer.layer]
        return matrices @ root if self.ranks.world == 1 else _Columns.apply(matrices, root, self.ranks)

    def weighted(self, block: Block, matrices: torch.Tensor) -> torch.Tensor:
        """Bring the columns and rows of `matrices` (E, P, D), of the experts of a block, into the metric."""
        if self.metric is None:
            return matrices
        return self.in_metric(block, matrices).mul_(self.metric.row_scales[block.span, :, None])

    @property
    def columns(self) -> slice:
        """Return which of the D columns this rank holds."""
        return self.ranks.part(self.source.base.hidden_size)

    def raw(self, span: slice | None = None) -> Iterator[Block]:
        """Visit all experts as they are stored, in the columns of this rank; or those of `span`, in all columns."""
        # map, not a loop: a loop variable would keep a block alive while the next block is waited for
        if torch.device(self.device).type == "cpu":
            return _read_ahead(self._blocks(self.source.read, span))
        if span is None and self.kept:
            return map(_in_float32, iter(self.kept))
        upload = Upload(self.source, self.device)
        coming = _read_ahead(self._blocks(upload.read, span))
        stored = map(lambda block: replace(block, weights=upload.arrived(block.weights)), coming)
        return map(_in_float32, stored if span is not None or self.kept is None else _keeping(stored, self.kept))

    def normalised(self, span: slice | None = None) -> Iterator[Block]:
        """Visit the same experts with mean 0 and standard deviation 1 over the family."""
        return map(self._normalise, self.raw(span))

    def _normalise(self, block: Block) -> Block:
        block.weights.sub_(self.statistics.mean).div_(self.statistics.scale)
        return block

    def _blocks(self, read: Callable[..., torch.Tensor], span: slice | None) -> Iterator[Block]:
        """Make the blocks of a pass; `read` takes the arguments of ExpertSource.read."""
        base = self.source.base
        columns = self.columns if span is None else slice(0, base.hidden_size)
        visited = slice(0, base.total_experts) if span is None else span
        for layer, of_layer in self.source.layer_spans:
            size = block_experts(layer.num_experts, base.intermediate_size, base.hidden_size)
            if span is not None:
                size = max(1, size // self.ranks.world)  # whole experts in the bytes of a block of columns
            start, stop = max(of_layer.start, visited.start), min(of_layer.stop, visited.stop)
            for first in range(start, stop, size):
                last = min(first + size, stop)
                experts = range(first - of_layer.start, last - of_layer.start)
                yield Block(layer, experts, slice(first, last), read(layer, self.family, experts, columns))


class _Columns(torch.autograd.Function):
    """The columns of this rank of X L (..., D), from its columns of X and the whole of L (D, D).

    Their gradient is the columns of this rank of dY L^T, for the gradient dY of the product: the same with L^T.
    """

    @staticmethod
    def forward(ctx: Any, matrices: torch.Tensor, root: torch.Tensor, ranks: Ranks) -> torch.Tensor:
        ctx.root, ctx.ranks = root, ranks
        return _columns_of_product(matrices, root, ranks)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _columns_of_product(gradients[0], ctx.root.mT, ctx.ranks), None, None


def _columns_of_product(matrices: torch.Tensor, root: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    return ranks.whole(matrices, len(root)) @ root[:, ranks.part(len(root))]


class Upload:
    """Copy experts to `device` through pinned memory, on a separate stream; of quantised experts the codes.

    The thread that reads ahead calls `read`, the thread that computes calls `arrived`.
    """

    def __init__(self, source: ExpertSource, device: str):
        self._source, self._stream = source, torch.cuda.Stream(device)

    def read(self, layer: ExpertLayer, family: str, experts: range, columns: slice) -> torch.Tensor:
        """Read as `source.read` does, onto the device; other streams may use the result once it has `arrived`."""
        shape = (len(experts), self._source.base.intermediate_size, columns.stop - columns.start)
        dtype = self._source.stored_dtype(layer, family)
        with torch.cuda.stream(self._stream):  # sets the device too: a thread begins on the first GPU
            if self._source.is_quantized(layer, family):
                values = torch.empty(shape, dtype=dtype, device=self._stream.device)
                return self._source.read(layer, family, experts, columns, out=values)
            # torch gives pinned memory away only when all copies out of it are complete, so no two reads share it early
            staging = torch.empty(shape, dtype=dtype, pin_memory=True)
            self._source.read(layer, family, experts, columns, out=staging)
            return staging.to(self._stream.device, non_blocking=True)

    def arrived(self, weights: torch.Tensor) -> torch.Tensor:
        """Hand `weights` of `read` to the current stream, which waits for the copy; the host does not wait."""
        current = torch.cuda.current_stream(self._stream.device)
        current.wait_stream(self._stream)
        weights.record_stream(current)  # the upload stream must not reuse the memory earlier
        return weights


def _in_float32(block: Block) -> Block:
    """Copy the block to float32, also where it is float32: a pass writes to its blocks."""
    return replace(block, weights=block.weights.to(torch.float32, copy=True))


def _keeping(blocks: Iterator[Block], kept: list[Block]) -> Iterator[Block]:
    """Yield the same blocks, and put them into `kept` once all have passed."""
    passed = []
    for block in blocks:
        passed.append(block)
        yield block
    kept += passed


def block_experts(num_experts: int, inner: int, width: int) -> int:
    """Return how many experts of (inner, width) make a block of a layer of `num_experts`."""
    expert_bytes = inner * width * 4
    wanted = min(max(num_experts * expert_bytes // _BLOCKS_PER_LAYER, _MIN_BLOCK_BYTES), _MAX_BLOCK_BYTES)
    return min(max(1, wanted // expert_bytes), num_experts)


def _read_ahead(blocks: Iterator[Block]) -> Iterator[Block]:
    """Yield the same blocks; a thread reads the next block while the caller uses a block."""
    with ThreadPoolExecutor(1, "reader") as reader:
        coming = reader.submit(next, blocks, None)
        while (block := coming.result()) is not None:
            coming = reader.submit(next, blocks, None)
            yield block
            del block  # before the next block is waited for
