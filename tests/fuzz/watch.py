"""Watch a call on a damaged input: its time, its memory, and the files that it opens.

The right outcome is finite results, or a GlobeError of one sentence. `watched` names any other outcome.
"""

import ctypes
import faulthandler
import io
import math
import os
import resource
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch

from globe_kernels.errors import GlobeError
from tests.fuzz.mutations import OUTSIDE, SYSTEM_FILE

CPU_SECONDS = 5
_WALL_SECONDS = 15  # a call that waits takes no time of the CPU
_GROWTH = 300 * 2**20
_ADDRESSES = 4 * 2**30  # more is refused by the system: the process ends no other process
_LONGEST = 2000  # characters of a sentence
_IN_OPEN = 0x20
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink")
_REACHES_OUT = ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.exec", "pickle.find_class")


class TooLong(BaseException):
    """No `except Exception` of a library stops it."""


class _Audit:
    """What the current call does to files, as Python reports it."""

    def __init__(self):
        self.seen: list[str] | None = None
        self.outside, self.writable = "", ""
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple) -> None:
        if self.seen is None:
            return
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, int) or path is None:
                return
            name = os.path.abspath(os.fsdecode(path))
            if name.startswith(self.outside) or name == SYSTEM_FILE:
                self.seen.append(f"opens {name}")
            if isinstance(flags, int) and flags & _WRITES and not self._may_write(name):
                self.seen.append(f"writes {name}")
        elif event in _CHANGES:
            name = arguments[event == "os.symlink"]  # a link may name any file
            if isinstance(name, int):
                return
            folder = "."
            if event in ("os.remove", "os.rmdir") and arguments[1] >= 0:  # beside a folder that is open
                folder = os.readlink(f"/proc/self/fd/{arguments[1]}")
            if not self._may_write(os.path.abspath(os.path.join(folder, os.fsdecode(name)))):
                self.seen.append(f"{event} {name!r}")
        elif event in _REACHES_OUT:
            self.seen.append(f"{event} {arguments[:2]!r}")

    def _may_write(self, name: str) -> bool:
        return name == os.devnull or bool(self.writable) and name.startswith(self.writable)


_audit = _Audit()


class _Opened:
    """The files of a folder that anybody opens, also from outside of Python (inotify)."""

    def __init__(self, folder: Path):
        libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor = libc.inotify_init1(os.O_NONBLOCK)
        libc.inotify_add_watch(self._descriptor, os.fsencode(folder), _IN_OPEN)

    def any(self) -> bool:
        try:
            return bool(os.read(self._descriptor, 4096))
        except BlockingIOError:
            return False

    def close(self) -> None:
        os.close(self._descriptor)


def _peak(reset: bool = False) -> int:
    """Return the highest resident bytes since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


@contextmanager
def _limits() -> Iterator[None]:
    """End a call that takes too long, and refuse memory that no tiny input needs."""

    def stop(*_) -> None:
        raise TooLong

    kept = {number: signal.signal(number, stop) for number in (signal.SIGALRM, signal.SIGPROF)}
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _ADDRESSES, hard))
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    signal.setitimer(signal.ITIMER_REAL, _WALL_SECONDS)
    faulthandler.dump_traceback_later(4 * _WALL_SECONDS, exit=True, file=2)  # of a call that no signal reaches
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        for timer in (signal.ITIMER_PROF, signal.ITIMER_REAL):
            signal.setitimer(timer, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        for number, handler in kept.items():
            signal.signal(number, handler)


def _not_finite(value: Any, where: str = "result") -> str | None:
    """Return the place of the first number inside a result that is NaN or infinite."""
    if isinstance(value, torch.Tensor):
        broken = value.is_floating_point() and not value.is_meta and not torch.isfinite(value).all()
        return where if broken else None
    if isinstance(value, float):
        return None if math.isfinite(value) else f"{where} = {value}"
    if isinstance(value, Mapping):
        items: Any = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    elif is_dataclass(value):
        items = ((field.name, getattr(value, field.name)) for field in fields(value))
    else:
        return None
    return next((found for key, inner in items if (found := _not_finite(inner, f"{where}.{key}"))), None)


def _no_sentence(text: str) -> str | None:
    if not text.isprintable() or len(text) > _LONGEST or not text.endswith((".", "?")):
        return f"the error is no sentence: {len(text)} characters, {text[:300]!r} ... {text[-80:]!r}"
    return None


def _state(directory: Path) -> list[tuple]:
    found = []
    for entry in os.scandir(directory):
        status = entry.stat(follow_symlinks=False)
        found.append((entry.name, status.st_size, status.st_mtime_ns, status.st_ino))
    return sorted(found)


def watched(call: Callable[[], Any], directory: Path, *, writable: Path | None = None) -> tuple[str, str | None]:
    """Return (outcome, finding) of a call that reads `directory`; the finding is None for a right outcome.

    The outcome is "works" or the class of the error. A call may write below `writable` alone.
    """
    outside = directory.parent / OUTSIDE
    opened, before = _Opened(outside), _state(directory)
    _audit.outside, _audit.writable = f"{outside}{os.sep}", "" if writable is None else str(writable)
    start = _peak(reset=True)
    finding, outcome, seen = None, "works", None
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), warnings.catch_warnings(), _limits():
            warnings.simplefilter("ignore")
            _audit.seen = []
            try:
                result = call()
                finding = (place := _not_finite(result)) and f"not finite: {place}"
            except GlobeError as error:
                outcome, finding = type(error).__name__, _no_sentence(str(error))
            finally:
                seen, _audit.seen = _audit.seen, None
    except TooLong:
        outcome, finding = "hangs", "takes too long\n" + traceback.format_exc(limit=-12)
    except Exception:
        outcome, finding = "raises", traceback.format_exc(limit=-12)
    growth = _peak() - start
    was_opened = opened.any()
    opened.close()
    if seen:
        finding = f"{finding or ''}\nfiles: {'; '.join(seen[:5])}".strip()
    elif was_opened:
        finding = f"{finding or ''}\nreads a file outside of its directory".strip()
    if growth > _GROWTH:
        finding = f"{finding or ''}\ngrows by {growth >> 20} MiB".strip()
    if writable is None and finding is None and _state(directory) != before:
        finding = "changes the directory"
    return outcome, finding
