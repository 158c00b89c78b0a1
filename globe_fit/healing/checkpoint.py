"""The verb `heal`: heal a checkpoint on disk in place."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from globe_fit.calibration.metric import identity, require_text
from globe_fit.config import SELF, resolve_device
from globe_fit.data.source import ExpertSource
from globe_fit.export import remove_figures, require_same_model, require_same_weights, save_fit
from globe_fit.healing.healing import heal_fit, healing_disk_bytes, require_memory
from globe_fit.result import FitResult, stored_fit
from globe_fit.run.display import say, show_progress
from globe_fit.run.progress import SILENT, Progress
from globe_fit.run.reports import read_healing
from globe_fit.run.snapshots import Snapshots, discard_snapshots, snapshot_bytes
from globe_fit.run.stopping import interrupt_behind, terminating
from globe_kernels.errors import RequestError
from globe_kernels.format.checkpoint import GlobeCheckpoint
from globe_kernels.format.files import repository_of, sha256
from globe_kernels.format.names import FAMILIES, SNAPSHOT_DIRECTORY
from globe_kernels.format.writing import only_writer, require_room
from globe_kernels.units import parse_bytes

_FIT = "fit"  # name of a snapshot


@terminating()
def heal(
    out: str | Path,
    base: str | Path,
    *,
    text: str | Path | None = None,
    device: str = "auto",
    memory_limit: float | str | None = None,
    resume: bool = True,
    progress: Progress | bool = False,
) -> FitResult:
    """Train the adapters of the checkpoint in `out` on the outputs of its dense model, and replace the checkpoint.

    `base` is the directory or the Hub id of the model on which it was fitted. The bytes of the checkpoint stay.
    An interrupted call continues from the last layer that it healed; until the end `out` holds the old checkpoint. A
    checkpoint that is healed already is returned as it is.

    text          a UTF-8 text file, "self": a text that the model writes; None: the text of the fit, "self" without it
    memory_limit  bytes, or a text such as "20GB": refuse a healing that needs more
    resume        False: forget the layers that an interrupted call has healed
    progress      as of globe_fit.compress

    Raises RequestError for a checkpoint of another model, a text that is missing or too short and too little memory,
    GlobeError for damaged files and a full disk, KeyboardInterrupt as globe_fit.compress does.
    """
    checkpoint, source = GlobeCheckpoint(out), ExpertSource(base)
    if repository_of(checkpoint.path) is not None:
        raise RequestError(f"{out} comes from the Hub, whose cache takes no checkpoint; copy it to a directory first.")
    require_same_model(checkpoint.config, source)
    require_same_weights(checkpoint, source)
    shown = progress if isinstance(progress, Progress) else Progress(say=say) if progress else SILENT
    with only_writer(checkpoint.path), ExitStack() as stack:
        if read_healing(checkpoint) is not None:
            if (checkpoint.path / SNAPSHOT_DIRECTORY).exists():  # a kill came after the checkpoint was written
                checkpoint.remove_leftovers()
                remove_figures(out)
                discard_snapshots(out)
            shown.say(f"{out} is healed already: nothing is done.")
            return stored_fit(checkpoint)
        if progress is True:
            shown = stack.enter_context(show_progress())
        chosen, target = _text_of(checkpoint, text), resolve_device(device)
        require_text(chosen)
        limit = None if memory_limit is None else parse_bytes(memory_limit)
        require_memory(source, checkpoint.config, limit)
        if not resume:
            discard_snapshots(out)
        wanted = {"healing": identity(chosen), "device": target, "checkpoint": checkpoint.fingerprint}
        snapshots = Snapshots(out, wanted | {"weights": source.weights_sha256})
        needed = healing_disk_bytes(source, checkpoint.config) + checkpoint.bytes_on_disk - snapshot_bytes(out)
        require_room(checkpoint.path, needed)
        stored = _stored_fit(checkpoint, snapshots)
        result = replace(stored, families={family: stored.families[family] for family in FAMILIES})
        seed = checkpoint.config.provenance.get("seed", 0)
        with _explaining_interrupts(snapshots):
            result = heal_fit(
                result, source, chosen, target, snapshots=snapshots, seed=seed, memory_limit=limit, progress=shown
            )
            save_fit(result, source, out)
        remove_figures(out)
        discard_snapshots(out)
        return result


def _text_of(checkpoint: GlobeCheckpoint, text: str | Path | None) -> str | Path:
    """Return the text that is asked for, by default the text of the fit, and SELF where there was none.

    Raises RequestError when the file of the fit is not here.
    """
    if text is not None:
        return text
    fitted_on = checkpoint.config.provenance.get("calibration") or {}
    name, digest = fitted_on.get("text", SELF), fitted_on.get("sha256")
    if digest is None or (Path(name).is_file() and sha256(Path(name)) == digest):
        return name
    raise RequestError(
        f"{checkpoint.path} was fitted to the text {name}, which is not in this directory; give its path with --text, "
        f"or --text {SELF}."
    )


def _stored_fit(checkpoint: GlobeCheckpoint, snapshots: Snapshots) -> FitResult:
    """Return the fit of the checkpoint. A snapshot keeps it: a kill may leave the new report beside the old tensors."""
    saved = snapshots.load(_FIT)
    if saved is not None:
        return stored_fit(checkpoint, saved[1]["report"], saved[1]["history"])
    stored = stored_fit(checkpoint)
    snapshots.save(_FIT, 0, {}, {"report": stored.report, "history": stored.history})
    return stored


@contextmanager
def _explaining_interrupts(snapshots: Snapshots) -> Iterator[None]:
    """Let a KeyboardInterrupt from inside say where the healing goes on."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        stopped = interrupt_behind(error)
        if stopped is None:
            raise
        raise type(stopped)(
            f"interrupted; {snapshots.directory.parent} holds the checkpoint as it was, and the same command goes on "
            f"({snapshots.healed_layers} layers are healed)"
        ) from error
