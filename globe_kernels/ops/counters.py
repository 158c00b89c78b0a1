"""Count how often each op ran: a test, or a user, can prove which op produced a result."""

from collections import Counter

_calls: Counter[str] = Counter()


def count_call(op: str) -> None:
    _calls[op] += 1


def call_counts() -> dict[str, int]:
    """Return {name of the op: times it ran in this process}."""
    return dict(_calls)
