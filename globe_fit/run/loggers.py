"""Send the records of a running fit to a file beside its snapshots, and to Weights & Biases."""

import importlib
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from globe_fit.run.reports import read_record
from globe_fit.run.snapshots import Snapshots, stream_path
from globe_kernels.errors import RequestError, tolerating
from globe_kernels.format.files import inner_file
from globe_kernels.format.names import FAMILIES, METRICS_NAME


class MetricStream:
    """Writes the record of every step of the fit that `snapshots` belongs to; used as a context manager.

    The file is metrics.jsonl in the directory of the snapshots. A record is a line of the file at once, so a fit that
    is killed leaves its curve. A fit that continues keeps the records before its snapshot, so no step is in the file
    twice. Each of `listeners` gets the same records, the kept records first. After a record that cannot be written the
    file gets no other record, with a warning: its curve would have a hole, and the fit goes on.
    """

    def __init__(self, snapshots: Snapshots, listeners: Sequence[Callable[[dict], object]] = ()):
        self._path, reached = stream_path(snapshots.directory.parent), snapshots.reached()
        self._kept = [record for record in read_stream(self._path) if record["step"] < reached.get(record["family"], 0)]
        self._listeners = listeners
        self._file: Any = None  # opened with the first record: a fit that is refused leaves nothing
        self._is_writable = True

    def __enter__(self) -> "MetricStream":
        return self

    def __call__(self, record: dict) -> None:
        """Write a record, and give it to the listeners."""
        new, self._kept = [*self._kept, record], []
        if self._is_writable:
            self._is_writable = False
            with tolerating(f"Writing {self._path}", "the fit goes on, and the curve of later steps is not kept"):
                self._write(new)
                self._is_writable = True
        for each in new:
            for listener in self._listeners:
                listener(each)

    def _write(self, records: list[dict]) -> None:
        is_new, partial = self._file is None, self._path.with_name(f"{METRICS_NAME}.partial")
        if is_new:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            partial.unlink(missing_ok=True)  # a pipe would wait for a reader, a link lead elsewhere
            self._file = partial.open("w", encoding="utf-8")
        self._file.writelines(json.dumps(each) + "\n" for each in records)
        self._file.flush()
        if is_new:
            partial.replace(self._path)  # whole, so that a kill costs no kept record

    def __exit__(self, *_) -> None:
        if self._file is not None:
            with suppress(OSError):  # the last record was flushed, or there was a warning
                self._file.close()


def read_stream(path: Path) -> list[dict]:
    """Read the records of the metric stream of an unfinished fit: none where there is no file.

    Raises GlobeError for a link to a file of another directory.
    """
    if not inner_file(path.parent, path.name).is_file():
        return []
    return records_of(path.read_text(encoding="utf-8", errors="replace"))


def records_of(stream: str) -> list[dict]:
    """Parse a metric stream, but for the line that a kill cut short."""
    records = []
    for line in stream.splitlines():
        with suppress(ValueError):
            records.append(read_record(line))
    return records


class WandbRun:
    """A new run of a Weights & Biases project, with `facts` about the fit; used as a context manager.

    WANDB_MODE=offline needs no account. Raises RequestError when wandb is not installed or begins no run. Once the run
    has begun, wandb fails with a warning and gets no more records.
    """

    def __init__(self, project: str, facts: dict):
        try:
            self._wandb = importlib.import_module("wandb")
        except ImportError:
            raise RequestError(
                "wandb is not installed; run `pip install wandb`, or fit without --wandb: the metrics are in "
                f"{METRICS_NAME} anyway."
            ) from None
        try:
            self._run = self._wandb.init(project=project, config=facts)
            for family in FAMILIES:  # both families count their steps from 0
                self._run.define_metric(f"{family}/*", step_metric=f"{family}/step")
        except Exception as error:  # of wandb, or of the network below it
            raise RequestError(
                f"wandb began no run of {project!r} ({error}); run `wandb login`, set WANDB_MODE=offline, or fit "
                "without --wandb."
            ) from error
        self._is_heard = True

    def __enter__(self) -> "WandbRun":
        return self

    def log(self, record: dict) -> None:
        """Send a record, under names that begin with its family."""
        if not self._is_heard:
            return
        self._is_heard = False
        with tolerating("Sending metrics to wandb", f"the fit goes on, and {METRICS_NAME} has the metrics"):
            values = {f"{record['family']}/{name}": self._value(value) for name, value in record.items()}
            self._run.log({name: value for name, value in values.items() if value is not None})
            self._is_heard = True

    def _value(self, value: Any) -> Any:
        if isinstance(value, dict):
            return self._wandb.Histogram(np_histogram=(value["counts"], value["edges"]))
        return value

    def __exit__(self, kind: type | None, *_) -> None:
        with tolerating("Ending the run of wandb", f"{METRICS_NAME} has the metrics"):
            self._run.finish(exit_code=0 if kind is None else 1)
