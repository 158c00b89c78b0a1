"""The person who waits reads where the work stands: one live bar on a terminal, a few lines in a pipe."""

import os
import pty
import re
import subprocess
import sys

import pytest

from globe_fit import FitConfig, VarProConfig, compress
from globe_fit.run import display
from globe_fit.run.display import show_progress
from globe_fit.run.progress import FitStages, Progress

CONFIG = FitConfig(ratio=0.8, support=4, device="cpu", varpro=VarProConfig(steps=3))


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
    return now


def test_lines_in_a_pipe(clock, capsys):
    with show_progress() as shown:
        shown.begin("fit gate", 1500)
        for step in range(151):
            shown.note(f"error {1 / (step + 1):.4f}")
            shown.advance(step)
            clock[0] += 0.5
        clock[0] += 3 * 3600
        shown.advance(1500)
        shown.begin("export", 1)
        shown.advance(0.25)
        shown.tell("up is finished")
    first, *lines, last, export, told, ended = capsys.readouterr().err.splitlines()
    assert first == "00:00 fit gate"
    assert lines[0] == "00:10 fit gate step 20 of 1500, error 0.0476, 12:20 left"
    assert [line[:5] for line in lines] == ["00:10", "00:20", "00:30", "00:40", "00:50", "01:00", "01:10"]
    assert last == "3:01:16 fit gate step 1500 of 1500, error 0.0066"
    assert [export, told, ended] == ["3:01:16 export", "3:01:16 up is finished", "3:01:16 export 25 %"]


def test_a_fit_that_goes_on_counts_its_own_steps(clock, capsys):
    with show_progress() as shown:
        stages = FitStages(shown, {"gate": float("inf"), "up": 120}, 1500)
        stages.begin()
        for family, step in (("gate", 1500), ("up", 119), ("up", 120), ("up", 121), ("up", 122)):
            stages.advance({"family": family, "step": step, "relative_error": 0.5})
            clock[0] += 10
    lines = capsys.readouterr().err.splitlines()
    assert lines[:3] == ["00:00 gate is finished", "00:00 up goes on from step 120 of 1500", "00:00 fit up"]
    assert lines[3:] == [
        "00:20 fit up step 120 of 1500, error 0.5000",
        "00:30 fit up step 121 of 1500, error 0.5000, 3:49:50 left",
        "00:40 fit up step 122 of 1500, error 0.5000, 3:49:40 left",
    ]


def test_quiet_progress_says_sentences_alone(capsys):
    with show_progress(quiet=True) as shown:
        shown.begin("fit gate", 3)
        shown.advance(3)
        shown.tell("gate is finished")
        shown.say("These layers stay dense: 3.")
    assert capsys.readouterr().err == "globe: These layers stay dense: 3.\n"


BAR = """
from globe_fit.run.display import show_progress
with show_progress() as shown:
    for family in ("gate", "up"):
        shown.tell(f"next comes {family}")
        shown.begin(f"fit {family}", 1500)
        for step in range(0, 1501, 100):
            shown.note("error 0.0412")
            shown.advance(step)
    shown.say("a sentence of many words " * 6)
"""


def test_one_bar_on_a_terminal():
    master, slave = pty.openpty()
    environment = os.environ | {"COLUMNS": "80", "TERM": "xterm"}
    process = subprocess.Popen([sys.executable, "-c", BAR], stderr=slave, stdout=subprocess.PIPE, env=environment)
    os.close(slave)
    written = b""
    try:
        while part := os.read(master, 65536):
            written += part
    except OSError:  # the end of a terminal
        pass
    os.close(master)
    assert process.wait(timeout=60) == 0 and process.communicate()[0] == b""
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.decode())
    lines = [line for line in re.split(r"[\r\n]+", plain) if line.strip()]
    assert max(map(len, lines)) <= 80 and "…" not in plain
    kept = [re.sub(r"\d\d:\d\d ", "", line.rstrip()) for line in lines if "━" not in line]
    families = ("gate", "up")
    ends = {family: f"fit {family} step 1500 of 1500, error 0.0412" for family in families}
    assert kept[:3] == ["next comes gate", ends["gate"], "next comes up"] and kept[-1] == ends["up"]
    assert kept[3].startswith("globe: a sentence of many words")
    assert all(any(line.startswith(f"fit {f} ━") for line in lines) for f in families)
    assert any("━ step 0 of 1500" in line for line in lines)


def test_progress_in_python(save_tiny, tmp_path, capsys):
    compress(save_tiny("qwen3_moe"), tmp_path / "silent", CONFIG, calibrate=None)
    assert capsys.readouterr() == ("", "")
    compress(save_tiny("qwen3_moe"), tmp_path / "shown", CONFIG, progress=True, calibrate=None)
    lines = capsys.readouterr().err.splitlines()
    assert [re.sub(r"\d\d:\d\d |0\.\d+", "", line) for line in lines] == [
        "fit gate", "fit gate step 3 of 3, error ", "fit up", "fit up step 3 of 3, error "
    ]  # fmt: skip
    steps: list[float] = []
    compress(
        save_tiny("qwen3_moe"), tmp_path / "object", CONFIG, progress=Progress(advance=steps.append), calibrate=None
    )
    assert steps == [0, 1, 2, 3, 0, 1, 2, 3]


def test_an_interrupted_fit_says_where_it_goes_on(globe, model_dir, tmp_path, monkeypatch):
    options = ("--ratio", "0.8", "--support", "4", "--steps", "3", "--device", "cpu", "--snapshot-minutes", "0")
    command, advance = ("fit", "--no-calibrate", model_dir, "-o", tmp_path / "out", *options), FitStages.advance

    def stop(self, record):
        advance(self, record)
        if (record["family"], record["step"]) == ("up", 2):
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(FitStages, "advance", stop)
        code, _, stderr = globe(*command)
    snapshot = tmp_path / "out" / ".snapshot"
    expected = f"globe: interrupted; the same command goes on from step 2 of up (snapshot in {snapshot})."
    assert code == 130 and stderr.splitlines()[-1] == expected
    code, _, stderr = globe(*command)
    assert code == 0
    first, *lines = [line.split(" ", 1)[1] for line in stderr.splitlines()]
    assert first.startswith("Predicted on h100: ")
    assert lines[:3] == [
        "gate is finished",
        "up goes on from step 2 of 3",
        "fit up",
    ]
