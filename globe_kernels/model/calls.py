"""Let the calls of a model and the changes to its experts wait for each other."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from globe_kernels.errors import RequestError
from globe_kernels.locks import make_locks

PATIENCE = 60.0  # seconds that a change waits for the calls that run


class Calls:
    """The threads that are within a call of one model.

    A change waits for the calls of other threads, and calls wait for a change. A compiler sees none of this: a compiled
    model must not be changed while it is called. A copy of a model has calls of its own.
    """

    def __init__(self):
        make_locks(self)

    def make_locks(self) -> None:
        self._condition = threading.Condition()
        self._running: set[int] = set()
        self._changer: int | None = None

    def __reduce__(self) -> tuple:
        return Calls, ()

    def _begin(self, *_: Any) -> None:
        if torch.compiler.is_compiling():
            return
        me = threading.get_ident()
        with self._condition:
            self._running.discard(me)  # of a call that an interrupt ended, for which torch calls no hook
            self._condition.notify_all()
            self._condition.wait_for(lambda: self._changer in (None, me))
            self._running.add(me)

    def _end(self, *_: Any) -> None:
        if torch.compiler.is_compiling():
            return
        with self._condition:
            self._running.discard(threading.get_ident())
            self._condition.notify_all()

    def watch(self, model: nn.Module) -> list[Any]:
        """Count each forward of `model` as a call; return the handles of the hooks."""
        return [
            model.register_forward_pre_hook(self._begin),
            model.register_forward_hook(self._end, always_call=True),
        ]

    @contextmanager
    def one(self) -> Iterator[None]:
        """Be a call, or a part of the call that this thread is in."""
        if threading.get_ident() in self._running:
            yield
            return
        self._begin()
        try:
            yield
        finally:
            self._end()

    @contextmanager
    def none(self) -> Iterator[None]:
        """Be a change. Raises RequestError when calls of other threads do not end."""
        me = threading.get_ident()
        with self._condition:
            self._condition.wait_for(lambda: self._changer is None)
            self._changer = me
        try:
            with self._condition:
                if not self._condition.wait_for(lambda: not self._running - {me}, PATIENCE):
                    raise RequestError(
                        f"Other threads have been within calls of this model for {PATIENCE:.0f} seconds; change the "
                        "model when these calls have ended."
                    )
            yield
        finally:
            with self._condition:
                self._changer = None
                self._condition.notify_all()
