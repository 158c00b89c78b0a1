"""Where the metric stream of a running fit goes: a file beside its snapshots and, when asked for, Weights & Biases."""

import importlib
import json
from pathlib import Path
from typing import Any

from globe_fit.run.snapshots import Snapshots, stream_path
from globe_kernels.errors import GlobeError, RequestError
from globe_kernels.format.architectures import FAMILIES
from globe_kernels.format.checkpoint import METRICS_NAME


class Loggers:
    """Receives the record of every step of the fit that `snapshots` belongs to; used as a context manager.

    The file is metrics.jsonl in the directory of the snapshots, with a line as soon as there is a record: a fit that
    is killed leaves its curve. One that goes on keeps the lines before its snapshot, so no step is there twice. With
    `wandb_project` the same records go to a new run of that project, of a fit that goes on the kept ones too;
    WANDB_MODE=offline needs no account. Raises RequestError when there can be no such run.
    """

    def __init__(self, snapshots: Snapshots, wandb_project: str | None = None, config: dict | None = None):
        self._path, reached = stream_path(snapshots.directory.parent), snapshots.reached()
        self._kept = [one for one in read_stream(self._path) if one["step"] < reached.get(one["family"], 0)]
        self._file: Any = None  # opened with the first record: a fit that is refused leaves nothing
        self._run = None if wandb_project is None else _WandbRun(wandb_project, config)

    def __enter__(self) -> "Loggers":
        return self

    def __call__(self, record: dict) -> None:
        """One more record. Raises GlobeError when it cannot be written."""
        try:
            if self._file is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._path.open("w", encoding="utf-8")
                for kept in self._kept:
                    self._write(kept)
            self._write(record)
        except OSError as error:
            raise GlobeError(
                f"Writing {self._path} failed ({error}); mend the cause and run the same command again."
            ) from error

    def _write(self, record: dict) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        if self._run is not None:
            self._run.log(record)

    def __exit__(self, kind: type | None, *_) -> None:
        if self._file is not None:
            self._file.close()
        if self._run is not None:
            self._run.finish(0 if kind is None else 1)


def read_stream(path: Path) -> list[dict]:
    """The records of a metric stream; none where there is no file, and without the line that a kill cut short."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


class _WandbRun:
    def __init__(self, project: str, config: dict | None):
        try:
            self._wandb = importlib.import_module("wandb")
        except ImportError:
            raise RequestError(
                "wandb is not installed; run `pip install wandb`, or fit without --wandb: the metrics are in "
                f"{METRICS_NAME} anyway."
            ) from None
        try:
            self._run = self._wandb.init(project=project, config=config)
        except self._wandb.Error as error:
            raise RequestError(
                f"wandb began no run of {project!r} ({error}); run `wandb login`, set WANDB_MODE=offline, or fit "
                "without --wandb."
            ) from error
        for family in FAMILIES:  # both count their steps from 0
            self._run.define_metric(f"{family}/*", step_metric=f"{family}/step")

    def log(self, record: dict) -> None:
        values = {f"{record['family']}/{name}": self._value(value) for name, value in record.items()}
        self._run.log({name: value for name, value in values.items() if value is not None})

    def _value(self, value: Any) -> Any:
        if isinstance(value, dict):
            return self._wandb.Histogram(np_histogram=(value["counts"], value["edges"]))
        return value

    def finish(self, exit_code: int) -> None:
        self._run.finish(exit_code=exit_code)
