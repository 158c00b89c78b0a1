"""Compare the sha256 of tensor files with the recorded hashes while the tensors are read.

SHA-256 runs at 1 to 2 GB/s per thread, faster than most disks: the hash reads the file into the page cache, from which
the tensors come. GLOBE_VERIFY=0 in the environment turns off the comparison on load.
"""

import hashlib
import os
import threading
import weakref
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from globe_kernels.errors import GlobeError
from globe_kernels.locks import make_locks

_THREADS = 4
_CHUNK = 4 * 2**20


def verifies() -> bool:
    """Whether a load compares hashes."""
    return os.environ.get("GLOBE_VERIFY", "").lower() not in {"0", "false", "no", "off"}


class Verification:
    """The comparison of the files of one directory, in threads, from the first `require` or `begin` on.

    `recorded` maps the names of files to their sha256. The files are opened at once, so that the comparison sees the
    bytes of this moment though a writer replaces the files later. Threads and forked processes may share it.
    """

    def __init__(self, directory: Path, recorded: Mapping[str, str], remedy: str):
        self._directory, self._recorded, self._remedy = directory, dict(recorded), remedy
        self._open = {name: os.open(directory / name, os.O_RDONLY) for name in recorded}
        weakref.finalize(self, _close, tuple(self._open.values()))
        self._hashes: dict[str, Future[str]] = {}
        make_locks(self)

    def make_locks(self) -> None:
        """Make the lock; a forked process has no threads that would end a hash."""
        self._lock = threading.Lock()
        self._hashes = {name: found for name, found in self._hashes.items() if found.done()}

    def begin(self) -> None:
        """Begin to hash all files."""
        with self._lock:
            left = self._open.keys() - self._hashes.keys()
            if left:
                pool = ThreadPoolExecutor(_THREADS, "globe verifies")
                self._hashes |= {name: pool.submit(_hash, self._open[name]) for name in sorted(left)}
                pool.shutdown(wait=False)

    def require(self, names: Iterable[str] | None = None) -> None:
        """Wait for the hashes of files, by default of all. Raises GlobeError for a file that has another hash."""
        self.begin()
        for name in self._recorded if names is None else names:
            found, expected = self._hashes[name].result(), self._recorded[name]
            if found != expected:
                raise GlobeError(
                    f"{self._directory / name} has sha256 {found[:12]}... and {expected[:12]}... is recorded: the file "
                    f"was changed or damaged; {self._remedy}."
                )


def _hash(descriptor: int) -> str:
    """Hash a file without its offset, which a forked process shares."""
    digest, place = hashlib.sha256(), 0
    while chunk := os.pread(descriptor, _CHUNK, place):
        digest.update(chunk)
        place += len(chunk)
    return digest.hexdigest()


def _close(descriptors: tuple[int, ...]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
