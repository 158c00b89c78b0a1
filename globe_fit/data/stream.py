"""The objective of a fit, and the weights it is measured on.

For one family, over all n experts i with weights W_i (P, D):

    minimise  sum_i || W_i - A_i phi(sum_j alpha_ij B_j) ||^2 / sum_i || W_i ||^2

A_i (P, R) adapters, B_j (R, D) atoms, alpha_i codes. The solvers see weights normalised by one mean and
one scale per family; errors that are reported are always those of the stored factors on the raw weights.

A calibrated fit measures the rows of an error in the metric of their layer, each with a weight of its own
(globe_fit.calibration.metric): every matrix of D columns is multiplied by L_l, and row k of expert i by sqrt(d_ik), before it
enters the norm. The best A_i for a basis is the same with and without the weights of the rows: least squares of each.

Of several ranks (globe_fit.run.distributed) each sees its own columns of every W_i.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch

from globe_fit.data.source import ExpertLayer, ExpertSource
from globe_fit.run.distributed import ALONE, Ranks


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation over all weights of a family, and the energy per layer."""

    mean: float
    scale: float
    energy: dict[int, float]  # layer id -> sum of squares of the raw weights

    @property
    def total_energy(self) -> float:
        return sum(self.energy.values())


@dataclass(frozen=True)
class Block:
    """Some experts of one layer, as the passes over the weights visit them."""

    layer: ExpertLayer
    experts: range  # within the layer
    places: slice  # among all n experts
    weights: torch.Tensor  # (len(experts), P, D) float32, D of the columns that were asked for


@dataclass(frozen=True)
class Metric:
    """In what the errors of a calibrated fit of one family are measured."""

    roots: dict[int, torch.Tensor]  # layer id -> L (D, D)
    row_scales: torch.Tensor  # (n, P), sqrt(d)


def share(part: float, whole: float) -> float:
    """part / whole; 0 where there is nothing to have a share of, such as a layer of zeros."""
    return part / whole if whole else 0.0


# A pass holds the weights of two blocks, one in use and one being read, and up to five temporaries of that size. An
# eighth of a layer keeps all of that below one layer; below the minimum blocks only cost launches, above the maximum
# they only cost memory.
_BLOCKS_PER_LAYER = 8
_MIN_BLOCK_BYTES = 4 * 2**20
_MAX_BLOCK_BYTES = 256 * 2**20


