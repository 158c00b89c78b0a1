"""Write files that appear whole or not at all, and let a directory have a single writer.

A set of files has a switch: the file that names the others, which is written last. Tensor files get names that the old
set does not have, so the old set stays whole until the new switch takes the place of the old in one atomic rename.
"""

import errno
import math
import mmap
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from filecmp import cmp
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import save_file

from globe_kernels.errors import GlobeError, RequestError
from globe_kernels.format.files import sha256
from globe_kernels.format.names import LOCK_NAME, PLACED_NAME, STAGING_NAME
from globe_kernels.units import format_bytes

MAX_SHARD_BYTES = 4 * 2**30


@contextmanager
def only_writer(directory: Path) -> Iterator[None]:
    """Be the only writer of `directory`, over all processes, containers and hosts that share its disk.

    The same thread may enter again. The kernel holds the lock and ends it with the process, so no lock outlives a
    writer that was killed; its file stays then, and tells that a writer was here. A file system without locks gets a
    marker file in place of the lock. Raises RequestError while another writer is at work.
    """
    created = not directory.exists()
    require_writable(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        path = directory.resolve() / LOCK_NAME  # one lock for all names of the directory
        lock = FileLock(path, timeout=0, is_singleton=True)
        lock.acquire()
        own = path.stat()
    except Timeout:
        raise RequestError(
            f"Another command is writing to {directory}; wait until that command ends, or give another directory."
        ) from None
    except OSError as error:
        raise _as_user_error(error, directory) from error
    try:
        yield
    finally:
        with suppress(OSError):  # somebody else removed the directory
            is_own = os.path.samestat(path.stat(), own)  # and no lock of a writer after that removal
            if is_own and lock.lock_counter == 1:  # the outermost
                path.unlink()
            if created and not any(directory.iterdir()):
                directory.rmdir()
        lock.release()


@contextmanager
def staged_directory(
    target: Path, *, switch: str, stems: Iterable[str], optional: Iterable[str] = (), shared: Iterable[str] = ()
) -> Iterator[Path]:
    """Write a set of files into `target` so that a failure or a kill leaves the old set or the new set, each whole.

    Yields an empty staging directory on the same file system. On success its files, also in folders, are synced and
    renamed into `target`, the file named `switch` last. Files that the switch names have names that the old set does
    not have: `stems` are the stems of their `ShardWriter`. Such files and the `optional` files of the old set are
    removed if the new set lacks them; other files of `target` stay. `shared` are files that both sets have by one name,
    such as a tokenizer: where such a file differs, the old switch goes before the first rename, and a kill then leaves
    no set.
    """
    with only_writer(target):
        staging = target / STAGING_NAME
        try:
            _remove(staging)  # of a writer that was killed
            staging.mkdir()
            yield staging
            files = {path.relative_to(staging): path for path in staging.rglob("*") if path.is_file()}
            _require_places(target, files)
            mode = staging.stat().st_mode & 0o666  # safetensors writes files that only their owner can read
            for path in files.values():
                path.chmod(mode)
                _sync(path)
            if any(_differ(staging / name, target / name) for name in shared):
                (target / switch).unlink(missing_ok=True)
            # if a kill ends the writer from here on, the next writer knows these files as its own
            (staging / PLACED_NAME).write_text("\n".join({name.parts[0] for name in files}), encoding="utf-8")
            for name, path in sorted(files.items(), key=lambda item: (str(item[0]) == switch, item[0])):
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, target / name)
            for folder in {folder for name in files for folder in name.parents}:
                _sync(target / folder)
            old = {name for stem in stems for name in _written_files(target, stem)}.union(optional)
            for name in old - {str(name) for name in files}:
                (target / name).unlink(missing_ok=True)
        except (OSError, SafetensorError) as error:
            raise _as_user_error(error, target) from error
        finally:
            _remove(staging)


def _require_places(target: Path, files: Iterable[Path]) -> None:
    """Raise RequestError where a directory is in the place of a file or the reverse."""
    for name in files:
        if (target / name).is_dir():
            raise RequestError(f"{target / name} is a directory and a file must go there; move the directory.")
        for folder in name.parents:
            if (target / folder).is_file():
                raise RequestError(f"{target / folder} is a file and a directory must go there; move the file.")


def _differ(new: Path, old: Path) -> bool:
    return new.is_file() and old.is_file() and not cmp(new, old, shallow=False)


