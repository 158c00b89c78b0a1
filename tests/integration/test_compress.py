"""`globe_fit.compress` in Python: the bytes of the command line, an interruption, the requests that it refuses."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch

import globe_fit
from globe_fit import FitConfig, VarProConfig, compress
from globe_fit.calibration.self_text import sample_windows
from globe_fit.config import SELF
from globe_fit.run.progress import Progress
from globe_kernels.errors import GlobeError, RequestError
from globe_kernels.format.checkpoint import GlobeCheckpoint
from tests.integration.conftest import QUICK

# the settings of QUICK
CONFIG = FitConfig(ratio=0.8, support=4, device="cpu", varpro=VarProConfig(steps=3))
STEPS = [(family, step) for family in ("gate", "up") for step in range(CONFIG.steps + 1)]
TENSORS = "globe.safetensors"


def test_the_whole_run_writes_the_bytes_of_the_command_line(globe, model_dir, tmp_path):
    records: list[dict] = []
    result = compress(model_dir, tmp_path / "python", CONFIG, on_step=records.append, calibrate=None)
    assert [(record["family"], record["step"]) for record in records] == STEPS
    assert globe("fit", "--no-calibrate", model_dir, "-o", tmp_path / "shell", *QUICK)[0] == 0
    for name in (TENSORS, "globe_config.json"):
        assert (tmp_path / "python" / name).read_bytes() == (tmp_path / "shell" / name).read_bytes()

    checkpoint = GlobeCheckpoint(tmp_path / "python", verify=True)
    assert checkpoint.config == result.config and result.status.completed
    assert torch.equal(checkpoint.bank("gate"), result.families["gate"].bank)
    report = json.loads((tmp_path / "python" / "fit_report.json").read_text())
    assert report["families"]["up"]["relative_error"] == result.report["families"]["up"]["relative_error"]
    assert not (tmp_path / "python" / ".snapshot").exists()


def stop_at(family: str, step: int):
    def on_step(record: dict) -> None:
        if (record["family"], record["step"]) == (family, step):
            raise KeyboardInterrupt

    return on_step


def test_a_fit_continues_where_it_was_interrupted(model_dir, tmp_path):
    compress(model_dir, tmp_path / "whole", CONFIG, calibrate=None)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        compress(model_dir, out, CONFIG, on_step=stop_at("up", 1), snapshot_minutes=0, calibrate=None)
    assert not (out / TENSORS).exists() and (out / ".snapshot" / "metrics.jsonl").is_file()

    with pytest.raises(
        RequestError, match="unfinished fit with other settings .seed was 0 and is 1.; run the fit with"
    ):
        compress(model_dir, out, replace(CONFIG, seed=1), calibrate=None)
    records, seconds = [], json.loads((out / ".snapshot" / "metrics.jsonl").read_text().splitlines()[0])["seconds"]
    compress(model_dir, out, CONFIG, on_step=records.append, calibrate=None)
    assert [(record["family"], record["step"]) for record in records] == STEPS
    assert records[0]["seconds"] == seconds, "the records before the interruption are given again, not taken again"
    assert (out / TENSORS).read_bytes() == (tmp_path / "whole" / TENSORS).read_bytes()


def test_without_resume_a_fit_begins_again(model_dir, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        compress(model_dir, tmp_path / "out", CONFIG, on_step=stop_at("gate", 2), snapshot_minutes=0, calibrate=None)
    compress(model_dir, tmp_path / "out", replace(CONFIG, seed=1), resume=False, calibrate=None)
    assert GlobeCheckpoint(tmp_path / "out").config.provenance["seed"] == 1


def test_a_text_can_be_a_path_or_the_model_itself(with_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("globe_fit.calibration.metric.sample_windows", partial(sample_windows, count=2))
    stages: list[str] = []
    progress = Progress(begin=lambda name, total: stages.append(name))
    text = with_tokenizer / "text.txt"
    read = compress(with_tokenizer, tmp_path / "text", CONFIG, calibrate=text, progress=progress, memory_limit="1GB")
    assert stages == ["inputs", "fit gate", "fit up", "inputs of healing", "heal"]
    assert read.config.provenance["calibration"]["text"] == "text.txt"
    assert read.report["families"]["gate"]["calibrated_error"] > 0
    written = compress(with_tokenizer, tmp_path / "self", CONFIG, calibrate=SELF)
    assert written.config.provenance["calibration"]["text"] == SELF


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"config": replace(CONFIG, ratio=0.01)}, "ratio 0.01 cannot be reached on model"),
        ({"calibrate": "none.txt"}, "none.txt is not a file; give a text file to calibrate on"),
        ({"memory_limit": "100kB"}, "at its peak and the memory limit is 100 kB; give a smaller ratio"),
        ({"memory_limit": float("nan")}, "nan is no size; give a number with a unit"),
        ({"memory_limit": -5.0}, "-5.0 is no size"),
        ({"memory_limit": 1e5}, "at its peak and the memory limit is 100 kB; give a smaller ratio"),
        ({"memory_limit": "lots"}, "'lots' is no size"),
        (
            {"calibrate": SELF, "config": replace(CONFIG, solver="alternating")},
            "only varpro fits to a text, so give solver varpro or no text",
        ),
    ],
    ids=str,
)
def test_a_request_that_cannot_be_met(model_dir, tmp_path, options, sentence):
    with pytest.raises(RequestError, match=sentence):
        compress(model_dir, tmp_path / "out", **({"config": CONFIG, "calibrate": None} | options))
    assert not (tmp_path / "out").exists()


def test_a_fit_that_diverges_is_saved(model_dir, tmp_path):
    wild = replace(CONFIG, varpro=VarProConfig(steps=12, lr=1e30, warmup_steps=0))
    result = compress(model_dir, tmp_path / "out", wild, calibrate=None)
    assert not result.status.completed and "diverged" in result.status.advice
    assert GlobeCheckpoint(tmp_path / "out", verify=True).report()["status"]["completed"] is False
    with pytest.raises(GlobeError, match="diverged at step .* before its support was fixed"):
        compress(
            model_dir,
            tmp_path / "out",
            replace(wild, varpro=replace(wild.varpro, warmup_steps=20)),
            resume=False,
            calibrate=None,
        )


def test_the_verb_is_public():
    assert "compress" in globe_fit.__all__ and globe_fit.compress is compress
    assert all(getattr(globe_fit, name) for name in globe_fit.__all__)
