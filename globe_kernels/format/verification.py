"""Compare the sha256 of tensor files with the recorded hashes while the tensors are read.

SHA-256 runs at 1 to 2 GB/s per thread, faster than most disks: the hash reads the file into the page cache, from which
the tensors come. GLOBE_VERIFY=0 in the environment turns every comparison off.
"""

import hashlib
import os
import weakref
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from io import BufferedReader
from pathlib import Path

from globe_kernels.errors import GlobeError

_THREADS = 4


class Verification:
    """The comparison of the files of one directory, in threads, from the first `require` or `begin` on.

    `recorded` maps the names of files to their sha256. The files are opened at once, so that the comparison sees the
    bytes of this moment though a writer replaces the files later.
    """

    def __init__(self, directory: Path, recorded: Mapping[str, str], remedy: str, *, enabled: bool = True):
        self._directory, self._remedy = directory, remedy
        self._enabled = enabled and os.environ.get("GLOBE_VERIFY") != "0"
        self._recorded = dict(recorded)
        self._open = {name: (directory / name).open("rb") for name in recorded} if self._enabled else {}
        self._found: dict[str, Future[str]] = {}
        weakref.finalize(self, _close, tuple(self._open.values()))

    def begin(self) -> None:
        """Begin to hash all files."""
        if self._open:
            pool = ThreadPoolExecutor(_THREADS, "globe verifies")
            self._found = {name: pool.submit(_hash, file) for name, file in self._open.items()}
            self._open = {}
            pool.shutdown(wait=False)

    def require(self, names: Iterable[str] | None = None) -> None:
        """Wait for the hashes of files, by default of all. Raises GlobeError for a file that has another hash."""
        if not self._enabled:
            return
        self.begin()
        for name in self._recorded if names is None else names:
            found, expected = self._found[name].result(), self._recorded[name]
            if found != expected:
                raise GlobeError(
                    f"{self._directory / name} has sha256 {found[:12]}... and {expected[:12]}... is recorded: the file "
                    f"was changed or damaged; {self._remedy}."
                )


def _close(files: tuple[BufferedReader, ...]) -> None:
    for file in files:
        file.close()


def _hash(file: BufferedReader) -> str:
    with file:
        return hashlib.file_digest(file, "sha256").hexdigest()
