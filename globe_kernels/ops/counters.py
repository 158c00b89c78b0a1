"""Count how often each op ran: a test, or a user, can prove which op produced a result."""

from collections import Counter
from threading import Lock

from globe_kernels.locks import make_locks


class _Counts:
    def __init__(self):
        self.calls: Counter[str] = Counter()
        make_locks(self)

    def make_locks(self) -> None:
        self.lock = Lock()


_counts = _Counts()


def count_call(op: str) -> None:
    with _counts.lock:
        _counts.calls[op] += 1


def call_counts() -> dict[str, int]:
    """Return {name of the op: times it ran in this process}."""
    with _counts.lock:
        return dict(_counts.calls)
