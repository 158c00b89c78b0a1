"""A fit that is killed, interrupted or short of disk goes on as if nothing had happened."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from globe_fit import ExpertSource, fit
from globe_fit.fitting import open_snapshots
from globe_fit.run.snapshots import Snapshots
from globe_kernels.errors import GlobeError, RequestError
from tests.conftest import TINY_FIT

# Kills itself at the given event, if there is one: an event is a step, or a snapshot that is half written.
SCRIPT = """
import os, signal, sys
from globe_fit import ExpertSource, FitConfig, VarProConfig, fit, save_fit
from globe_fit.run import snapshots
from globe_fit.fitting import open_snapshots

model, out, kill_at, half_written = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] == "half"
config = FitConfig(ratio=0.8, support=4, palette=6, varpro=VarProConfig(steps=12, warmup_steps=2))
events = 0

def event(happens_here):
    global events
    if happens_here:
        events += 1
        if events == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

write = snapshots.save_file
def save_file(tensors, path, metadata):
    write(tensors, path, metadata)
    if half_written:
        os.truncate(path, 1000)
    event(half_written)
    write(tensors, path, metadata)
snapshots.save_file = save_file

source = ExpertSource(model)
result = fit(
    source, config, on_step=lambda record: event(not half_written), snapshots=open_snapshots(out, source, config, 0)
)
save_fit(result, source, out)
"""
STEPS = 12  # of the script


def run(model: Path, out: Path, kill_at: int = 0, where: str = "step") -> int:
    arguments = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(model), str(out), str(kill_at), where]
    return subprocess.run(arguments, timeout=300, check=False).returncode


def digest(out: Path) -> str:
    return hashlib.sha256((out / "globe.safetensors").read_bytes()).hexdigest()


def test_killed_at_random_moments_the_result_is_the_same(save_tiny, tmp_path):
    model = save_tiny("qwen3_moe")
    assert run(model, tmp_path / "whole") == 0
    # of either family, before and after the support is fixed, between the two and while a snapshot is written
    moments = [(random.Random(0).randint(1, 2 * STEPS), "step") for _ in range(1)]
    moments += [(number, "step") for number in random.Random(1).sample(range(1, STEPS), 2)]
    moments += [(1, "half"), (random.Random(2).randint(2, STEPS), "half")]
    for number, where in moments:
        assert run(model, tmp_path / "killed", number, where) == -signal.SIGKILL
        assert not (tmp_path / "killed" / "globe.safetensors").exists()
    assert run(model, tmp_path / "killed") == 0
    assert digest(tmp_path / "killed") == digest(tmp_path / "whole")


def test_a_second_run_goes_on_and_does_not_begin_again(save_tiny, tmp_path):
    source = ExpertSource(save_tiny("qwen3_moe"))
    expected = fit(source, TINY_FIT)

    def stop_late(record):
        if record["family"] == "up" and record["step"] == 4:
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        fit(source, TINY_FIT, on_step=stop_late, snapshots=open_snapshots(tmp_path, source, TINY_FIT, 0))
    records: list[dict] = []
    snapshots = open_snapshots(tmp_path, source, TINY_FIT, 0)
    result = fit(source, TINY_FIT, on_step=records.append, snapshots=snapshots)
    # the exception waits for the end of its step
    assert [(record["family"], record["step"]) for record in records] == [("up", 5), ("up", 6)]
    for family in ("gate", "up"):
        assert torch.equal(result.families[family].adapter, expected.families[family].adapter)
        assert result.report["families"][family] == expected.report["families"][family]
    assert [record["relative_error"] for record in result.history] == [
        record["relative_error"] for record in expected.history
    ]


def unfinished(source, out: Path) -> None:
    """Leaves a snapshot of the first step in `out`: the exception waits for the end of the step."""

    def stop(record):
        if record["step"] == 0:
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        fit(source, TINY_FIT, on_step=stop, snapshots=open_snapshots(out, source, TINY_FIT, 0))


def test_other_weights_are_refused(noise_model, tmp_path):
    first, second = noise_model
    unfinished(first, tmp_path)
    with pytest.raises(RequestError, match="changed since the unfinished fit began; begin again with --restart"):
        fit(second, TINY_FIT, snapshots=open_snapshots(tmp_path, first, TINY_FIT))


@pytest.fixture
def noise_model(save_tiny, tmp_path_factory):
    """Two models that differ in their weights only."""
    from globe_kernels.testing import tiny_model

    path = tmp_path_factory.mktemp("other")
    tiny_model("qwen3_moe", seed=1).save_pretrained(path)
    return ExpertSource(save_tiny("qwen3_moe")), ExpertSource(path)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:500])


def flip_a_fact(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'\\"step\\": 1', b'\\"step\\": 2', 1))


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("damage", [cut, flip_a_fact, flip_a_bit, a_pipe])
def test_a_damaged_snapshot_is_named(save_tiny, tmp_path, damage):
    source = ExpertSource(save_tiny("qwen3_moe"))
    unfinished(source, tmp_path)
    path = tmp_path / ".snapshot" / "gate-1-0.safetensors"
    before = path.read_bytes()
    damage(path)
    assert not path.is_file() or path.read_bytes() != before
    with pytest.raises(GlobeError, match=r"gate-1-0.safetensors is damaged .* discard it \(--restart"):
        open_snapshots(tmp_path, source, TINY_FIT).load("gate")


def test_a_full_disk_keeps_the_snapshot_before(save_tiny, tmp_path, monkeypatch):
    source = ExpertSource(save_tiny("qwen3_moe"))
    unfinished(source, tmp_path)
    before = (tmp_path / ".snapshot" / "gate-1-0.safetensors").read_bytes()

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("globe_fit.run.snapshots.save_file", full)
    with pytest.raises(GlobeError, match="full"):
        fit(source, TINY_FIT, snapshots=open_snapshots(tmp_path, source, TINY_FIT, 0))
    assert [path.name for path in (tmp_path / ".snapshot").iterdir()] == ["gate-1-0.safetensors"]
    assert (tmp_path / ".snapshot" / "gate-1-0.safetensors").read_bytes() == before


def test_snapshots_come_in_time(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("globe_fit.run.snapshots.time.monotonic", lambda: now[0])
    snapshots = Snapshots(tmp_path, {}, minutes=2)
    now[0] += 119
    assert not snapshots.due()
    now[0] += 1
    assert snapshots.due()
    snapshots.save("gate", 1, {"x": torch.zeros(1)}, {"done": False})
    assert not snapshots.due()


# Prints a line of progress per step.
ALL_LINES = """
from globe_fit import __main__
from globe_fit.run import display
display._SECONDS = 0
__main__.main()
"""


def test_a_signal_inside_a_write_to_the_console_is_heard(save_tiny, tmp_path):
    source = ExpertSource(save_tiny("qwen3_moe"))

    def say(sentence: str) -> None:
        raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stderr>'>")

    snapshots = open_snapshots(tmp_path, source, TINY_FIT, 60, say=say)
    with snapshots.catching_interrupts():
        os.kill(os.getpid(), signal.SIGINT)
        assert snapshots.due()
        with pytest.raises(KeyboardInterrupt):
            snapshots.stop_if_asked()


def test_ctrl_c_leaves_a_state_to_go_on_from(save_tiny, tmp_path):
    """On the command line, where no snapshot was due: the first Ctrl-C takes one."""
    config = tmp_path / "fit.toml"
    config.write_text("[varpro]\nsteps = 3000\n")
    model, out = save_tiny("qwen3_moe"), tmp_path / "out"
    command = [
        sys.executable,
        "-c",
        ALL_LINES,
        "fit",
        "--no-calibrate",
        str(model),
        "-o",
        str(out),
        "--config",
        str(config),
    ]
    command += ["--ratio", "0.8", "--support", "4"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:  # a line of progress: the steps have begun
        if "fit gate step" in line:
            break
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    (snapshot,) = (out / ".snapshot").glob("gate-*-0.safetensors")
    step = snapshot.name.split("-")[1]
    sentence = f"interrupted; the same command goes on from step {step} of gate (snapshot in {out / '.snapshot'})."
    assert process.returncode == 130 and errors.endswith(f"globe: {sentence}\n") and "Traceback" not in errors
    config.write_text("[varpro]\nsteps = 2000\n")
    refused = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert refused.returncode == 2 and "varpro.steps was 3000 and is 2000" in refused.stderr
    config.write_text("[varpro]\nsteps = 2\n")
    done = subprocess.run([*command, "--restart"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not (out / ".snapshot").exists() and (out / "globe.safetensors").is_file()
