"""Turn a slice of one quantised weight into numbers.

    value[.., r, c] = (code[.., r, c] - zero[.., r // b_r, c // b_c]) * scale[.., r // b_r, c // b_c]

A block of b_r x b_c values shares one scale. `scale` is as stored, or multiplied or divided by a factor of the whole
weight. The product is computed in fp32 and rounded once, to bf16, or to fp16 where the scales are fp16: transformers,
compressed-tensors and the scripts of the publishers define the dequantised weights so.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from globe_fit.data.quantized.codes import Packing
from globe_kernels.errors import GlobeError

_E8M0_NAN = 255
_CACHED_VALUES = 2**18  # 1 MiB of fp32


class Files(Protocol):
    """The stored tensors of a checkpoint, as TensorFiles reads them."""

    weight_map: dict[str, str]

    def view(self, key: str) -> Any: ...

    def num_bytes(self, key: str) -> int: ...

    def read(self, key: str) -> torch.Tensor: ...


@dataclass(frozen=True)
class Factor:
    """One number by which all scales of a weight are multiplied or divided."""

    name: str
    divides: bool


@dataclass(frozen=True)
class QuantizedWeight:
    """The stored tensors of one weight, and how they make its values.

    `shape` and `blocks` are of the stored orientation: rows, which are outputs, before columns. `transposed`: the
    weight of the model has the columns first.
    """

    codes: str
    scales: str
    packing: Packing
    shape: tuple[int, ...]
    blocks: tuple[int, ...]  # values per scale along each axis
    dtype: torch.dtype
    factor: Factor | None = None
    zeros: str | None = None
    others: tuple[str, ...] = ()  # stored with the weight and not needed for its values
    transposed: bool = False

    @property
    def stored(self) -> tuple[str, ...]:
        factor = () if self.factor is None else (self.factor.name,)
        zeros = () if self.zeros is None else (self.zeros,)
        return (self.codes, self.scales, *factor, *zeros, *self.others)

    @property
    def model_shape(self) -> tuple[int, ...]:
        """Return the shape of the weight of the model."""
        return tuple(self._oriented(self.shape))

    def read(self, files: Files, index: Sequence[slice], device: str | torch.device) -> torch.Tensor:
        """Return the values at `index`, one slice per axis of the model's weight, on `device`.

        The codes of the slice go to the device and become numbers there. A CPU takes so few rows at a time that their
        fp32 stays in its caches, a GPU an expert. Raises GlobeError when a scale is NaN.
        """
        spans = [range(*part.indices(size)) for part, size in zip(index, self.model_shape, strict=True)]
        *experts, rows, columns = self._oriented(spans)
        out = torch.empty([len(span) for span in (*experts, rows, columns)], dtype=self.dtype, device=device)
        step = max(1, _CACHED_VALUES // max(1, len(columns))) if out.device.type == "cpu" else max(1, len(rows))
        for number, expert in enumerate(experts[0] if experts else range(1)):
            of_expert = out[number : number + 1] if experts else out
            for first in range(0, len(rows) if len(columns) else 0, step):
                part = slice(first, first + step)
                leading = [range(expert, expert + 1)] if experts else []
                self._fill(files, of_expert[..., part, :], [*leading, rows[part], columns])
        return out.mT if self.transposed else out

    def _oriented(self, axes: Sequence) -> list:
        return [*axes[:-2], axes[-1], axes[-2]] if self.transposed else list(axes)

    def _fill(self, files: Files, out: torch.Tensor, spans: Sequence[range]) -> None:
        """Write the values of `spans` into `out`, both in the stored orientation."""
        *_, columns = spans
        per_item = self.packing.values
        first = columns.start // per_item
        items = slice(first, -(-columns.stop // per_item))
        codes = files.view(self.codes)[*(slice(span.start, span.stop) for span in spans[:-1]), items]
        start = columns.start - first * per_item
        values = self.packing.unpack(codes.to(out.device))[..., start : start + len(columns)]
        grid = [slice(span.start // b, -(-span.stop // b)) for span, b in zip(spans, self.blocks, strict=True)]
        scales = self._spread(self._read_scales(files, grid), spans).to(out.device)
        zeros = None if self.zeros is None else self._spread(self._read_zeros(files, grid), spans).to(out.device)
        for part, block in _blocks(values, columns.start, self.blocks[-1]):
            if zeros is not None:
                part -= zeros[..., block, None]
            part *= scales[..., block, None]
        out.copy_(values)

    def _spread(self, grid: torch.Tensor, spans: Sequence[range]) -> torch.Tensor:
        """Repeat the entries of a grid along all axes but the last, until each row of the slice has its own."""
        for axis, (span, block) in enumerate(zip(spans[:-1], self.blocks[:-1], strict=True)):
            if grid.shape[axis] not in (1, len(span)):
                grid = grid.index_select(axis, torch.arange(span.start, span.stop) // block - span.start // block)
        return grid

    def _read_scales(self, files: Files, grid: Sequence[slice]) -> torch.Tensor:
        scales = _read_grid(files, self.scales, grid)
        if scales.dtype in (torch.uint8, torch.float8_e8m0fnu):
            exponents = scales.view(torch.uint8)
            if (exponents == _E8M0_NAN).any():
                raise GlobeError(
                    f"{self.scales} has a scale that is NaN (the E8M0 code {_E8M0_NAN}), so {self.codes} has no "
                    "values there; download the checkpoint again."
                )
            scales = exponents.view(torch.float8_e8m0fnu)
        scales = scales.float()
        if self.factor is None:
            return scales
        factor = files.read(self.factor.name).float().reshape(())
        return scales / factor if self.factor.divides else scales * factor

    def _read_zeros(self, files: Files, grid: Sequence[slice]) -> torch.Tensor:
        """Read zero points, which are packed along the rows: eight rows of int4 in an int32."""
        assert self.zeros is not None
        rows, columns = grid
        per_item = self.packing.values
        first = rows.start // per_item
        packed = files.view(self.zeros)[first : -(-rows.stop // per_item), columns]
        start = rows.start - first * per_item
        return self.packing.unpack(packed.T)[:, start : start + rows.stop - rows.start].T


def _read_grid(files: Files, name: str, grid: Sequence[slice]) -> torch.Tensor:
    """Read a part of the scales; their shape may lack axes at the end, along which one scale serves all values."""
    view = files.view(name)
    stored = view.get_shape()
    if not stored:
        return files.read(name).reshape((1,) * len(grid))
    # one scale of the whole tensor, or one per expert: the axis has one entry for every index
    part = view[*(wanted if size > 1 else slice(0, 1) for wanted, size in zip(grid, stored, strict=False))]
    return part.reshape(*part.shape, *(1,) * (len(grid) - part.ndim))


def _blocks(values: torch.Tensor, start: int, block: int) -> Iterator[tuple[torch.Tensor, slice]]:
    """View `values`, whose columns begin at column `start` of the weight, as (.., blocks, width), by equal widths.

    Yields each view with the columns of the grid that it takes.
    """
    count = values.shape[-1]
    head = min(-start % block, count)
    body = (count - head) // block
    taken = 0
    for first, last, width in (
        (0, head, head),
        (head, head + body * block, block),
        (head + body * block, count, count - head - body * block),
    ):
        if first < last:
            blocks = (last - first) // width
            yield values[..., first:last].unflatten(-1, (blocks, width)), slice(taken, taken + blocks)
            taken += blocks
