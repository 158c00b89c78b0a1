"""End work by a signal: Ctrl-C raises KeyboardInterrupt, SIGTERM raises its subclass Terminated."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from globe_kernels.errors import GlobeError

_REPEATS = 5.0  # seconds in which another SIGTERM is the same wish: `timeout` sends two


class Terminated(KeyboardInterrupt):
    """SIGTERM, by which a scheduler ends a job: work ends as it does after Ctrl-C."""


class Interrupted(GlobeError):
    """Ctrl-C or SIGTERM: the sentence says where the same command goes on."""

    def __init__(self, stopped: KeyboardInterrupt):
        super().__init__(f"{str(stopped) or 'interrupted'}.")
        self.exit_code = 128 + (signal.SIGTERM if isinstance(stopped, Terminated) else signal.SIGINT)


@contextmanager
def terminating() -> Iterator[list[float]]:
    """Let SIGTERM raise Terminated inside, where it would end the process: files that are half written are removed.

    Yields the times of the signals. A handler of the caller stays in its place. Another thread than the main thread can
    set no handler.
    """
    times: list[float] = []
    if not in_main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield times
        return

    def terminate(*_) -> None:
        now = time.monotonic()
        if not times or now - times[-1] >= _REPEATS:
            times.append(now)
            raise Terminated

    signal.signal(signal.SIGTERM, terminate)
    try:
        yield times
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