def _remove(path: Path) -> None:
    """Remove a file or a folder; of a link, the link."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def replacing_file(target: Path) -> Iterator[Path]:
    """Write one file so that a failure or a kill leaves `target` as it was.

    Yields the path of a new, empty file beside `target`, hidden, so that a directory of nothing else counts as empty;
    it gets the name `target` once it is on the disk. Nothing that is at this path before is followed or kept.
    """
    temporary = target.with_name(f".{target.name}.partial")
    try:
        temporary.unlink(missing_ok=True)
        temporary.open("x").close()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)
        _sync(temporary)
        os.replace(temporary, target)
        _sync(target.parent)
    except (OSError, SafetensorError) as error:
        raise _as_user_error(error, target) from error
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _as_user_error(error: Exception, target: Path) -> GlobeError:
    # safetensors reports a full disk by a sentence alone
    full = (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)) or "os error 28" in str(error)
    if full:
        return GlobeError(
            f"The disk that holds {target} has no room for the new files ({format_bytes(_free(target))} free without "
            "them): nothing was written and the old files are unchanged; free some space or give another output "
            "directory."
        )
    return GlobeError(f"Writing to {target} failed ({error}); mend the cause and run the same command again.")


def _free(target: Path) -> int:
    return shutil.disk_usage(_existing(target)).free


def _existing(target: Path) -> Path:
    return next(path for path in (target, *target.absolute().parents) if path.exists())


def require_writable(target: Path) -> None:
    """Raise RequestError for a path that is no directory and can become none, or that may not be written."""
    existing = _existing(target)
    if link := next((path for path in (target, *target.parents) if path.is_symlink() and not path.exists()), None):
        raise RequestError(
            f"{link} is a link to {link.readlink()}, which does not exist; make that directory, or give another."
        )
    if not existing.is_dir():
        raise RequestError(f"{existing} is a file; give the path of a directory to write into.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise RequestError(f"Cannot write to {existing}: permission denied; give a directory you may write to.")


def require_room(target: Path, needed: int) -> None:
    """Refuse before the work, not after it, when `needed` bytes do not fit into directory `target`.

    Raises RequestError for a path that cannot be written, GlobeError for a disk without room.
    """
    require_writable(target)
    if (free := _free(target)) < needed:
        raise GlobeError(
            f"Writing to {target} needs {format_bytes(needed)} and {format_bytes(free)} are free; free some space or "
            "give another output directory."
        )


def mapped_tensor(folder: Path, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor in a file without a name on the disk of `folder`: its pages give way when memory is short.

    The file goes with the tensor, or with the process. Raises GlobeError for a full disk.
    """
    size = math.prod(shape) * dtype.itemsize
    if size == 0:
        return torch.empty(shape, dtype=dtype)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            if hasattr(os, "posix_fallocate"):  # a write into a hole of a full disk would be a signal, no error
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
            return torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=dtype).view(shape)
    except OSError as error:
        raise _as_user_error(error, folder) from error


class ShardWriter:
    """Write named tensors to `stem.safetensors`, or to `stem-00001-of-0000N.safetensors` above 4 GiB.

    The files are written into `staging`, for the directory `target`: where `target` has other content by a name, the
    name gets the first digits of the file's sha256. At most one shard of tensors is in memory. Give one entry of
    metadata: safetensors writes several entries in random order, and the bytes would not be reproducible.
    """

    def __init__(self, staging: Path, target: Path, stem: str, metadata: dict[str, str]):
        self.stem, self.metadata = stem, metadata
        self.total_bytes = 0
        self.sha256: dict[str, str] = {}  # {file name: sha256} after `finish`
        self.staging, self._target = staging, target
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[tuple[Path, str, list[str]]] = []  # file, sha256, names of the tensors

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Add a tensor to the current shard; write the shard first when the tensor does not fit into it."""
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > MAX_SHARD_BYTES:
            self._flush()
        self._pending[name] = tensor.contiguous()
        self._pending_bytes += size
        self.total_bytes += size

    def _flush(self) -> None:
        path = self.staging / f"{self.stem}.{len(self._shards)}.partial"
        save_file(self._pending, path, metadata=self.metadata)
        self._shards.append((path, sha256(path), list(self._pending)))  # its bytes are in memory still
        self._pending, self._pending_bytes = {}, 0

    def finish(self) -> dict[str, str]:
        """Write the last shard and give all shards their final names; return {tensor name: file name}."""
        if self._pending:
            self._flush()
        count = len(self._shards)
        weight_map = {}
        for number, (path, digest, names) in enumerate(self._shards, start=1):
            part = "" if count == 1 else f"-{number:05d}-of-{count:05d}"
            final = place_beside(path, self._target, f"{self.stem}{part}", ".safetensors", digest)
            self.sha256[final] = digest
            weight_map |= dict.fromkeys(names, final)
        return weight_map


def place_beside(staged: Path, target: Path, stem: str, suffix: str, digest: str) -> str:
    """Give a staged file with this sha256 a name that no other content in `target` has: stem and suffix where free."""
    usual = target / f"{stem}{suffix}"
    is_free = not usual.exists() or (usual.is_file() and cmp(staged, usual, shallow=False))
    name = usual.name if is_free else f"{stem}-{digest[:8]}{suffix}"
    staged.rename(staged.with_name(name))
    return name


def _written_files(target: Path, stem: str) -> set[str]:
    """Return the names of files in `target` that a ShardWriter of this stem has written, and of its indexes."""
    pattern = re.compile(re.escape(stem) + r"(-\d{5}-of-\d{5})?(-[0-9a-f]{8})?\.safetensors(\.index\.json)?")
    return {path.name for path in target.iterdir() if pattern.fullmatch(path.name) and not path.is_dir()}
