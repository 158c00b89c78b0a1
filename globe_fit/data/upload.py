"""Experts on their way to a GPU: in the dtype in which they are stored, while the ones before are in use."""

import torch

from globe_fit.data.source import ExpertLayer, ExpertSource


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
