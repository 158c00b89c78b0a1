"""Read the files of a directory: only its own, JSON within limits, and hashes."""

import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from globe_kernels.errors import GlobeError

_MOST_LEVELS = 100  # of values in values of a JSON file
_MOST_DIGITS = 300  # of an integer there


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
        text = path.read_text(encoding="utf-8")
    except PermissionError:
        raise
    except (OSError, UnicodeError) as error:
        raise GlobeError(f"{path} is not valid JSON ({error}); {remedy}.") from error
    return parse_object(text, path, remedy, finite=finite)


def parse_object(text: str, where: Path, remedy: str, *, finite: bool = False) -> dict:
    """Parse the JSON object that the file `where` holds, as `read_json` does."""
    try:
        data = parse_json(text, finite=finite)
    except ValueError as error:
        raise GlobeError(f"{where} is not valid JSON ({error}); {remedy}.") from error
    if not isinstance(data, dict):
        raise GlobeError(f"{where} holds a {type(data).__name__} and GloBE expects an object; {remedy}.")
    return data


def parse_json(text: str, *, finite: bool = False) -> Any:
    """Parse JSON.

    Raises ValueError, also for values that are nested too deep and for integers that no float can be, and if `finite`
    for NaN and infinity.
    """
    try:
        data = json.loads(text, parse_int=_parse_int)
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


def _parse_int(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"an integer has {len(digits)} digits")
    return int(digits)


def inner_values(value: Any) -> Iterable[Any]:
    """Return the values of a JSON object or list, and none of any other value."""
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def sha256(path: Path) -> str:
    """Hash the bytes of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
