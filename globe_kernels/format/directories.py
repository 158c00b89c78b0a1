"""Tell what a path holds, so that an error says what a person gave and what to give instead.

    model        config.json of transformers
    export       a model that `globe export` wrote: it runs from its compressed form
    checkpoint   globe_config.json of `globe fit`, without the rest of the model
    unfinished   the snapshots of a fit
    sweep        a directory of checkpoints

Adapters, GGUF files and weights in other formats are known too, because people try them.
"""

from collections.abc import Callable
from pathlib import Path

from globe_kernels.errors import GlobeError, RequestError
from globe_kernels.format.files import inner_file, read_json
from globe_kernels.format.names import (
    ADAPTER_CONFIG_NAME,
    CARD_MARK,
    CARD_NAME,
    CHECKPOINT_GUARD,
    CONFIG_NAME,
    GUARD_KEY,
    INDEX_NAME,
    LOCK_NAME,
    MODEL_CONFIG_NAME,
    PLACED_NAME,
    QUANT_METHOD,
    SINGLE_NAME,
    SNAPSHOT_DIRECTORY,
    STAGING_NAME,
)

_SHOWN = 3  # names of files in an error
_CONVERT = "load the model with transformers and save it with save_pretrained"
# Weights that GloBE does not read, of a model without model.safetensors and without an index; the first that is there.
_OTHER_WEIGHTS = (
    ("*/" + SINGLE_NAME, "below it; give the directory that holds both config.json and the weights"),
    ("*/" + INDEX_NAME, "below it; give the directory that holds both config.json and the weights"),
    ("model-*-of-*.safetensors", f"without {INDEX_NAME}, which says its tensors; download the index"),
    ("model.*.safetensors*", f"as a variant, which from_pretrained takes by its name alone; {_CONVERT}"),
    ("adapter_model.*", "for an adapter alone; add the weights of the model, or merge the adapter and save the result"),
    ("*.safetensors*", f"by a name that transformers does not load; add {SINGLE_NAME}, or {INDEX_NAME} and its files"),
    ("*.bin*", f"in a format of pickled files; {_CONVERT}"),
    ("*.pt*", f"in a format of pickled files; {_CONVERT}"),
    ("*.h5", f"in a format of TensorFlow; {_CONVERT}"),
    ("*.msgpack", f"in a format of Flax; {_CONVERT}"),
)


def holds_checkpoint(path: Path) -> bool:
    """Whether `path` is the directory of a finished GloBE checkpoint."""
    return (path / CONFIG_NAME).is_file()


def holds_unfinished_fit(path: Path) -> bool:
    """Whether `path` has a snapshot of a fit that goes on with the same command."""
    return any((path / SNAPSHOT_DIRECTORY).glob("*.safetensors"))


def holds_model(path: Path) -> bool:
    """Whether `path` is the directory of a whole model, dense or exported."""
    config = _model_config(path)
    return config is not None and config.get(GUARD_KEY) != CHECKPOINT_GUARD


def holds_export(path: Path) -> bool:
    """Whether `path` is a model that runs from its compressed form."""
    return _compressed(_model_config(path) or {}) is not None


def is_earlier_export(path: Path) -> bool:
    """Whether `globe export` wrote `path`, dense or compressed."""
    card = path / CARD_NAME
    return card.is_file() and CARD_MARK in card.read_text(encoding="utf-8", errors="replace")


def named_weights(path: Path) -> str | None:
    """Return the file of the weights that config.json names, also of an export; None where the name is usual."""
    config = _model_config(path) or {}
    compressed = _compressed(config)
    named = config.get(GUARD_KEY) if compressed is None else compressed.get("weights")
    return named if isinstance(named, str) else None


def weights_entry(path: Path) -> str | None:
    """Return the file in which transformers begins to load the weights of a model; None where it finds none.

    The order of transformers: the file that config.json names, one file, the index of several files.
    """
    usual = (name for name in (SINGLE_NAME, INDEX_NAME) if (path / name).is_file())
    return named_weights(path) or next(usual, None)


def no_weights(path: Path) -> RequestError:
    """Make the error for a model without weights that GloBE reads, by the weights that it has."""
    for pattern, trouble in _OTHER_WEIGHTS:
        if found := sorted(each.relative_to(path).as_posix() for each in path.glob(pattern)):
            return RequestError(f"{path} has its weights in {found[0]}, {trouble}.")
    return RequestError(
        f"{path} holds neither {SINGLE_NAME} nor {INDEX_NAME}; GloBE reads safetensors, so download or convert the "
        "model in that format."
    )


def adapter_note(path: Path) -> str | None:
    """Return a sentence about the adapter beside a model, which nobody fits; None where there is none."""
    if not (path / ADAPTER_CONFIG_NAME).is_file():
        return None
    return (
        f"{path} holds an adapter too ({ADAPTER_CONFIG_NAME}): it is no part of the weights that GloBE fits, measures "
        "and exports, though transformers with peft would load it; merge the adapter first if it belongs to the model."
    )


def had_writer(path: Path) -> bool:
    """Whether a writer of GloBE is at work in `path`, or was killed there."""
    return (path / LOCK_NAME).exists()


def _is_left_by_a_kill(path: Path) -> bool:
    """Whether all that `path` holds are files of a writer that was killed while the files took their places."""
    placed = path / STAGING_NAME / PLACED_NAME
    if not placed.is_file():
        return False
    names = placed.read_text(encoding="utf-8", errors="replace").splitlines()
    return all(found.name in names for found in path.glob("[!.]*"))


