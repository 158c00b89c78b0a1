"""The bases of one layer at a time, composed one layer ahead on a side stream of the GPU.

    this stream    attention 0 | compose 0 | experts 0 | attention 1 | experts 1 | attention 2 | experts 2
    side stream                            | compose 1 ............. | compose 2 ............. |

Two buffers of (E, 2R, D) take turns for as long as a forward of the model lasts; a layer hands them to the next. A
layer takes the bases that any earlier call composed for it. A forward that stops half way, another thread or another
stream wastes a composition; results stay right.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, Protocol

import torch


class AheadLayer(Protocol):
    """A layer whose bases a call composes."""

    layer: int

    def composes_ahead(self, tokens: int) -> bool:
        """Whether a call with `tokens` tokens takes its bases from here."""
        ...

    @property
    def basis_shape(self) -> tuple[int, int, int]:
        """(E, 2R, D)"""
        ...


ComposeInto = Callable[[Any, torch.Tensor], None]  # (layer, out (E, 2R, D)), on the stream of the caller


@dataclass
class _Ahead:
    """The bases of a layer, and the buffer that the layer before still reads."""

    buffers: tuple[torch.Tensor, ...]
    whole: Any  # the event of CUDA from which on the bases are complete
    read: Any  # the event from which on the layer before has read its buffer
    side: torch.cuda.Stream

    def take(self) -> tuple[torch.Tensor, ...]:
        taken, self.buffers = self.buffers, ()
        return taken

    def __del__(self):
        # nobody waited for the side stream: the memory may be given away only when that stream is done with it
        for buffer in self.buffers:
            buffer.record_stream(self.side)


@lru_cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class ScratchBuffers:
    """The buffers of the layers of one device, which are given in the order in which they run."""

    def __init__(self, layers: Sequence[AheadLayer], compose_into: ComposeInto):
        self._compose_into = compose_into
        self._following = {layer.layer: following for layer, following in pairwise(layers)}
        self._largest = max(layer.basis_shape for layer in layers)  # layers differ in E alone
        self._ahead: dict[int, _Ahead] = {}  # layer id -> its bases, composed ahead

    def can_run(self, hidden_states: torch.Tensor) -> bool:
        """Whether a side stream may be used: a compiler or a CUDA graph wants every stream that it forks joined."""
        if torch.compiler.is_compiling() or not hidden_states.is_cuda:
            return False
        return not torch.cuda.is_current_stream_capturing()

    def run(
        self, layer: AheadLayer, hidden_states: torch.Tensor, experts: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """Return experts(bases of `layer`); compose the next layer meanwhile, when its call will want bases too."""
        device = hidden_states.device
        stream, side = torch.cuda.current_stream(device), _side_stream(device)
        ahead = self._ahead.pop(layer.layer, None)
        if ahead is None:
            bases, other = (hidden_states.new_empty(self._largest) for _ in range(2))
            free = stream.record_event()  # whoever had this memory before had it on this stream
            self._compose_into(layer, bases[: layer.basis_shape[0]])
        else:
            (bases, other), free = ahead.take(), ahead.read
            stream.wait_event(ahead.whole)
            for buffer in (bases, other):
                buffer.record_stream(stream)  # the layer before may have run on another stream
        out = experts(bases[: layer.basis_shape[0]])
        following = self._following.get(layer.layer)
        if following is not None and following.composes_ahead(hidden_states.shape[0]):
            read = stream.record_event()
            side.wait_event(free)
            found = _Ahead((other, bases), None, read, side)  # first: composing may fail with half of it launched
            with torch.cuda.stream(side):
                self._compose_into(following, other[: following.basis_shape[0]])
            found.whole = side.record_event()
            self._ahead[following.layer] = found
        return out

    def forget(self) -> None:
        """Drop bases that no layer came for; call this when banks, codes or dtypes change."""
        self._ahead.clear()

    def __getstate__(self) -> dict:
        # a copy of the model starts with nothing composed; events cannot be copied
        return self.__dict__ | {"_ahead": {}}
