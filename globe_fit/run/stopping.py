"""End work by a signal: Ctrl-C raises KeyboardInterrupt, SIGTERM raises its subclass Terminated."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from globe_kernels.errors import GlobeError

_REPEATS = 5.0  # seconds in which another SIGTERM is the same wish: `timeout` sends two
_USUAL = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
_received: list[int] = []  # signals inside `terminating`


class Terminated(KeyboardInterrupt):
    """SIGTERM, by which a scheduler ends a job: work ends as it does after Ctrl-C."""


class Interrupted(GlobeError):
    """Ctrl-C or SIGTERM: the sentence says where the same command goes on."""

    def __init__(self, stopped: KeyboardInterrupt):
        super().__init__(f"{str(stopped) or 'interrupted'}.")
        self.exit_code = 128 + (signal.SIGTERM if isinstance(stopped, Terminated) else signal.SIGINT)


def interrupt(number: float) -> KeyboardInterrupt:
    """Return the exception of a signal."""
    return Terminated() if number == signal.SIGTERM else KeyboardInterrupt()


def interrupt_behind(error: BaseException) -> KeyboardInterrupt | None:
    """Return the interrupt that has ended work by `error`; None for another end.

    A signal may raise its exception inside a C function that puts an error of its own in the place of the exception.
    """
    if isinstance(error, KeyboardInterrupt) and (str(error) or not _received):
        return error
    return interrupt(_received[0]) if _received else None


@contextmanager
def terminating() -> Iterator[None]:
    """Let SIGTERM raise Terminated inside, where it would end the process: files that are half written are removed.

    A handler of the caller stays in its place. Another thread than the main thread can set no handler.
    """
    usual = {number: handler for number, handler in _USUAL.items() if in_main_thread()}
    usual = {number: handler for number, handler in usual.items() if signal.getsignal(number) == handler}
    latest = 0.0

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal latest
        now = time.monotonic()
        if number == signal.SIGINT or now - latest >= _REPEATS or not _received:
            latest = now
            _received.append(number)
            raise interrupt(number)

    if usual:
        _received.clear()
    for number in usual:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
        if usual:
            _received.clear()


def in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
