"""Files that appear whole or not at all: staged directories and sharded safetensors."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from globe_kernels.errors import GlobeError, RequestError

MAX_SHARD_BYTES = 4 * 2**30
_STAGING_PREFIX = ".staging-"


@contextmanager
def staged_directory(target: Path, *, last: str) -> Iterator[Path]:
    """Write a set of files into `target` so that a failure leaves `target` as it was.

    Yields an empty staging directory on the same file system. On success its files are synced and renamed into
    `target`. The file named `last` makes the set valid: the old one goes before the first rename and the new one
    comes after all others, so a process killed in between leaves a directory that is refused, never a mixture. On
    any failure before that the staging directory is removed; what a killed process left is removed by the next writer.
    """
    require_room(target, 0)
    created = not target.exists()
    staging = target / f"{_STAGING_PREFIX}{os.getpid()}"
    try:
        target.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
        yield staging
        for path in staging.iterdir():
            if (target / path.name).is_dir():
                raise RequestError(f"{target / path.name} is a directory and a file must go there; move it away.")
            path.chmod(0o666 & ~_umask())  # safetensors writes files that only their owner can read
            _sync(path)
        (target / last).unlink(missing_ok=True)
        for path in sorted(staging.iterdir(), key=lambda path: path.name == last):
            os.replace(path, target / path.name)
        _sync(target)
    except (OSError, SafetensorError) as error:
        raise _as_user_error(error, target) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if created and target.exists() and not any(target.iterdir()):
            target.rmdir()


@contextmanager
def replacing_file(target: Path) -> Iterator[Path]:
    """Write one file: yields another name beside it, and gives it its own once it is on the disk. After a failure or a
    kill `target` is what it was."""
    temporary = target.with_name(f"{target.name}.partial")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, target)
        _sync(target.parent)
    except (OSError, SafetensorError) as error:
        raise _as_user_error(error, target) from error
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _as_user_error(error: Exception, target: Path) -> GlobeError:
    full = (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)) or "os error 28" in str(error)
    if full:
        return GlobeError(
            f"The disk that holds {target} is full ({_free(target)} bytes free): nothing was written and what was "
            "there is unchanged; free some space or give another output directory."
        )
    return GlobeError(f"Writing to {target} failed ({error}); mend the cause and run the same command again.")


def _free(target: Path) -> int:
    existing = next(path for path in (target, *target.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def require_room(target: Path, needed: int) -> None:
    """Refuse before the work, not after it, when `needed` bytes cannot be written into directory `target`."""
    existing = next(path for path in (target, *target.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise RequestError(f"{existing} is a file; give the path of a directory to write into.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise RequestError(f"Cannot write to {existing}: permission denied; give a directory you may write to.")
    for stale in target.glob(f"{_STAGING_PREFIX}*"):
        if not _is_running(stale.name.removeprefix(_STAGING_PREFIX)):
            shutil.rmtree(stale, ignore_errors=True)
    if (free := _free(target)) < needed:
        raise GlobeError(
            f"Writing to {target} needs {needed} bytes and {free} are free; free some space or give another "
            "output directory."
        )


def _is_running(pid: str) -> bool:
    """Whether a process with that id lives: its staging directory is then in use."""
    try:
        os.kill(int(pid), 0)
    except PermissionError:
        return True
    except (ValueError, OSError):
        return False
    return int(pid) != os.getpid()


def holds_only_staging(directory: Path) -> bool:
    """Whether a directory is empty but for what a writer, running or killed, has staged."""
    return all(path.name.startswith(_STAGING_PREFIX) for path in directory.iterdir())


def read_json(path: Path, remedy: str) -> dict:
    """The JSON object in a file. Raises GlobeError, ending in what to do (`remedy`), when it holds something else."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise GlobeError(f"{path} is not valid JSON ({error}); {remedy}.") from error
    if not isinstance(data, dict):
        raise GlobeError(f"{path} holds a {type(data).__name__} and an object was expected; {remedy}.")
    return data


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class ShardWriter:
    """Writes named tensors to `stem.safetensors`, or to `stem-00001-of-0000N.safetensors` above 4 GiB.

    At most one shard of tensors is held in memory. One entry of metadata keeps the bytes reproducible:
    safetensors writes several in random order.
    """

    def __init__(self, directory: Path, stem: str, metadata: dict[str, str]):
        self.directory, self.stem, self.metadata = directory, stem, metadata
        self.total_bytes = 0
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[tuple[Path, list[str]]] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > MAX_SHARD_BYTES:
            self._flush()
        self._pending[name] = tensor.contiguous()
        self._pending_bytes += size
        self.total_bytes += size

    def _flush(self) -> None:
        path = self.directory / f"{self.stem}.{len(self._shards)}.partial"
        save_file(self._pending, path, metadata=self.metadata)
        self._shards.append((path, list(self._pending)))
        self._pending, self._pending_bytes = {}, 0

    def finish(self) -> dict[str, str]:
        """Write what is pending and give the shards their final names; returns {tensor name: file name}."""
        if self._pending:
            self._flush()
        count = len(self._shards)
        weight_map = {}
        for number, (path, names) in enumerate(self._shards, start=1):
            final = f"{self.stem}.safetensors"
            if count > 1:
                final = f"{self.stem}-{number:05d}-of-{count:05d}.safetensors"
            path.rename(self.directory / final)
            weight_map |= dict.fromkeys(names, final)
        return weight_map
