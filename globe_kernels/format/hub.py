"""Get a model or a checkpoint of the Hugging Face Hub into the cache of huggingface_hub, and name the models there.

A path that exists is never asked of the Hub. `Org/name` is a name there, and `Org/name@revision` names a branch, a tag
or a commit.
"""

import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypedDict

from globe_kernels.errors import GlobeError, RequestError
from globe_kernels.format.directories import holds_model, named_weights, weights_entry
from globe_kernels.format.files import read_json, repository_of
from globe_kernels.format.names import (
    BESIDE_WEIGHTS,
    CARD_NAME,
    CONFIG_NAME,
    EVALUATION_NAME,
    INDEX_NAME,
    METRICS_NAME,
    MODEL_CONFIG_NAME,
    SINGLE_NAME,
)
from globe_kernels.format.typed import checked
from globe_kernels.units import format_bytes

_ID = re.compile(r"(?P<id>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>\w[\w./-]*))?")
_CONFIGS = (MODEL_CONFIG_NAME, CONFIG_NAME)


def _in_any_case(pattern: str) -> str:
    return re.sub(r"[a-z]", lambda letter: f"[{letter[0]}{letter[0].upper()}]", pattern)


# All but weights: configurations, the index, and the files that an export takes over. "*" also matches "/".
_BESIDE = tuple(_in_any_case(pattern) for pattern in BESIDE_WEIGHTS)
_SMALL = ("*.json", CARD_NAME, *_BESIDE, *(f"{pattern}/*" for pattern in _BESIDE))
_BESIDE_A_CHECKPOINT = (METRICS_NAME, EVALUATION_NAME)


def is_hub_id(model: str | Path) -> bool:
    """Whether `model` can only be a name on the Hub: text that nothing here has as its path. A Path is never a name."""
    return isinstance(model, str) and not Path(model).exists() and _ID.fullmatch(model) is not None


def at_revision(model: str, revision: str | None) -> str:
    """Return the name of `revision` of a model on the Hub. Raises RequestError when `model` is not on the Hub."""
    if revision is None:
        return model
    if not is_hub_id(model) or "@" in model:
        raise RequestError(
            f"--revision {revision} names a version of a model on the Hugging Face Hub and {model} is not the id of "
            "such a model; give an id such as Org/name, or no revision."
        )
    return f"{model}@{revision}"


def model_name(directory: Path) -> str:
    """Name a model by its directory; in the cache of the Hub by its id there, organisation/name."""
    repository = repository_of(directory)
    if repository is not None:
        return repository.name.removeprefix("models--").replace("--", "/", 1)
    return directory.resolve().name


def local_directory(
    model: str | Path, *, weights: bool = True, say: Callable[[str], None] = lambda sentence: None
) -> Path:
    """Return the directory of a model or a checkpoint: `model` itself, or its snapshot if it is a name on the Hub.

    Files that the cache lacks are downloaded, without `weights` only the configuration; `say` gets a sentence before a
    download of weights. HF_HUB_OFFLINE, HF_HOME, HF_HUB_CACHE, HF_ENDPOINT and HF_TOKEN count as for transformers. A
    path that is neither here nor a name on the Hub is returned as it is. Raises RequestError for a model that cannot be
    had, GlobeError when a download fails.
    """
    if not is_hub_id(model):
        return Path(model)
    match = _ID.fullmatch(str(model))
    assert match is not None
    download = _Download(match["id"], match["revision"])
    if not weights:
        return download.get(_CONFIGS)
    found = download.get((*_SMALL, *_BESIDE_A_CHECKPOINT))
    if (found / CONFIG_NAME).is_file():
        listed = read_json(found / CONFIG_NAME, "download it again").get("files", {})
        download.get_weights(list(checked(dict[str, str], listed, CONFIG_NAME, "download it again")), say)
        if not holds_model(found):  # a checkpoint alone, not beside its model
            return found
    named = named_weights(found)
    if named is None or not named.endswith(".json"):
        # one file comes before an index
        download.get_weights([named or SINGLE_NAME], say, required=not (found / INDEX_NAME).is_file())
    entry = weights_entry(found)
    if entry is not None and entry.endswith(".json"):
        download.get_weights(sorted(set(index_of(found / entry).values())), say)
    return found


def index_of(path: Path) -> dict[str, str]:
    """Read {tensor: file} of a shard index. Raises GlobeError when it is damaged."""
    weight_map = checked(_Index, read_json(path, "download it again"), str(path), "download it again")["weight_map"]
    if not weight_map:
        raise GlobeError(f"{path} is not a valid shard index, for it has no tensors; download it again.")
    return weight_map