@dataclass(frozen=True)
class FamilyWeights:
    """The experts of one family, streamed onto `device` in blocks of at most one layer."""

    source: ExpertSource
    family: str
    device: str
    statistics: Statistics
    metric: Metric | None = None  # of a calibrated fit
    normalised_energy: float = 1.0  # sum of squares of the normalised weights, in the metric
    ranks: Ranks = ALONE
    kept: list[Block] | None = None  # on a GPU: a list that the first whole pass fills with the experts as stored

    @classmethod
    def measure(
        cls,
        source: ExpertSource,
        family: str,
        device: str,
        metric: Metric | None = None,
        ranks: Ranks = ALONE,
    ) -> "FamilyWeights":
        """A pass over the weights for their statistics, with `metric` another for their energy in the metric.

        Raises GlobeError when a weight is NaN or infinite.
        """
        total, energy = 0.0, dict.fromkeys((layer.layer for layer in source.layers), 0.0)
        count = source.base.total_experts * source.base.intermediate_size * source.base.hidden_size
        unmeasured = cls(source, family, device, Statistics(0.0, 1.0, {}), ranks=ranks)
        for block in unmeasured.raw():
            source.require_finite(block.layer, family, block.experts, block.weights)
            total += block.weights.sum(dtype=torch.float64).item()
            # per expert: an fp64 copy of one, not of the block
            energy[block.layer.layer] += sum(expert.double().square().sum().item() for expert in block.weights)
            del block  # before the next block is read
        total, *energies = ranks.sums(total, *energy.values())
        energy = dict(zip(energy, energies, strict=True))
        mean = total / count
        scale = max(sum(energy.values()) / count - mean**2, 0.0) ** 0.5
        # without a metric: one per weight, by definition of the scale
        measured = cls(source, family, device, Statistics(mean, scale or 1.0, energy), metric, float(count), ranks)
        if metric is None:
            return measured
        in_metric = sum(
            measured.weighted(block, block.weights).square().sum().item() for block in measured.normalised()
        )
        return replace(measured, normalised_energy=in_metric)

    def in_metric(self, block: Block, matrices: torch.Tensor) -> torch.Tensor:
        """`matrices` (..., D) of the experts of a block, their columns in the metric."""
        return matrices if self.metric is None else matrices @ self.metric.roots[block.layer.layer]

    def weighted(self, block: Block, matrices: torch.Tensor) -> torch.Tensor:
        """`matrices` (E, P, D) of the experts of a block, as their squares are to be summed."""
        if self.metric is None:
            return matrices
        return self.in_metric(block, matrices).mul_(self.metric.row_scales[block.places, :, None])

    @property
    def columns(self) -> slice:
        """Those of the D columns that this rank holds."""
        return self.ranks.part(self.source.base.hidden_size)

    def raw(self, whole: slice | None = None) -> Iterator[Block]:
        """All experts as they are stored, in the columns of this rank; or only those at the places `whole` among all n,
        in all columns."""
        # map, not a loop: a loop variable would keep a block alive while the next one is waited for
        if torch.device(self.device).type == "cpu":
            return _read_ahead(self._blocks(self.source.read, whole))
        if whole is None and self.kept:
            return map(_in_float32, iter(self.kept))
        upload = Upload(self.source, self.device)
        coming = _read_ahead(self._blocks(upload.read, whole))
        stored = map(lambda block: replace(block, weights=upload.arrived(block.weights)), coming)
        return map(_in_float32, stored if whole is not None or self.kept is None else _keeping(stored, self.kept))

    def normalised(self, whole: slice | None = None) -> Iterator[Block]:
        """The same with mean 0 and standard deviation 1 over the family."""
        return map(self._normalise, self.raw(whole))

    def _normalise(self, block: Block) -> Block:
        block.weights.sub_(self.statistics.mean).div_(self.statistics.scale)
        return block

    def _blocks(self, read: Callable[..., torch.Tensor], whole: slice | None) -> Iterator[Block]:
        """The blocks of a pass, by `read` in the arguments of that of a source."""
        base = self.source.base
        columns = self.columns if whole is None else slice(0, base.hidden_size)
        places = slice(0, base.total_experts) if whole is None else whole
        for layer, inside in self.source.blocks:
            size = block_experts(layer.num_experts, base.intermediate_size, base.hidden_size)
            if whole is not None:
                size = max(1, size // self.ranks.world)  # in the bytes of a block of columns
            start, stop = max(inside.start, places.start), min(inside.stop, places.stop)
            for first in range(start, stop, size):
                own = slice(first, min(first + size, stop))
                experts = range(own.start - inside.start, own.stop - inside.start)
                yield Block(layer, experts, own, read(layer, self.family, experts, columns))


class Upload:
    """Copies experts to `device` through pinned memory, on a stream of its own.

    `read` is for the thread that reads ahead, `arrived` for the one that computes.
    """

    def __init__(self, source: ExpertSource, device: str):
        self._source, self._stream = source, torch.cuda.Stream(device)

    def read(self, layer: ExpertLayer, family: str, experts: range, columns: slice) -> torch.Tensor:
        """As `source.read`, on the device; only the stream of this upload may use it before it has `arrived`."""
        shape = (len(experts), self._source.base.intermediate_size, columns.stop - columns.start)
        with torch.cuda.stream(self._stream):  # its device too: a thread begins on the first one
            # torch gives pinned memory away only when all copies out of it are complete, so no two reads share it early
            staging = torch.empty(shape, dtype=self._source.stored_dtype(layer, family), pin_memory=True)
            self._source.read(layer, family, experts, columns, out=staging)
            return staging.to(self._stream.device, non_blocking=True)

    def arrived(self, weights: torch.Tensor) -> torch.Tensor:
        """`weights` as `read` returned them, for the current stream, which waits for the copy; the host does not."""
        current = torch.cuda.current_stream(self._stream.device)
        current.wait_stream(self._stream)
        weights.record_stream(current)  # the stream that they belong to must not reuse them earlier
        return weights


def _in_float32(block: Block) -> Block:
    """A copy in any case: a pass writes to its blocks."""
    return replace(block, weights=block.weights.to(torch.float32, copy=True))


def _keeping(blocks: Iterator[Block], kept: list[Block]) -> Iterator[Block]:
    """The same blocks, which are in `kept` once all have passed."""
    passed = []
    for block in blocks:
        passed.append(block)
        yield block
    kept += passed


def block_experts(num_experts: int, inner: int, width: int) -> int:
    """Experts in a block of a layer of `num_experts`."""
    expert_bytes = inner * width * 4
    wanted = min(max(num_experts * expert_bytes // _BLOCKS_PER_LAYER, _MIN_BLOCK_BYTES), _MAX_BLOCK_BYTES)
    return min(max(1, wanted // expert_bytes), num_experts)


def _read_ahead(blocks: Iterator[Block]) -> Iterator[Block]:
    """The same blocks; while one is in use a thread reads the next."""
    with ThreadPoolExecutor(1, "reader") as reader:
        coming = reader.submit(next, blocks, None)
        while (block := coming.result()) is not None:
            coming = reader.submit(next, blocks, None)
            yield block
            del block  # before the next one is waited for
