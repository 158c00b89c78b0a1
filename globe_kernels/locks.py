"""Make locks anew in a forked process: a lock that another thread held at the fork would stay held for ever."""

import os
import weakref
from typing import Any, Protocol


class HasLocks(Protocol):
    """An object that owns locks."""

    def make_locks(self) -> None:
        """Make locks that nobody holds."""
        ...


_OWNERS: "weakref.WeakSet[Any]" = weakref.WeakSet()


def make_locks(owner: HasLocks) -> None:
    """Make the locks of `owner` now, and again in every process that is forked from this process."""
    owner.make_locks()
    _OWNERS.add(owner)


def _make_all() -> None:
    for owner in list(_OWNERS):
        owner.make_locks()


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_make_all)
