"""Snapshots of an unfinished fit: files in the directory of the checkpoint, one per family, step and rank.

A rank writes its part of a step, waits until all ranks have written, and removes its part of the step before. So a kill
at any moment leaves a step of which every part is complete, and the fit continues from the newest such step.
"""

import json
import math
import shutil
import signal
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from globe_fit.config import SNAPSHOT_MINUTES
from globe_fit.run.distributed import ALONE, Ranks, was_terminated
from globe_fit.run.pieces import pieces, save_file
from globe_fit.run.progress import SILENT
from globe_fit.run.stopping import in_main_thread, interrupt, interrupt_behind
from globe_kernels.errors import GlobeError, RequestError
from globe_kernels.format.files import inner_file
from globe_kernels.format.names import FAMILIES, METRICS_NAME, SNAPSHOT_DIRECTORY
from globe_kernels.format.writing import mapped_tensor, replacing_file

_ABSENT = object()
HEALED = "healed"  # begins the names of the snapshots of layers that are healed


class Snapshots:
    """The snapshots of one fit in `out`, a directory that all `ranks` see.

    `identity` holds the settings and the model of the fit as JSON; the number of ranks is added. A fit continues only
    from snapshots with an equal identity. `say` gets a sentence as soon as a signal asks for the end of the fit. Raises
    RequestError, with the settings that differ, when `out` holds the snapshots of another fit.
    """

    def __init__(
        self,
        out: str | Path,
        identity: dict,
        minutes: float = SNAPSHOT_MINUTES,
        ranks: Ranks = ALONE,
        say: Callable[[str], None] = SILENT.say,
    ):
        self.directory = Path(out) / SNAPSHOT_DIRECTORY
        self._identity, self._seconds = identity | {"ranks": ranks.world}, 60 * minutes
        self._last = time.monotonic()
        self._ranks, self._say = ranks, say
        self._signal = 0  # that asks for the end of the fit
        self._failure: Exception | None = None
        for path in self._parts():
            self._require_same(path)
        self._keep_common_steps()

    def _parts(self, name: str = "*") -> list[Path]:
        """List the files of this rank, of every step."""
        found = self.directory.glob(f"{name}-*-{self._ranks.rank}.safetensors")
        return sorted(path for path in found if path.name.split("-")[-2].isdecimal())

    def _keep_common_steps(self) -> None:
        """Keep of each family the newest step that all ranks have, and remove the other files of this rank."""
        newest = [max((_step(path) for path in self._parts(family)), default=-1) for family in FAMILIES]
        # a rank takes the next step only when all ranks have this step: the oldest of the newest steps is common
        common = [min(steps) for steps in zip(*self._ranks.every(*newest), strict=True)]
        for family, step in zip(FAMILIES, common, strict=True):
            self._remove(family, but=int(step))
        for partial in self.directory.glob(f"*-{self._ranks.rank}.safetensors.partial"):  # left by a kill
            partial.unlink()

    def _remove(self, name: str, but: int) -> None:
        for path in self._parts(name):
            if _step(path) != but:
                path.unlink()

    def reached(self) -> dict[str, float]:
        """Return {family: the step from which its fit continues, infinite when it is finished}."""
        facts = {family: self._facts(path) for family in FAMILIES for path in self._parts(family)}
        return {family: math.inf if found["done"] else found["step"] for family, found in facts.items()}

    @property
    def healed_layers(self) -> int:
        """The layers that are healed."""
        return len(self._parts(f"{HEALED}*"))

    def _require_same(self, path: Path) -> None:
        if changes := differences(self._facts(path)["identity"], self._identity):
            raise RequestError(
                f"{self.directory.parent} holds an unfinished fit with other settings ({changes}); run the fit with "
                "the settings of the unfinished fit, give another directory, or discard it "
                "(--restart, in Python resume=False)."
            )

    def load(self, family: str) -> tuple[dict[str, torch.Tensor], dict] | None:
        """Load (tensors, facts) that this rank saved of a family; None when there is no snapshot.

        The tensors are in the file, whose pages give way when memory is short. Copy a tensor before you compute with
        it: the rounding of a product may depend on where in a cache line a tensor begins.
        """
        parts = self._parts(family)
        if not parts:
            return None
        (path,) = parts
        facts = self._facts(path)
        with safe_open(path, framework="pt") as handle:
            tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
        if facts["tensors"] != {name: _checksum(tensor) for name, tensor in tensors.items()}:
            raise self._damaged(path, "its tensors are not the tensors that were saved")
        return tensors, facts

    def _facts(self, path: Path) -> dict:
        if not inner_file(path.parent, path.name).is_file():
            raise self._damaged(path, "it is no file")
        try:
            with safe_open(path, framework="pt") as handle:
                metadata = handle.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise self._damaged(path, error) from error
        facts = metadata.get("facts", "")
        if metadata.get("checksum") != _checksum_of([facts.encode()]):
            raise self._damaged(path, "its facts are not the facts that were saved")
        return json.loads(facts)

    def _damaged(self, path: Path, reason: object) -> GlobeError:
        return GlobeError(
            f"The snapshot {path} is damaged ({reason}); discard it (--restart, in Python resume=False) and begin "
            "again."
        )

    def save(self, family: str, step: int, tensors: dict[str, torch.Tensor], facts: dict) -> None:
        """Replace the part of this rank of the snapshot of a family; all ranks save the same step.

        Raises GlobeError for a full disk; the snapshot before is kept then.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        checksums = {name: _checksum(tensor) for name, tensor in tensors.items()}
        text = json.dumps(facts | {"identity": self._identity, "tensors": checksums})
        metadata = {"facts": text, "checksum": _checksum_of([text.encode()])}
        try:
            with replacing_file(self.directory / f"{family}-{step}-{self._ranks.rank}.safetensors") as path:
                save_file(tensors, path, metadata=metadata)
        finally:
            if not any(self.directory.iterdir()):
                self.directory.rmdir()
        self._ranks.every(0)  # all ranks have written
        self._remove(family, but=step)
        self._last = time.monotonic()

    def room(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return a tensor on the disk of the snapshots, which takes no memory that others need."""
        self.directory.mkdir(parents=True, exist_ok=True)
        try:
            return mapped_tensor(self.directory, shape, dtype)
        finally:
            if not any(self.directory.iterdir()):
                self.directory.rmdir()

    @property
    def of_one_rank(self) -> bool:
        return self._ranks.world == 1

    def due(self) -> bool:
        """Whether it is time for the next snapshot, on any rank."""
        return self._largest(self._asked or time.monotonic() - self._last >= self._seconds) > 0

    def stop(self, failure: Exception) -> None:
        """Ask for a snapshot and then for the end of the fit, by the exception of a caller's function."""
        self._signal, self._failure = signal.SIGINT, failure

    def stop_if_asked(self) -> None:
        """Raise the exception of `stop`, or KeyboardInterrupt on all ranks; call it when a snapshot is complete."""
        if asked := self._largest(self._asked):
            raise self._failure or interrupt(asked)

    @property
    def _asked(self) -> int:
        """The signal that asks this rank for the end of the fit; 0 while there is none."""
        return signal.SIGTERM if was_terminated() else self._signal

    def _largest(self, value: float) -> float:
        return max(value for (value,) in self._ranks.every(value))

    @contextmanager
    def explaining_interrupts(self, resume: bool = True) -> Iterator[None]:
        """Let a KeyboardInterrupt from inside say where the fit goes on; `resume`: whether this fit was to go on."""
        try:
            yield
        except (Exception, KeyboardInterrupt) as error:
            stopped = interrupt_behind(error)
            if stopped is None:
                raise
            again = "the same command" + ("" if resume else " without --restart")
            if self._parts():
                reached = self.reached()
                family = next((name for name in FAMILIES if reached.get(name) != math.inf), FAMILIES[-1])
                end = f"its healing, with {self.healed_layers} layers healed" if self.healed_layers else "its end"
                at = end if reached.get(family) == math.inf else f"step {reached.get(family, 0)} of {family}"
                why = f"interrupted; {again} goes on from {at} (snapshot in {self.directory})"
            elif self.directory.exists():
                why = "interrupted before the first snapshot; the same command begins from the start"
            else:
                why = "interrupted; nothing was written"
            raise type(stopped)(why) from error

    @contextmanager
    def catching_interrupts(self) -> Iterator[None]:
        """Let the first Ctrl-C or SIGTERM inside wait for the end of the step and its snapshot, and say so.

        Another Ctrl-C does not wait. When the snapshot is complete, the handler that the caller had set is called.
        """
        caught = [signal.SIGINT, signal.SIGTERM] if self._ranks.world == 1 else [signal.SIGINT]  # torchrun: distributed
        handlers = {number: signal.getsignal(number) for number in caught if in_main_thread()}
        # a signal that is ignored stays so; a handler of C cannot be put back
        usual: dict[int, Any] = {n: handler for n, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}

        def ask_to_stop(number: int, frame: FrameType | None) -> None:
            if not self._signal:
                self._signal = number
                before = "the last snapshot stands until then" if any(self._parts()) else "there is no snapshot before"
                hint = "; another Ctrl-C does not wait" if number == signal.SIGINT else ""
                with suppress(RuntimeError):  # the signal came inside a write to the same stream, which prints it later
                    self._say(f"the fit stops when its step and a snapshot are complete; {before}{hint}.")
            elif number == signal.SIGINT:
                usual[number](number, frame)

        for number in usual:
            signal.signal(number, ask_to_stop)
        try:
            try:
                yield
            finally:
                for number, handler in usual.items():
                    signal.signal(number, handler)
        except KeyboardInterrupt:
            if callable(handler := usual.get(self._signal)):
                handler(self._signal, None)
            raise


