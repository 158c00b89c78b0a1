"""Let the calls of a model and the changes of its experts wait for each other."""

import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from globe_kernels.errors import RequestError
from globe_kernels.locks import make_locks

PATIENCE = 60.0  # seconds that a change waits for the calls that run
_POLL = 0.001  # seconds


class Calls:
    """The calls of one model, of all threads.

    A change closes some modules: calls that arrive there wait, and the change waits for calls that are within them. A
    call leaves no note of itself, which an interrupt could make untrue: the stacks of the threads say where they are. A
    compiler sees none of this, so a compiled model must not be changed while it is called. A copy of a model has calls
    of its own.
    """

    def __init__(self):
        make_locks(self)

    def make_locks(self) -> None:
        """Start with no change and no call."""
        self._alone = threading.Lock()
        self._opened = threading.Condition()
        self._closed: frozenset[nn.Module] = frozenset()
        self._waiting: set[int] = set()

    def __reduce__(self) -> tuple:
        return Calls, ()

    def arrive(self, module: nn.Module, *_: Any) -> None:
        """Wait here, at the beginning of a call of `module`, while a change has closed it; fits as a forward hook."""
        if torch.compiler.is_compiling() or module not in self._closed:
            return
        me = threading.get_ident()
        with self._opened:
            self._waiting.add(me)
            try:
                self._opened.wait_for(lambda: module not in self._closed)
            finally:
                self._waiting.discard(me)

    @contextmanager
    def no_change(self) -> Iterator[None]:
        """Keep changes out; calls go on."""
        with self._alone:
            yield

    @contextmanager
    def change(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        """Close `modules` and wait until no other thread is within them, nor within a part of them.

        Raises RequestError when the calls of other threads do not end.
        """
        closed = frozenset(modules)
        parts = {part for module in closed for part in module.modules()}
        with self._alone:
            with self._opened:  # a thread that wakes is no longer waiting
                self._closed = closed
            try:
                self._wait_for_calls(parts)
                yield
            finally:
                with self._opened:
                    self._closed = frozenset()
                    self._opened.notify_all()

    def _wait_for_calls(self, parts: set[nn.Module]) -> None:
        deadline = time.monotonic() + PATIENCE
        while _threads_within(parts) - self._waiting - {threading.get_ident()}:
            if time.monotonic() > deadline:
                raise RequestError(
                    f"Other threads have been within calls of this model for {PATIENCE:.0f} seconds; change the model "
                    "when these calls have ended."
                )
            time.sleep(_POLL)


def _threads_within(modules: set[nn.Module]) -> set[int]:
    """Return the threads that are within a call of one of `modules`."""
    threads = set()
    for thread, frame in sys._current_frames().items():
        while frame is not None:
            # the locals of this function alone: looking at the locals of a frame keeps them in memory until it ends
            if frame.f_code.co_name == nn.Module._call_impl.__name__ and frame.f_locals.get("self") in modules:
                threads.add(thread)
                break
            frame = frame.f_back
    return threads