class _Index(TypedDict):
    weight_map: dict[str, str]


class _Download:
    """Downloads of one commit of a model into the cache, with errors of one sentence."""

    def __init__(self, name: str, revision: str | None):
        try:
            from huggingface_hub import constants, errors, snapshot_download
        except ImportError:
            raise RequestError(
                f"{name} is no directory here, and models of the Hugging Face Hub need the package huggingface_hub; "
                "run `pip install huggingface_hub`, or give a directory."
            ) from None
        self._snapshot_download, self._errors, self._constants = snapshot_download, errors, constants
        self._name, self._revision = name, revision

    def get(self, patterns: Sequence[str]) -> Path:
        """Download the files that match `patterns`, as far as the Hub answers; returns the snapshot."""
        try:
            found = Path(self._ask(allow_patterns=list(patterns)))
        except self._errors.LocalEntryNotFoundError as error:
            # without the Hub a snapshot may lack files that nobody needs, such as a licence
            if (partial := getattr(error, "snapshot_path", None)) is None:
                raise self._out_of_reach() from error
            found = Path(partial)
        self._revision = found.name  # the commit: a branch may move before the weights come
        return found

    def get_weights(self, names: Sequence[str], say: Callable[[str], None], *, required: bool = True) -> None:
        """Download these files, if the disk has room; `required`: refuse a cache without them where there is no Hub."""
        cache = Path(self._constants.HF_HUB_CACHE)
        # with a name that every model has, because a pattern that matches nothing is worth a warning to huggingface_hub
        wanted = [MODEL_CONFIG_NAME, *names]
        try:
            planned = self._ask(allow_patterns=wanted, dry_run=True)
        except self._errors.DryRunError:  # the Hub does not answer
            found = self.get(wanted)
            if required and not all((found / name).is_file() for name in names):
                raise self._out_of_reach() from None
            return
        missing = [each for each in planned if each.will_download]
        if not missing:
            return
        needed = sum(each.file_size or 0 for each in missing)  # a Hub may not say a size
        free = shutil.disk_usage(next(path for path in (cache, *cache.parents) if path.exists())).free
        if free < needed:
            raise GlobeError(
                f"The weights of {self._name} take {format_bytes(needed)} and {format_bytes(free)} are free in "
                f"{cache}; free some space, or set HF_HOME to a folder of another disk."
            )
        say(f"{format_bytes(needed)} of {self._name} come from the Hub into {cache}")
        self._ask(allow_patterns=wanted)

    def _ask(self, **options: Any) -> Any:
        errors, repository = self._errors, f"{self._constants.ENDPOINT}/{self._name}"
        try:
            return self._snapshot_download(self._name, revision=self._revision, **options)
        except (errors.DryRunError, errors.LocalEntryNotFoundError):
            raise
        except errors.GatedRepoError as error:
            raise RequestError(
                f"{self._name} is gated: accept its terms on {repository}, log in with `hf auth login` or set "
                "HF_TOKEN, and run the same command again."
            ) from error
        except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
            raise RequestError(
                f"{self._name} is no directory here, and the Hugging Face Hub has no model of this name that you may "
                "see; check the spelling, or log in with `hf auth login` if the model is private."
            ) from error
        except errors.RevisionNotFoundError as error:
            raise RequestError(
                f"{self._name} has no revision {self._revision!r} on the Hugging Face Hub; give a branch, a tag or a "
                "commit of it, or no revision."
            ) from error
        except Exception as error:  # of httpx, of the disk, of Xet: no list of their classes is complete
            reason = " ".join(str(error).split()) or type(error).__name__
            raise GlobeError(
                f"Downloading {self._name} failed ({reason}); mend the cause and run the same command again, which "
                "goes on with the files that are missing."
            ) from error

    def _out_of_reach(self) -> RequestError:
        """Make the error for files that the cache does not have while the Hub does not answer."""
        wanted = self._name if self._revision is None else f"{self._name} at {self._revision}"
        cut = "HF_HUB_OFFLINE is set" if self._constants.is_offline_mode() else "the Hub does not answer"
        return RequestError(
            f"{wanted} is no directory here, and a model of the Hugging Face Hub of this name is not, or not whole, in "
            f"the cache {self._constants.HF_HUB_CACHE} while {cut}; check the spelling of the path, or download the "
            "model where there is a network."
        )
