"""Where an interrupted fit goes on: files beside the checkpoint to be, one per family, step and rank.

A rank writes its part of a step, waits until all have, and removes that of the step before. Whenever a rank is killed,
there is so a step of which every part is complete, and the newest such step is where the fit goes on.
"""

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

from globe_fit.run.distributed import ALONE, Ranks
from globe_kernels.errors import GlobeError, RequestError
from globe_kernels.format.architectures import FAMILIES
from globe_kernels.format.checkpoint import METRICS_NAME
from globe_kernels.format.files import replacing_file

_DIRECTORY = ".snapshot"
_ABSENT = object()


class Snapshots:
    """The snapshots of one fit in `out`, a directory that all `ranks` see.

    `identity` is what a fit must have in common with the one that it continues, as JSON: its settings and its model;
    the number of ranks is part of it. Raises RequestError, with the settings that differ, when `out` holds the
    snapshots of another fit.
    """

    def __init__(self, out: str | Path, identity: dict, minutes: float = 5.0, ranks: Ranks = ALONE):
        self.directory = Path(out) / _DIRECTORY
        self._identity, self._seconds = identity | {"ranks": ranks.world}, 60 * minutes
        self._last = time.monotonic()
        self._stop, self._ranks = False, ranks
        for path in self._parts():
            self._require_same(path)
        self._keep_common_steps()

    def _parts(self, name: str = "*") -> list[Path]:
        """What this rank has written, of each step."""
        return sorted(self.directory.glob(f"{name}-*-{self._ranks.rank}.safetensors"))

    def _keep_common_steps(self) -> None:
        """Of each family the newest step that all ranks have, and of this rank no other."""
        newest = [max((_step(path) for path in self._parts(family)), default=-1) for family in FAMILIES]
        # a rank goes on to the next step only when all have this one: the newest of the last rank is what all have
        common = [min(steps) for steps in zip(*self._ranks.every(*newest), strict=True)]
        for family, step in zip(FAMILIES, common, strict=True):
            self._remove(family, but=int(step))
        for partial in self.directory.glob(f"*-{self._ranks.rank}.safetensors.partial"):  # a kill leaves them
            partial.unlink()

    def _remove(self, name: str, but: int) -> None:
        for path in self._parts(name):
            if _step(path) != but:
                path.unlink()

    def reached(self) -> dict[str, float]:
        """{family: the step with which its fit goes on, infinite when it is finished}"""
        facts = {family: self._facts(path) for family in FAMILIES for path in self._parts(family)}
        return {family: math.inf if one["done"] else one["step"] for family, one in facts.items()}

    def _require_same(self, path: Path) -> None:
        if changes := differences(self._facts(path)["identity"], self._identity):
            raise RequestError(
                f"{self.directory.parent} holds an unfinished fit with other settings ({changes}); run it with those, "
                "give another directory, or pass --restart to discard it."
            )

    def load(self, family: str) -> tuple[dict[str, torch.Tensor], dict] | None:
        """(tensors, facts) that this rank saved of a family; None when there are none."""
        parts = self._parts(family)
        if not parts:
            return None
        (path,) = parts
        facts = self._facts(path)
        with safe_open(path, framework="pt") as handle:
            # copies: how products round may depend on where in a cache line a tensor begins, in a file anywhere
            return {key: handle.get_tensor(key).clone() for key in handle.keys()}, facts  # noqa: SIM118

    def _facts(self, path: Path) -> dict:
        try:
            with safe_open(path, framework="pt") as handle:
                return json.loads(handle.metadata()["facts"])
        except (SafetensorError, OSError, TypeError, KeyError, ValueError) as error:
            raise GlobeError(
                f"The snapshot {path} is damaged ({error}); pass --restart to discard it and begin again."
            ) from error

    def save(self, family: str, step: int, tensors: dict[str, torch.Tensor], facts: dict) -> None:
        """Replace the snapshot of a family, the part of this rank, by that of `step`; all ranks save the same. Raises
        GlobeError for a full disk, and the one before is kept."""
        self.directory.mkdir(parents=True, exist_ok=True)
        metadata = {"facts": json.dumps(facts | {"identity": self._identity})}
        try:
            with replacing_file(self.directory / f"{family}-{step}-{self._ranks.rank}.safetensors") as path:
                save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=metadata)
        finally:
            if not any(self.directory.iterdir()):
                self.directory.rmdir()
        self._ranks.every(0)  # all have written theirs
        self._remove(family, but=step)
        self._last = time.monotonic()

    def due(self) -> bool:
        """Whether it is time for the next one: on one rank is on all."""
        return self._any(self._stop or time.monotonic() - self._last >= self._seconds)

    def stop_if_asked(self) -> None:
        """Raises KeyboardInterrupt, on all ranks, when Ctrl-C was pressed: what was saved is complete."""
        if self._any(self._stop):
            raise KeyboardInterrupt

    def _any(self, wish: bool) -> bool:
        return any(value for (value,) in self._ranks.every(wish))

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


def _step(path: Path) -> int:
    return int(path.name.split("-")[-2])


def _flat(settings: dict, prefix: str = "") -> dict:
    """{"varpro.steps": 500, ...}: nested settings under dotted names."""
    flat = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
