"""Fits of one model over many sizes: every combination of the given lists is a point, and each point has a directory.

A sweep reads its report from the checkpoints of its points. It does not fit a finished point again, and it continues an
unfinished point from its snapshots, so the same sweep after an interruption ends with the same table.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from globe_fit.cli import plots
from globe_fit.compression import compress, finished_fit
from globe_fit.config import FitConfig, resolve_device
from globe_fit.data.model import load_model, shared_copy
from globe_fit.data.source import ExpertSource
from globe_fit.fitting import open_snapshots
from globe_fit.measure.evaluate import evaluate, read_token_by_token
from globe_fit.plan.fitting import TEXT_BYTES, disk_bytes
from globe_fit.plan.footprint import footprint, footprint_of
from globe_fit.plan.timing import time_fit
from globe_fit.result import stored_fit
from globe_fit.run.progress import SILENT, Progress
from globe_fit.run.snapshots import Snapshots, discard_snapshots, snapshot_bytes
from globe_fit.sizes import resolve_sizes
from globe_kernels import cache_stats, set_strategy
from globe_kernels.errors import GlobeError, RequestError, tolerating
from globe_kernels.format.checkpoint import GlobeCheckpoint, GlobeConfig
from globe_kernels.format.directories import holds_fit, holds_model, is_empty
from globe_kernels.format.json_text import to_json
from globe_kernels.format.names import FAMILIES
from globe_kernels.format.writing import replacing_file, require_room
from globe_kernels.model.patching import patch
from globe_kernels.units import parse_bytes

ROWS_NAME = "sweep.jsonl"
PLOT_NAME = "sweep.png"
_NO_LIMIT = "none"


@dataclass(frozen=True)
class Point:
    """A fit of a sweep."""

    config: FitConfig  # rank and atoms are given, ratio is not
    sizes: GlobeConfig

    @property
    def name(self) -> str:
        """Name of its directory, such as r64-m34-s12-u17."""
        config = self.config
        palette = "" if config.palette is None else f"-u{config.palette}"
        return f"r{config.rank}-m{config.atoms}-s{config.support}{palette}"

    @property
    def key(self) -> dict:
        """The sizes that identify a row."""
        config = self.config
        return {"m": config.atoms, "r": config.rank, "target_support": config.support, "palette": config.palette}


def read_lists(options: dict[str, str | None]) -> dict[str, list]:
    """Read comma-separated lists: {setting of FitConfig: its values}, without the options that are None.

    Raises RequestError for a word that is not a number; a palette may also be "none".
    """
    lists: dict[str, list] = {}
    for name, text in options.items():
        if text is None:
            continue
        number: Callable[[str], Any] = float if name == "ratio" else int
        try:
            lists[name] = [
                None if name == "palette" and word.strip() == _NO_LIMIT else number(word) for word in text.split(",")
            ]
        except ValueError:
            example = {"ratio": "0.5,0.625", "palette": f"{_NO_LIMIT},17"}.get(name, "12,24")
            raise RequestError(
                f"{name} is {text!r}; expected numbers separated by commas, such as {example}."
            ) from None
    return lists


def read_cache_bytes(text: str | None) -> list[int]:
    """Read a comma-separated list of sizes such as 1MB,4MB. Raises RequestError."""
    return [] if text is None else [parse_bytes(word) for word in text.split(",")]


def plan_points(source: ExpertSource, config: FitConfig, lists: dict[str, list]) -> list[Point]:
    """Combine all values of `lists`, with the other settings of `config`; equal sizes are one point.

    Raises RequestError when a combination has sizes out of range.
    """
    config = replace(config, device=resolve_device(config.device))
    points: dict[str, Point] = {}
    refused: list[RequestError] = []
    combinations = list(itertools.product(*lists.values()))
    for values in combinations:
        try:
            wanted = replace(config, **dict(zip(lists, values, strict=True)))
            sizes = resolve_sizes(source.base, wanted)
        except RequestError as error:
            refused.append(error)
            continue
        point = Point(replace(wanted, ratio=None, rank=sizes.rank, atoms=sizes.num_atoms), sizes)
        points.setdefault(point.name, point)
    if refused:
        raise RequestError(
            f"{len(refused)} of the {len(combinations)} points of the sweep cannot be fitted, so no point is fitted; "
            f"the first refusal: {refused[0]}"
        )
    return list(points.values())


class Sweep:
    """The points of a sweep in the directory `out`.

    Raises RequestError when `out` holds a point with other settings, GlobeError when the disk has no
    room for all points. With `restart` the fits of the points count as absent, and `run` fits over them.
    """

    def __init__(self, source: ExpertSource, points: list[Point], out: Path, *, restart: bool, minutes: float):
        self._source, self.points, self._out = source, points, out
        self._restart, self._minutes = restart, minutes
        self.finished = set() if restart else {point.name for point in points if self._is_finished(point)}
        missing = [point for point in points if point.name not in self.finished]
        if not restart:
            for point in missing:
                self._snapshots(point)
        # of every point in turn: the checkpoints before it, and its own peak
        before = itertools.accumulate((point.sizes.tensor_bytes + TEXT_BYTES for point in missing), initial=0)
        peaks = (done + disk_bytes(point.sizes, point.config) for done, point in zip(before, missing, strict=False))
        self.disk_bytes = max(peaks, default=0)
        require_room(out, self.disk_bytes - sum(snapshot_bytes(out / point.name) for point in missing))

    def _is_finished(self, point: Point) -> bool:
        out = self._out / point.name
        # a fit whose snapshots are there may have been killed before its last file
        return finished_fit(out, self._source, point.sizes, point.config) is not None

    def _snapshots(self, point: Point) -> Snapshots:
        return open_snapshots(self._out / point.name, self._source, point.config, self._minutes)

    def estimate(self) -> list[dict]:
        """Predict a row per point: its bytes and its seconds, 0 for a finished point, None where timing has no room."""
        rows = []
        for point in self.points:
            done = point.name in self.finished
            timing = None if done else time_fit(self._source, point.sizes, point.config)
            seconds = 0.0 if done else timing and timing.seconds
            size = self._bytes(point.sizes.tensor_bytes) | {"sizes": footprint(point.sizes, self._source.facts)}
            rows.append({"point": point.name, **point.key, **size, "finished": done, "seconds": seconds})
        return rows

    def _bytes(self, on_disk: int) -> dict:
        dense = self._source.base.dense_bytes
        return {"bytes": {"dense_experts": dense, "globe_on_disk": on_disk}, "ratio": on_disk / dense}

    def run(self, progress: Progress) -> list[dict]:
        """Fit the points that are not finished; returns a row per point."""
        for number, point in enumerate(self.points, start=1):
            if point.name in self.finished:
                progress.tell(f"point {point.name} is finished")
                discard_snapshots(self._out / point.name)  # a kill has left a part of them
            else:
                self._fit(point, progress, f"{point.name} ({number} of {len(self.points)})")
        return [self._row(point) for point in self.points]

    def measure(
        self, rows: list[dict], windows: torch.Tensor, cache_bytes: Sequence[int], progress: Progress
    ) -> list[dict]:
        """Add the quality of each point on `windows` (globe_fit.data.model.token_windows) to its row.

        Each point also gets a row for every S_cache of `cache_bytes`: hits and speed of a cache of that size while the
        model reads a window token by token.
        """
        device = self.points[0].config.device
        dense = load_model(self._source.model_dir, device)
        progress.begin("eval of the points", len(rows))
        measured = []
        for number, row in enumerate(rows, start=1):
            globe = shared_copy(dense)
            patch(globe, self._out / row["point"])
            measured.append(row | _quality(dense, globe, windows) | {"S_cache": None})
            measured += [measured[-1] | _cached(globe, size, windows[0]) for size in cache_bytes]
            progress.advance(number)
        return measured

    def _fit(self, point: Point, progress: Progress, name: str) -> None:
        progress.tell(f"point {name}")
        of_point = replace(progress, say=SILENT.say)  # the command has said its sentences about the model already
        model_dir, out = self._source.model_dir, self._out / point.name
        try:
            options = {"calibrate": None, "resume": not self._restart, "snapshot_minutes": self._minutes}
            compress(model_dir, out, point.config, progress=of_point, **options)
        except GlobeError as error:
            raise type(error)(f"Point {point.name}: {error}") from error
        except KeyboardInterrupt as stopped:
            raise type(stopped)(
                f"interrupted in point {name}; the same command keeps the finished points and goes on from there"
            ) from stopped

    def _row(self, point: Point) -> dict:
        checkpoint = GlobeCheckpoint(self._out / point.name, verify=False)  # figures, no weights
        fitted = stored_fit(checkpoint)
        families, records = fitted.report["families"], fitted.history
        seconds = {record["family"]: record["seconds"] for record in records}  # of the last record of each family
        metrics = ("relative_error", "rank_bound", "svd_equal_bytes", "largest_palette")
        return {
            "point": point.name,
            **point.key,
            **self._bytes(checkpoint.bytes_on_disk),
            "sizes": footprint_of(checkpoint),
            **{name: {family: families[family].get(name) for family in FAMILIES} for name in metrics},
            "seconds": sum(seconds.values()),
            "completed": fitted.status.completed,
        }


def _quality(dense: nn.Module, globe: nn.Module, windows: torch.Tensor) -> dict:
    quality = evaluate({"dense": dense, "globe": globe}, windows)
    found = {name: getattr(quality["globe"], name) for name in ("perplexity", "kl", "top1")}
    return found | {"dense_perplexity": quality["dense"].perplexity}


def _cached(globe: nn.Module, cache_bytes: int, window: torch.Tensor) -> dict:
    set_strategy(globe, "cached", cache_bytes=cache_bytes)
    tokens_per_s = read_token_by_token(globe, window)
    stats = cache_stats(globe)
    return {"S_cache": cache_bytes, "hit_rate": stats.hit_rate, "slots": stats.slots, "tokens_per_s": tokens_per_s}


def is_sweep(directory: Path) -> bool:
    """Whether `directory` holds a sweep: its rows, or before there are rows nothing but the fits of points."""
    return not holds_model(directory) and (
        (directory / ROWS_NAME).is_file()
        or all(
            path.name == PLOT_NAME or path.is_dir() and (holds_fit(path) or is_empty(path))
            for path in directory.glob("[!.]*")
        )
    )


def write_rows(rows: list[dict], out: Path) -> Path | None:
    """Write sweep.jsonl and sweep.png in `out`; returns the path of the plot, None where there is no plot.

    A failure is a warning: the checkpoints of the points have everything.
    """
    kept = f"the checkpoints in {out} are complete"
    with tolerating(f"Writing {ROWS_NAME}", kept), replacing_file(out / ROWS_NAME) as path:
        path.write_text("".join(to_json(row) + "\n" for row in rows), encoding="utf-8")
    with tolerating(f"Drawing {PLOT_NAME}", kept):
        try:
            figure = plots.sweep(list({row["point"]: row for row in rows}.values()))
        except RequestError:  # no matplotlib
            return None
        with replacing_file(out / PLOT_NAME) as path:
            plots.save_png(figure, "Error against bytes on disk", str(path))
        return out / PLOT_NAME
    return None
