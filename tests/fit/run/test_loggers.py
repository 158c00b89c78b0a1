"""The records of a running fit: on disk at once, no step twice after an interruption, the same records to wandb."""

import json
import sys
from contextlib import ExitStack
from types import SimpleNamespace

import pytest

from globe_fit import ExpertSource, fit
from globe_fit.fitting import open_snapshots
from globe_fit.run.loggers import MetricStream, WandbRun, read_stream
from globe_kernels.errors import GlobeWarning, RequestError
from tests.conftest import TINY_FIT

STEPS = [(family, step) for family in ("gate", "up") for step in range(TINY_FIT.varpro.steps + 1)]


@pytest.fixture
def source(save_tiny) -> ExpertSource:
    return ExpertSource(save_tiny("qwen3_moe"))


def run(source, out, *, stop_at=None, minutes=0.0, wandb_project=None):
    """A fit with a stream, and with wandb if asked, that ends like a kill at the record `stop_at`."""
    snapshots = open_snapshots(out, source, TINY_FIT, minutes)
    with ExitStack() as stack:
        runs = [] if wandb_project is None else [stack.enter_context(WandbRun(wandb_project, {"rank": 3}))]
        log = stack.enter_context(MetricStream(snapshots, [run.log for run in runs]))

        def on_step(record):
            log(record)
            if (record["family"], record["step"]) == stop_at:
                raise KeyboardInterrupt

        return fit(source, TINY_FIT, on_step=on_step, snapshots=snapshots)


def steps(out) -> list[tuple[str, int]]:
    return [(record["family"], record["step"]) for record in read_stream(out / ".snapshot" / "metrics.jsonl")]


@pytest.mark.parametrize("stop_at", [("gate", 4), ("up", 2)], ids=str)
def test_a_killed_fit_leaves_its_curve_and_goes_on_without_a_step_twice(source, tmp_path, stop_at):
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path, stop_at=stop_at)
    assert steps(tmp_path) == STEPS[: STEPS.index(stop_at) + 1]
    stream = tmp_path / ".snapshot" / "metrics.jsonl"
    stream.write_text(stream.read_text() + '{"step": 5, "fam')  # cut short
    (tmp_path / ".snapshot" / ".staging-gate.safetensors").write_bytes(b"cut short too")
    result = run(source, tmp_path)
    assert steps(tmp_path) == STEPS
    kept = [record for record in read_stream(stream) if record["step"] in (0, TINY_FIT.varpro.steps)]
    assert kept == result.history


def test_a_fit_without_a_snapshot_begins_an_empty_stream(source, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path, stop_at=("gate", 4), minutes=60)
    assert steps(tmp_path) == STEPS[:5]
    run(source, tmp_path, minutes=60)
    assert steps(tmp_path) == STEPS


def test_a_stream_that_cannot_be_written(source, tmp_path):
    (tmp_path / ".snapshot" / "metrics.jsonl").mkdir(parents=True)
    with pytest.warns(GlobeWarning, match="metrics.jsonl failed .*; the fit goes on") as warned:
        result = run(source, tmp_path)
    assert len(warned) == 1 and result.history[-1]["step"] == TINY_FIT.varpro.steps


@pytest.fixture
def wandb(monkeypatch):
    """Stands in for the module and keeps what it gets."""
    kept = SimpleNamespace(logged=[], steps=[], exit_code=None, settings=None)

    class Error(Exception):
        pass

    def init(**settings):
        if settings["project"] == "refused":
            raise Error("no API key")
        kept.settings = settings
        return SimpleNamespace(
            define_metric=lambda name, step_metric: kept.steps.append((name, step_metric)),
            log=kept.logged.append,
            finish=lambda exit_code: setattr(kept, "exit_code", exit_code),
        )

    module = SimpleNamespace(init=init, Error=Error, Histogram=lambda np_histogram: ("histogram", *np_histogram))
    monkeypatch.setitem(sys.modules, "wandb", module)
    return kept


def test_wandb_gets_the_same_records(source, tmp_path, wandb):
    run(source, tmp_path, wandb_project="mine")
    assert wandb.settings == {"project": "mine", "config": {"rank": 3}}
    assert wandb.steps == [("gate/*", "gate/step"), ("up/*", "up/step")]
    stream = read_stream(tmp_path / ".snapshot" / "metrics.jsonl")
    assert len(wandb.logged) == len(stream) == len(STEPS)
    for sent, record in zip(wandb.logged, stream, strict=True):
        family = record["family"]
        assert sent[f"{family}/relative_error"] == record["relative_error"]
        if "support_histogram" in record:
            histogram = record["support_histogram"]
            assert sent[f"{family}/support_histogram"] == ("histogram", histogram["counts"], histogram["edges"])
    assert wandb.exit_code == 0


def test_wandb_gets_the_whole_curve_of_a_fit_that_goes_on(source, tmp_path, wandb):
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path, stop_at=("up", 2), wandb_project="mine")
    assert wandb.exit_code == 1
    wandb.logged.clear()
    run(source, tmp_path, wandb_project="mine")
    found = [
        (family, sent[f"{family}/step"])
        for sent in wandb.logged
        for family in ("gate", "up")
        if f"{family}/step" in sent
    ]
    assert found == STEPS


def test_wandb_that_is_missing_or_refuses(source, tmp_path, wandb, monkeypatch):
    with pytest.raises(RequestError, match="wandb began no run of 'refused' .no API key.; run `wandb login`"):
        run(source, tmp_path, wandb_project="refused")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(RequestError, match="wandb is not installed; run `pip install wandb`"):
        run(source, tmp_path, wandb_project="mine")
    assert not any(tmp_path.iterdir())


def test_a_stream_is_strict_json(source, tmp_path):
    run(source, tmp_path)

    def refuse(constant):
        raise AssertionError(constant)

    for line in (tmp_path / ".snapshot" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)
