"""Where an interrupted fit goes on: one file per family beside the checkpoint to be, replaced whole or not at all."""

import json
import math
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from globe_kernels.checkpoint import METRICS_NAME
from globe_kernels.errors import GlobeError, RequestError
from globe_kernels.families import FAMILIES
from globe_kernels.files import replacing_file

_DIRECTORY = ".snapshot"
_ABSENT = object()


class Snapshots:
    """The snapshots of one fit in `out`.

    `identity` is what a fit must have in common with the one that it continues, as JSON: its settings and its model.
    Raises RequestError, with the settings that differ, when `out` holds the snapshots of another fit.
    """

    def __init__(self, out: str | Path, identity: dict, minutes: float = 5.0):
        self.directory = Path(out) / _DIRECTORY
        self._identity, self._seconds = identity, 60 * minutes
        self._last = time.monotonic()
        self._stop = False
        for path in self._paths():
            self._require_same(path)

    def _paths(self) -> list[Path]:
        return sorted(self.directory.glob("[!.]*.safetensors"))  # a kill leaves .staging-*

    def reached(self) -> dict[str, float]:
        """{family: the step with which its fit goes on, infinite when it is finished}"""
        facts = {path.stem: self._facts(path) for path in self._paths() if path.stem in FAMILIES}
        return {family: math.inf if one["done"] else one["step"] for family, one in facts.items()}

    def _require_same(self, path: Path) -> None:
        if changes := differences(self._facts(path)["identity"], self._identity):
            raise RequestError(
                f"{self.directory.parent} holds an unfinished fit with other settings ({changes}); run it with those, "
                "give another directory, or pass --restart to discard it."
            )

    def load(self, family: str) -> tuple[dict[str, torch.Tensor], dict] | None:
        """(tensors, facts) that were saved of a family; None when there are none."""
        path = self.directory / f"{family}.safetensors"
        if not path.is_file():
            return None
        facts = self._facts(path)
        with safe_open(path, framework="pt") as handle:
            return {key: handle.get_tensor(key) for key in handle.keys()}, facts  # noqa: SIM118

    def _facts(self, path: Path) -> dict:
        try:
            with safe_open(path, framework="pt") as handle:
                return json.loads(handle.metadata()["facts"])
        except (SafetensorError, OSError, TypeError, KeyError, ValueError) as error:
            raise GlobeError(
                f"The snapshot {path} is damaged ({error}); pass --restart to discard it and begin again."
            ) from error

    def save(self, family: str, tensors: dict[str, torch.Tensor], facts: dict) -> None:
        """Replace the snapshot of a family. Raises GlobeError for a full disk, and the one before is kept."""
        self.directory.mkdir(parents=True, exist_ok=True)
        metadata = {"facts": json.dumps(facts | {"identity": self._identity})}
        try:
            with replacing_file(self.directory / f"{family}.safetensors") as path:
                save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=metadata)
        finally:
            if not any(self.directory.iterdir()):
                self.directory.rmdir()
        self._last = time.monotonic()

    def due(self) -> bool:
        """Whether it is time for the next one."""
        return self._stop or time.monotonic() - self._last >= self._seconds

    def stop_if_asked(self) -> None:
        """Raises KeyboardInterrupt when Ctrl-C was pressed since the last call: what was saved is complete."""
        if self._stop:
            raise KeyboardInterrupt

    @contextmanager
    def catching_interrupts(self) -> Iterator[None]:
        """Inside, the first Ctrl-C waits for the step to end and for its snapshot; the second does not."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        usual = signal.getsignal(signal.SIGINT)

        def ask_to_stop(*_) -> None:
            self._stop = True
            signal.signal(signal.SIGINT, usual)

        signal.signal(signal.SIGINT, ask_to_stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, usual)


def stream_path(out: str | Path) -> Path:
    """The metric stream of an unfinished fit in `out`."""
    return Path(out) / _DIRECTORY / METRICS_NAME


def discard_snapshots(out: str | Path) -> None:
    """Remove all snapshots in `out`: the fit is finished, or begins again."""
    shutil.rmtree(Path(out) / _DIRECTORY, ignore_errors=True)


def differences(found: dict, wanted: dict) -> str:
    """The settings that differ, as a part of a sentence, with the values found and wanted; empty when none does."""
    # through JSON, as what was found came
    was, now = (_flat(json.loads(json.dumps(one))) for one in (found, wanted))
    differing = [key for key in {**now, **was} if was.get(key, _ABSENT) != now.get(key, _ABSENT)]
    return ", ".join(f"{key} was {was.get(key)} and is {now.get(key)}" for key in differing)


def _flat(settings: dict, prefix: str = "") -> dict:
    """{"varpro.steps": 500, ...}: nested settings under dotted names."""
    flat = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
