"""SIGTERM and Ctrl-C: a snapshot, a sentence, an exit code, and the same result after going on; on ranks too."""

import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
from torch import distributed

from globe_fit import FitConfig, VarProConfig, compress
from globe_fit.run import display
from globe_fit.run import distributed as ranks
from globe_fit.run.stopping import Terminated, interrupt_behind, terminating
from globe_kernels.errors import GlobeError
from tests.integration.conftest import QUICK
from tests.kills import contents, end, opened, start, stop_at_random

CONFIG = FitConfig(ratio=0.8, support=4, device="cpu", varpro=VarProConfig(steps=4))
LONG = 3000  # steps, of which no test waits for the last


@pytest.mark.parametrize("command", ["fit", "fit --calibrate self", "sweep"])
def test_sigterm_at_random_moments(command):
    with opened(command) as victim:
        _, _, finding = stop_at_random(victim, 3, seed=1, by=signal.SIGTERM)
        assert finding is None


@pytest.mark.parametrize("command", ["eval", "export"])
def test_sigterm_while_files_are_written(command):
    with opened(command) as victim:
        renames = [number for number, (name, _) in enumerate(victim.operations) if name.startswith("os.rename")]
        assert victim.stop_at(renames[0], False, signal.SIGTERM) is None


def test_sigterm_while_a_new_python_imports(save_tiny, tmp_path):
    command = [
        sys.executable,
        "-m",
        "globe_fit",
        "fit",
        "--no-calibrate",
        str(save_tiny("qwen3_moe")),
        "-o",
        str(tmp_path / "out"),
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    maps = Path(f"/proc/{process.pid}/maps")
    while "libtorch_cpu" not in maps.read_text() and process.poll() is None:  # the import of torch has begun
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=120) == (None, "globe: interrupted.\n") and process.returncode == 143


@pytest.fixture
def long_fit(save_tiny, tmp_path):
    """(Arguments of a fit of many steps, the file of its output)."""
    (tmp_path / "fit.toml").write_text(f"[varpro]\nsteps = {LONG}\n")
    options = ("--config", tmp_path / "fit.toml", "--ratio", "0.8", "--support", "4", "--device", "cpu")
    return ("fit", "--no-calibrate", save_tiny("qwen3_moe"), "-o", tmp_path / "out", *options), tmp_path / "log"


def wait_for(text: str, log: Path) -> None:
    deadline = time.monotonic() + 60
    while not log.exists() or text not in log.read_text():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)


def test_the_sentences_of_sigterm(long_fit, tmp_path):
    arguments, log = long_fit
    child = start(*arguments, output=log, before=lambda: setattr(display, "_SECONDS", 0))
    wait_for("fit gate step", log)
    for _ in range(2):  # `timeout` sends two
        os.kill(child, signal.SIGTERM)
    assert end(child) == 143
    (snapshot,) = (tmp_path / "out" / ".snapshot").glob("gate-*-0.safetensors")
    step = snapshot.name.split("-")[1]
    said = [line for line in log.read_text().splitlines() if line.startswith("globe: ")]
    assert said == [
        "globe: the fit stops when its step and a snapshot are complete; there is no snapshot before.",
        f"globe: interrupted; the same command goes on from step {step} of gate (snapshot in {snapshot.parent}).",
    ]


# --- two ranks, as torchrun starts them ---


