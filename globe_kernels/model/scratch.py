"""The bases of one layer at a time, composed one layer ahead on a side stream of the GPU.

    this stream    attention 0 | compose 0 | experts 0 | attention 1 | experts 1 | attention 2 | experts 2
    side stream                            | compose 1 ............. | compose 2 ............. |

Two buffers of (E, 2R, D) take turns, for as long as a forward of the model lasts. They are handed from layer to layer:
what a layer finds composed is its own, whoever asked for it, so that a forward that stops half way, another thread or
another stream costs a composition and never a wrong result.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, Protocol

import torch


class Layer(Protocol):
    """What can be composed."""

    layer: int

    def path(self, tokens: int) -> str: ...

    @property
    def basis_shape(self) -> tuple[int, int, int]: ...

    def compose_into(self, out: torch.Tensor) -> None: ...


@dataclass
class _Ahead:
    """The bases of a layer, whole from an event on, and the buffer that the layer before reads until another."""

    buffers: tuple[torch.Tensor, ...]
    whole: Any  # an event of CUDA
    read: Any
    side: torch.cuda.Stream

    def take(self) -> tuple[torch.Tensor, ...]:
        taken, self.buffers = self.buffers, ()
        return taken

    def __del__(self):
        # nobody waited for the side stream: its memory may be given away when that is done, and not before
        for buffer in self.buffers:
            buffer.record_stream(self.side)


@lru_cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class Scratch:
    """Of the layers of a model, in the order in which they run."""

    def __init__(self, layers: Sequence[Layer]):
        self._following = {one.layer: other for one, other in pairwise(layers)}
        self._sizes = max(one.basis_shape for one in layers)  # layers differ in E alone
        self._ahead: dict[int, _Ahead] = {}  # layer id -> what was composed for it

    def can_run(self, hidden_states: torch.Tensor) -> bool:
        """Not what a compiler or a CUDA graph records: these want every stream that they fork joined inside."""
        if torch.compiler.is_compiling() or not hidden_states.is_cuda:
            return False
        return not torch.cuda.is_current_stream_capturing()

    def run(
        self, layer: Layer, hidden_states: torch.Tensor, experts: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """experts(bases of `layer`); the next layer is composed meanwhile, when it will take this path too."""
        device = hidden_states.device
        stream, side = torch.cuda.current_stream(device), _side_stream(device)
        ahead = self._ahead.pop(layer.layer, None)
        if ahead is None:
            own, other = (hidden_states.new_empty(self._sizes) for _ in range(2))
            free = stream.record_event()  # what had this memory before did so on this stream
            layer.compose_into(own[: layer.basis_shape[0]])
        else:
            (own, other), free = ahead.take(), ahead.read
            stream.wait_event(ahead.whole)
            for buffer in (own, other):
                buffer.record_stream(stream)  # which need not be that of the layer before
        out = experts(own[: layer.basis_shape[0]])
        following = self._following.get(layer.layer)
        if following is not None and following.path(hidden_states.shape[0]) == "scratch":
            read = stream.record_event()
            side.wait_event(free)
            found = _Ahead((other, own), None, read, side)  # first: composing may fail with half of it launched
            with torch.cuda.stream(side):
                following.compose_into(other[: following.basis_shape[0]])
            found.whole = side.record_event()
            self._ahead[following.layer] = found
        return out

    def forget(self) -> None:
        """What was composed for a layer that did not come, as one must when banks, codes or dtypes change."""
        self._ahead.clear()

    def __getstate__(self) -> dict:
        # a copy of the model starts with nothing composed; events cannot be copied
        return self.__dict__ | {"_ahead": {}}