def holds_fit(path: Path) -> bool:
    """Whether `path` belongs to `globe fit`, finished or not, and to nobody else."""
    return not holds_model(path) and (holds_checkpoint(path) or holds_unfinished_fit(path))


def is_empty(path: Path) -> bool:
    """Whether the directory `path` has no files but hidden files."""
    return not _names(path)


def _model_config(path: Path) -> dict | None:
    """Return config.json; an empty dict when it is damaged or not of this directory, None when there is none."""
    file = path / MODEL_CONFIG_NAME
    try:
        if not file.is_file():
            return None
        return read_json(inner_file(path, file.name), "")
    except PermissionError:
        raise RequestError(f"{path} cannot be read: permission denied; give a directory that you may read.") from None
    except GlobeError:
        return {}


def _compressed(config: dict) -> dict | None:
    """Return the `quantization_config` of an export; None for another model."""
    found = config.get("quantization_config")
    return found if isinstance(found, dict) and found.get("quant_method") == QUANT_METHOD else None


def not_a_model(path: str | Path) -> RequestError:
    """Make the error for a path where a dense model is expected, by what the path is."""
    found, text = Path(path), str(path)
    if not found.exists():
        return RequestError(
            f"{text} does not exist; give the local directory of a Hugging Face model, or its id on the Hub, such as "
            "Qwen/Qwen3-30B-A3B."
        )
    if found.suffix == ".gguf" or (found.is_dir() and not holds_model(found) and any(found.glob("*.gguf"))):
        return RequestError(
            f"{text} is a model in GGUF, which GloBE does not read; give the Hugging Face directory (safetensors) that "
            "it was made from."
        )
    if not found.is_dir():
        return RequestError(f"{text} is not a directory; give the local directory of a Hugging Face model.")
    if (found / ADAPTER_CONFIG_NAME).is_file() and not holds_model(found):
        return RequestError(
            f"{text} is a LoRA adapter without its model; merge it first (in peft: merge_and_unload, then "
            "save_pretrained) and give the directory of the merged model."
        )
    if holds_export(found):
        return RequestError(
            f"{text} is a model that GloBE compressed already; give the dense model that it was made from."
        )
    if holds_checkpoint(found):
        return RequestError(
            f"{text} is a GloBE checkpoint without the rest of its model; give the dense model that it was fitted on."
        )
    if holds_unfinished_fit(found):
        return RequestError(f"{text} holds an unfinished fit; give the dense model that is fitted there.")
    held = "is empty" if is_empty(found) else f"holds no {MODEL_CONFIG_NAME} but {_names(found)}"
    return RequestError(f"{text} {held}; give the local directory of a Hugging Face model.")


def not_a_checkpoint(path: str | Path) -> RequestError:
    """Make the error for a path where a GloBE checkpoint is expected, by what the path is."""
    found = Path(path)
    start = f"{path} holds no {CONFIG_NAME}, so it is not a GloBE checkpoint"
    if not found.exists():
        return RequestError(f"{path} does not exist; give the directory that `globe fit -o` wrote.")
    if holds_export(found):
        return RequestError(
            f"{start}: it is the whole model that `globe export` wrote. Load it with from_pretrained after `import "
            "globe_kernels`, or give the directory that `globe fit -o` wrote."
        )
    if is_earlier_export(found):
        return RequestError(
            f"{start}: it is a dense model that `globe export --dense` wrote; give the directory that `globe fit -o` "
            "wrote."
        )
    if holds_model(found):
        return RequestError(f"{start}: it is a model. Fit it first: `globe fit {path} -o OUT`, then give OUT.")
    if holds_unfinished_fit(found):
        return RequestError(f"{start} yet: its fit is not finished; run the same `globe fit` command again.")
    if found.is_dir() and (points := sorted(each.name for each in found.iterdir() if holds_checkpoint(each))):
        return RequestError(f"{start}: it is a sweep. Give one of its points, such as {found / points[0]}.")
    return RequestError(f"{start}; give the directory that `globe fit -o` wrote.")


def refuse_swapped(first: Path, second: Path, first_holds: Callable[[Path], bool], usage: str) -> None:
    """Refuse two paths that were given in the wrong order: the second is what the first should be, as `usage` says."""
    if first_holds(second) and not first_holds(first):
        raise RequestError(f"{first} and {second} are in the wrong order; write {usage}.")


def require_place(out: str | Path, is_own: Callable[[Path], bool], kind: str) -> None:
    """Refuse to write into a directory that holds anything but earlier work of the same `kind`, as `is_own` tells.

    A directory that is absent, empty but for hidden files, or left by a writer that was killed, is fine. Raises
    RequestError.
    """
    out = Path(out)
    if not out.is_dir() or is_empty(out) or is_own(out) or _is_left_by_a_kill(out):
        return
    names = _names(out)
    if holds_model(out):
        raise RequestError(f"{out} is the directory of a model ({names}); give a new directory for the {kind}.")
    raise RequestError(f"{out} holds other files ({names}) and no {kind} of GloBE; give a new directory.")


def _names(directory: Path) -> str:
    """Name the first files of a directory; empty where there are none but hidden files."""
    names = sorted(path.name for path in directory.iterdir() if not path.name.startswith("."))
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