@pytest.fixture
def two_ranks(long_fit):
    """Starts both ranks of a fit; returns (their ids, their logs)."""
    arguments, log = long_fit
    logs = [log.with_name(f"log-{rank}") for rank in range(2)]

    def begin(*more, before=lambda: None):
        store = distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        given = {"MASTER_ADDR": "localhost", "MASTER_PORT": store.port, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
        given |= {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": 0}
        given |= {"TORCHELASTIC_USE_AGENT_STORE": True}

        def prepare(rank: int) -> None:
            os.environ.update(
                {name: str(value) for name, value in (given | {"RANK": rank, "LOCAL_RANK": rank}).items()}
            )
            display._SECONDS = 0
            before()

        children = [start(*arguments, *more, output=logs[rank], before=partial(prepare, rank)) for rank in range(2)]
        return children, store

    return begin, logs


def said(logs: list[Path]) -> list[str]:
    text = "".join(log.read_text() for log in logs)
    assert "Traceback" not in text, text
    return [line for line in text.splitlines() if line.startswith("globe: ")]


def test_all_ranks_take_the_common_snapshot(two_ranks, tmp_path):
    begin, logs = two_ranks
    children, _store = begin()
    wait_for("fit gate step", logs[0])
    for child in children:
        os.kill(child, signal.SIGTERM)
    assert [end(child) for child in children] == [143, 143]
    first, second = sorted(path.name for path in (tmp_path / "out" / ".snapshot").glob("gate-*.safetensors"))
    assert first.replace("-0.", "-1.") == second
    sentences = said(logs)
    assert len(sentences) == 2 and "stops when all ranks have taken a snapshot" in sentences[0]
    assert f"goes on from step {first.split('-')[1]} of gate" in sentences[1]


@pytest.mark.parametrize("lost", [signal.SIGKILL, signal.SIGSTOP])
def test_sigterm_where_a_rank_is_lost(two_ranks, lost):
    begin, logs = two_ranks
    (first, second), _store = begin(before=lambda: setattr(ranks, "_MOST_SECONDS", 2))
    wait_for("fit gate step", logs[0])
    os.kill(second, lost)
    os.kill(first, signal.SIGTERM)
    assert end(first) == 1
    os.kill(second, signal.SIGKILL)
    end(second)
    assert "Another rank of the fit stopped (" in said(logs)[-1]


def test_ranks_go_on_after_sigterm(two_ranks, tmp_path):
    begin, logs = two_ranks
    expected = None
    for out in ("whole", "stopped"):
        quick = ("--steps", "8", "--snapshot-minutes", "0", "-o", tmp_path / out)
        codes = []
        while codes != [0, 0]:
            children, _store = begin(*quick)
            if out == "stopped" and not codes:
                wait_for("fit up step 2", logs[0])
                for child in children:
                    os.kill(child, signal.SIGTERM)
            codes = [end(child) for child in children]
            assert codes in ([0, 0], [143, 143]), said(logs)
        found = (tmp_path / out / "globe.safetensors").read_bytes()
        assert found == (expected or found) and not (tmp_path / out / ".snapshot").exists()
        expected = found


# --- in Python ---


def at_step(action, step: int = 1):
    def on_step(record: dict) -> None:
        if (record["family"], record["step"]) == ("gate", step):
            action()

    return on_step


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.fixture
def restored():
    """Puts the handlers of the test process back."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def test_compress_raises_terminated(save_tiny, tmp_path, restored):
    model, out = save_tiny("qwen3_moe"), tmp_path / "out"
    with pytest.raises(Terminated, match=r"^interrupted; the same command goes on from step 2 of gate \(snapshot in"):
        compress(model, out, CONFIG, on_step=at_step(lambda: send(signal.SIGTERM)), calibrate=None)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    compress(model, out, CONFIG, calibrate=None)
    compress(model, tmp_path / "whole", CONFIG, calibrate=None)
    assert (out / "globe.safetensors").read_bytes() == (tmp_path / "whole" / "globe.safetensors").read_bytes()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["TERM", "INT"])
def test_a_signal_whose_exception_was_replaced(
    globe, fit_tiny, save_tiny, tmp_path, monkeypatch, restored, number, code
):
    """By an error of the C function in which the signal came, and this error by a sentence."""

    def replace_exception(*_, **__):
        try:
            send(number)
        except KeyboardInterrupt:
            raise GlobeError("The file cannot be read.") from None

    monkeypatch.setattr("globe_fit.cli.commands.inspect_checkpoint", replace_exception)
    monkeypatch.setattr("globe_fit.compression.fit", replace_exception)
    assert globe("inspect", fit_tiny()[0]) == (code, "", "globe: interrupted.\n")
    found, _, stderr = globe("fit", "--no-calibrate", save_tiny("qwen3_moe"), "-o", tmp_path / "out", *QUICK)
    assert found == code and stderr.endswith("globe: interrupted; nothing was written.\n")
    monkeypatch.setattr("globe_fit.__main__._run", replace_exception)  # as while it imports
    assert globe("inspect", fit_tiny()[0]) == (code, "", "globe: interrupted.\n")
    with terminating():  # the signal before is forgotten
        assert interrupt_behind(GlobeError("The file cannot be read.")) is None


def test_the_handler_of_the_caller_is_called_when_the_snapshot_is_complete(save_tiny, tmp_path, restored):
    heard = []

    def handler(number, frame):
        heard.append((number, sorted(path.name for path in (tmp_path / ".snapshot").glob("*.safetensors"))))

    signal.signal(signal.SIGTERM, handler)
    with pytest.raises(Terminated):
        compress(
            save_tiny("qwen3_moe"), tmp_path, CONFIG, on_step=at_step(lambda: send(signal.SIGTERM)), calibrate=None
        )
    assert heard == [(signal.SIGTERM, ["gate-2-0.safetensors"])] and signal.getsignal(signal.SIGTERM) is handler
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
    with pytest.raises(SystemExit) as ended:
        compress(
            save_tiny("qwen3_moe"), tmp_path, CONFIG, on_step=at_step(lambda: send(signal.SIGTERM), 3), calibrate=None
        )
    assert ended.value.code == 7


def test_a_signal_that_is_ignored_stays_so(save_tiny, tmp_path, restored):
    """As of a job in the background of a script, which does not hear Ctrl-C."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    both = lambda: (send(signal.SIGTERM), send(signal.SIGINT))  # noqa: E731
    assert compress(save_tiny("qwen3_moe"), tmp_path, CONFIG, on_step=at_step(both), calibrate=None).status.completed


def test_the_second_ctrl_c_does_not_wait(save_tiny, tmp_path, restored):
    twice = lambda: (send(signal.SIGINT), send(signal.SIGINT))  # noqa: E731
    with pytest.raises(KeyboardInterrupt, match="before the first snapshot"):
        compress(save_tiny("qwen3_moe"), tmp_path, CONFIG, on_step=at_step(twice), calibrate=None)


def test_a_fit_in_another_thread_sets_no_handler(save_tiny, tmp_path):
    results = []
    thread = threading.Thread(
        target=lambda: results.append(compress(save_tiny("qwen3_moe"), tmp_path, CONFIG, calibrate=None))
    )
    thread.start()
    thread.join()
    assert results[0].status.completed and contents(tmp_path)
