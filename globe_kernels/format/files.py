"""Write files that appear whole or not at all: staged directories and sharded safetensors."""

import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from globe_kernels.errors import GlobeError, RequestError
from globe_kernels.units import format_bytes

MAX_SHARD_BYTES = 4 * 2**30
_STAGING_PREFIX = ".staging-"
_UMASK = os.umask(0)  # of the process; there is no other way to read it than to set it
os.umask(_UMASK)
_MOST_LEVELS = 100  # of values in values of a JSON file


@contextmanager
def staged_directory(target: Path, *, last: str) -> Iterator[Path]:
    """Write a set of files into `target` so that a failure leaves `target` as it was.

    Yields an empty staging directory on the same file system. On success its files, also in folders, are synced and
    renamed into `target`. The file named `last` makes the set valid: the old file of this name goes before the first
    rename, the new file comes after all others, so a process killed in between leaves a directory that loaders refuse,
    never a mixture. Other files of `target` stay, also in folders. A failure before the renames removes the staging
    directory; the next writer removes the staging of a killed process.
    """
    require_room(target, 0)
    created = not target.exists()
    staging = target / f"{_STAGING_PREFIX}{os.getpid()}"
    try:
        target.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
        yield staging
        files = {path.relative_to(staging): path for path in staging.rglob("*") if path.is_file()}
        for name, path in files.items():
            if (target / name).is_dir():
                raise RequestError(f"{target / name} is a directory and a file must go there; move the directory.")
            for folder in name.parents:
                if (target / folder).is_file():
                    raise RequestError(f"{target / folder} is a file and a directory must go there; move the file.")
            path.chmod(0o666 & ~_UMASK)  # safetensors writes files that only their owner can read
            _sync(path)
        (target / last).unlink(missing_ok=True)
        for name, path in sorted(files.items(), key=lambda item: str(item[0]) == last):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target / name)
        for folder in {folder for name in files for folder in name.parents}:
            _sync(target / folder)
    except (OSError, SafetensorError) as error:
        raise _as_user_error(error, target) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if created and target.exists() and not any(target.iterdir()):
            target.rmdir()


@contextmanager
def replacing_file(target: Path) -> Iterator[Path]:
    """Write one file so that a failure or a kill leaves `target` as it was.

    Yields a temporary path beside `target`; the file gets the name `target` once it is on the disk.
    """
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
            f"The disk that holds {target} is full ({format_bytes(_free(target))} free): nothing was written and the "
            "old files are unchanged; free some space or give another output directory."
        )
    return GlobeError(f"Writing to {target} failed ({error}); mend the cause and run the same command again.")


def _free(target: Path) -> int:
    existing = next(path for path in (target, *target.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def require_room(target: Path, needed: int) -> None:
    """Refuse before the work, not after it, when `needed` bytes do not fit into directory `target`.

    Raises RequestError for a path that cannot be written, GlobeError for a disk without room.
    """
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
            f"Writing to {target} needs {format_bytes(needed)} and {format_bytes(free)} are free; free some space or "
            "give another output directory."
        )


def _is_running(pid: str) -> bool:
    """Tell whether another process with this id lives, so that its staging directory is in use."""
    try:
        os.kill(int(pid), 0)
    except PermissionError:
        return True
    except (ValueError, OSError):
        return False
    return int(pid) != os.getpid()


def repository_of(directory: Path) -> Path | None:
    """Return the folder of a model in the cache of the Hub, of which `directory` is a snapshot; None elsewhere."""
    resolved = directory.resolve()
    for folder in resolved.parents:
        if folder.name == "snapshots" and folder.parent.name.startswith("models--"):
            return folder.parent
    return None


def inner_file(directory: Path, name: str) -> Path:
    """Return the path of the file `name` of a directory, a name that an index or another file states.

    Raises GlobeError when the name or a link leads out of the directory: a file of others would be read, and uploaded
    with an export. A snapshot in the cache of the Hub links into the blobs of its model, which are its own files.
    """
    path, root = directory / name, directory.resolve()
    repository = repository_of(directory)
    homes = [root] if repository is None else [root, repository / "blobs"]
    try:
        resolved = path.resolve()
        path.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # too long, a link to itself, a NUL
        raise GlobeError(
            f"{directory} names the file {name}, which no path can be ({error}); restore the file."
        ) from error
    if not Path(name).is_absolute() and ".." not in Path(name).parts:
        if any(resolved.is_relative_to(home) for home in homes):
            return path
        name = f"{name}, a link to {resolved}"
    raise GlobeError(
        f"{directory} names the file {name}, which is outside of the directory; GloBE reads the files of a model and "
        "of a checkpoint from its own directory alone, so copy the file there."
    )


def read_json(path: Path, remedy: str, *, finite: bool = False) -> dict:
    """Read the JSON object in a file. Raises GlobeError, which ends in `remedy`, when the file holds anything else.

    `finite`: also when a number is NaN or infinite, which GloBE never writes and a config.json may hold.
    """
    try:
        if not path.is_file():
            raise GlobeError(f"{path} is no file; {remedy}.")
        data = parse_json(path.read_text(encoding="utf-8"), finite=finite)
    except (OSError, ValueError) as error:
        if isinstance(error, (GlobeError, PermissionError)):
            raise
        raise GlobeError(f"{path} is not valid JSON ({error}); {remedy}.") from error
    if not isinstance(data, dict):
        raise GlobeError(f"{path} holds a {type(data).__name__} and GloBE expects an object; {remedy}.")
    return data


def parse_json(text: str, *, finite: bool = False) -> Any:
    """Parse JSON. Raises ValueError, also for values that are nested too deep, and if `finite` for NaN and infinity."""
    try:
        data = json.loads(text)
    except RecursionError:
        raise ValueError("its values are nested too deep") from None
    level = [data]
    for _ in range(_MOST_LEVELS):
        if finite and any(isinstance(value, float) and not math.isfinite(value) for value in level):
            raise ValueError("a number is NaN or infinite")
        level = [inner for value in level for inner in inner_values(value)]
    if level:
        raise ValueError(f"its values are nested deeper than {_MOST_LEVELS} levels")
    return data


def inner_values(value: Any) -> Iterable[Any]:
    """Return the values of a JSON object or list, and none of any other value."""
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def sha256(path: Path) -> str:
    """Hash the bytes of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class ShardWriter:
    """Write named tensors to `stem.safetensors`, or to `stem-00001-of-0000N.safetensors` above 4 GiB.

    At most one shard of tensors is in memory. Give one entry of metadata: safetensors writes several entries in random
    order, and the bytes would not be reproducible.
    """

    def __init__(self, directory: Path, stem: str, metadata: dict[str, str]):
        self.directory, self.stem, self.metadata = directory, stem, metadata
        self.total_bytes = 0
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[tuple[Path, list[str]]] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Add a tensor to the current shard; write the shard first when the tensor does not fit into it."""
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
        """Write the last shard and give all shards their final names; return {tensor name: file name}."""
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
