"""Reports and records that were damaged: refused in a sentence, or left out of a stream."""

import json
import shutil
from pathlib import Path

import pytest

from globe_fit.result import stored_fit
from globe_fit.run.loggers import read_stream
from globe_fit.run.reports import read_report
from globe_kernels import GlobeCheckpoint
from globe_kernels.errors import GlobeError


@pytest.fixture
def directory(fit_tiny, tmp_path) -> Path:
    return Path(shutil.copytree(fit_tiny()[0], tmp_path / "globe"))


def change_report(directory: Path, place: str, value: object) -> GlobeCheckpoint:
    path = directory / "fit_report.json"
    report = json.loads(path.read_text())
    report["base"] = {"bytes": 2000, "rest_bytes": 500, "top_k": 2}
    *owners, key = place.split(".")
    owner = report
    for name in owners:
        owner = owner[name]
    owner[key] = value
    path.write_text(json.dumps(report))
    return GlobeCheckpoint(directory)


def test_the_report_of_a_fit(directory):
    checkpoint = change_report(directory, "later", {"version": 9})
    report = read_report(checkpoint)
    assert report["later"] == {"version": 9} and report["families"]["up"]["relative_error"] > 0
    assert stored_fit(checkpoint).status.completed
    (directory / "fit_report.json").unlink()
    checkpoint = GlobeCheckpoint(directory)
    assert read_report(checkpoint) == {}
    with pytest.raises(GlobeError, match=r"fit_report.json has no families; restore the file"):
        stored_fit(checkpoint)


@pytest.mark.parametrize(
    ("place", "value", "sentence"),
    [
        ("families.up", None, "has None as families.up"),
        ("families.gate.relative_error", "0.1", "has '0.1' as families.gate.relative_error"),
        ("families.gate.rank_bound", float("nan"), "is not valid JSON .a number is NaN or infinite"),
        ("families.gate.mse", [], "as mse, where GloBE expects a finite number"),
        ("families.gate.relative_error_by_layer", {"7": 0.5}, "errors of other layers for gate than for up"),
        ("families.gate.support_histogram.edges", [0.5], "support_histogram whose bins do not follow"),
        ("families.gate.support_histogram.counts", 3, "has 3 as support_histogram.counts"),
        ("families.up.spot_checks", [{}], r"has nothing as spot_checks\[0\].angles_degrees"),
        ("status.completed", "yes", "has 'yes' as status.completed"),
        ("base.top_k", 1000, "1000 of 8 experts per token"),
        ("base.rest_bytes", 2000, "2000 of them beside gate and up"),
        ("command", ["globe"], "as command"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_damaged_report(directory, place, value, sentence):
    checkpoint = change_report(directory, place, value)
    with pytest.raises(GlobeError, match=sentence):
        read_report(checkpoint)


def test_a_damaged_stream(directory):
    path = directory / "metrics.jsonl"
    first, *others = path.read_text().splitlines()
    record = json.loads(first)
    damaged = [record | {"step": -1}, record | {"family": "down"}, record | {"seconds": float("inf")}, [record], None]
    lines = [first, *map(json.dumps, damaged), first[:50], 500 * "[" + 500 * "]", *others]
    path.write_bytes("\n".join(lines).encode() + b"\n\x80\n")
    assert read_stream(path) == [record, *map(json.loads, others)]
    outside = directory.parent / "metrics.jsonl"
    path.rename(outside)
    path.symlink_to(outside)
    with pytest.raises(GlobeError, match="which is outside of the directory"):
        read_stream(path)
