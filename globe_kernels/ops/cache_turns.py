"""Let the calls that share a cache take turns, and find the cache of a call by a number.

The pool of a cache only remembers: the result of a layer does not depend on it. So the op takes the number of a cache
in place of its tensors, and stands for a function of its other arguments. A compiler that saw tensors which the op
writes would be free to give the op copies of them and to write these back later, when another thread has changed the
cache meanwhile; a number it passes on. For the same reason the lock is taken within the op: neither a compiler nor a
captured graph can leave it out or stretch it over several layers.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import count
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch

from globe_kernels.ops.cache_lookup import CacheState


class Cache(Protocol):
    """A cache as a call takes it: globe_kernels.model.cache.BasisCache."""

    number: int
    pool: torch.Tensor  # (slots, 2R, D)
    slot_of: torch.Tensor  # (n,)

    def turn(self) -> AbstractContextManager[CacheState]:
        """Wait for the other users of the cache, and be the only user until the end of the block."""
        ...


_NUMBERS = count()
_CACHES: WeakValueDictionary[int, Cache] = WeakValueDictionary()


def give_number(cache: Cache) -> int:
    """Return a number that no other cache of this process has, and by which `turn_of` finds `cache`."""
    number = next(_NUMBERS)
    _CACHES[number] = cache
    return number


def turn_of(number: int) -> AbstractContextManager[CacheState]:
    """Take the turn of the cache with this number. Raises RuntimeError when it is gone."""
    cache = _CACHES.get(number)
    if cache is None:
        raise RuntimeError(
            f"Cache {number} of composed bases is gone: the strategy of the model was changed after this call was "
            "compiled or exported; compile it again."
        )
    return cache.turn()


class LastUse:
    """The last use of a cache on its GPU, for which uses on other streams wait; the host never waits.

    A capture of a CUDA graph may not wait for work outside of it, and outside nothing can wait for a replay: replays
    are ordered by whoever starts them, as for the tensors of the graph.
    """

    def __init__(self):
        self._event: Any = None  # a torch.cuda.Event

    @contextmanager
    def before(self, device: torch.device) -> Iterator[None]:
        """Wait for the last use, and make the block the last use, on the current stream of `device`."""
        if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
            yield
            return
        stream = torch.cuda.current_stream(device)
        if self._event is not None:
            stream.wait_event(self._event)
        try:
            yield
        finally:
            self._event = stream.record_event(self._event)