def stream_path(out: str | Path) -> Path:
    """Return the path of the metric stream of an unfinished fit in `out`."""
    return Path(out) / SNAPSHOT_DIRECTORY / METRICS_NAME


def snapshot_bytes(out: str | Path) -> int:
    """Return the bytes of all snapshots in `out`."""
    return sum(path.lstat().st_size for path in (Path(out) / SNAPSHOT_DIRECTORY).glob("*.safetensors"))


def discard_snapshots(out: str | Path) -> None:
    """Remove all snapshots in `out`, of a fit that is finished or begins again."""
    shutil.rmtree(Path(out) / SNAPSHOT_DIRECTORY, ignore_errors=True)


def differences(found: dict, wanted: dict) -> str:
    """Describe the settings that differ, with the values found and wanted, for a sentence; empty when all agree."""
    # through JSON, as `found` was saved
    was, now = (_flat(json.loads(json.dumps(settings))) for settings in (found, wanted))
    differing = [key for key in {**now, **was} if was.get(key, _ABSENT) != now.get(key, _ABSENT)]
    return ", ".join(f"{key} was {was.get(key)} and is {now.get(key)}" for key in differing)


def _checksum(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} {_checksum_of(pieces(tensor))}"


def _checksum_of(parts: Iterable[bytes | memoryview]) -> str:
    checksum = 0
    for part in parts:
        checksum = zlib.crc32(part, checksum)
    return f"{checksum:08x}"


def _step(path: Path) -> int:
    return int(path.name.split("-")[-2])


def _flat(settings: dict, prefix: str = "") -> dict:
    """Put nested settings under dotted names: {"varpro.steps": 500, ...}."""
    flat = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
