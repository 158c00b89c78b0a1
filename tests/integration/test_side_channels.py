"""A logger, a console, a plot, a card or a report that fails never ends work that is done without it."""

import io
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from globe_fit import ExpertSource, FitConfig, VarProConfig, compress, export_globe, fit
from globe_fit.run import display
from globe_kernels import GlobeCheckpoint
from globe_kernels.errors import GlobeWarning, tolerating
from tests.integration.conftest import QUICK

CONFIG = FitConfig(ratio=0.8, support=4, device="cpu", varpro=VarProConfig(steps=3))


def fail(*_, **__):
    raise OSError(28, "No space left on device")


def wandb_that_fails(monkeypatch, **members):
    """Puts a module in the place of wandb, whose run has these members."""
    run = {"define_metric": lambda *_, **__: None, "log": lambda _: None, "finish": lambda exit_code: None}
    module = SimpleNamespace(
        init=lambda **_: SimpleNamespace(**run | members), Error=Exception, Histogram=lambda np_histogram: np_histogram
    )
    monkeypatch.setitem(sys.modules, "wandb", module)


class Unlucky:
    """Fails at the call with this number, and counts the calls."""

    def __init__(self, error: Exception, at: int = 1):
        self.error, self.at, self.calls = error, at, 0

    def __call__(self, *_, **__):
        self.calls += 1
        if self.calls == self.at:
            raise self.error


@pytest.mark.parametrize(
    "error", [RuntimeError("down"), OSError("reset"), BrokenPipeError(), TypeError("not JSON")], ids=str
)
@pytest.mark.parametrize(("member", "at"), [("log", 1), ("log", 3), ("finish", 1)])
def test_wandb_fails_while_a_fit_runs(globe, model_dir, tmp_path, monkeypatch, member, at, error):
    broken = Unlucky(error, at)
    wandb_that_fails(monkeypatch, **{member: broken})
    code, stdout, stderr = globe(
        "fit", "--no-calibrate", model_dir, "-o", tmp_path / "out", *QUICK, "--wandb", "p", "--json"
    )
    assert code == 0 and json.loads(stdout)["rank"] == GlobeCheckpoint(tmp_path / "out", verify=True).config.rank
    lines = stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("globe: ") and "wandb failed (" in lines[0]
    assert broken.calls == at, "a run that failed gets no more records"
    assert not (tmp_path / "out" / ".snapshot").exists()


def test_the_checkpoint_is_on_the_disk_before_wandb_ends(model_dir, tmp_path, monkeypatch):
    """wandb hangs in finish, and the person presses Ctrl-C."""

    def hangs(exit_code: int) -> None:
        assert exit_code == 0 and GlobeCheckpoint(tmp_path / "out", verify=True).report()["status"]["completed"]
        raise KeyboardInterrupt

    wandb_that_fails(monkeypatch, finish=hangs)
    with pytest.raises(KeyboardInterrupt):
        compress(model_dir, tmp_path / "out", CONFIG, wandb_project="p", calibrate=None)
    steps: list[dict] = []
    assert compress(model_dir, tmp_path / "out", CONFIG, on_step=steps.append, calibrate=None).status.completed
    assert {record["step"] for record in steps} <= {0, 1, 2, 3} and not (tmp_path / "out" / ".snapshot").exists()


@pytest.mark.parametrize("name", ["fit_report.json", "metrics.jsonl", "config.json"])
def test_a_file_beside_the_checkpoint_cannot_be_written(globe, model_dir, tmp_path, monkeypatch, name):
    out = tmp_path / "out"
    compress(
        model_dir,
        out,
        FitConfig(ratio=0.8, support=4, seed=9, device="cpu", varpro=VarProConfig(steps=2)),
        calibrate=None,
    )
    write = Path.write_text

    def unlucky(self, text, **options):
        if self.name == name and ".staging" in str(self):
            write(self, text[:3], **options)
            fail()
        return write(self, text, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", unlucky)
        code, _, stderr = globe("fit", "--no-calibrate", model_dir, "-o", out, *QUICK, "--restart")
    assert code == 0 and f"globe: Writing {name} failed (OSError: [Errno 28]" in stderr
    assert GlobeCheckpoint(out, verify=True).config.provenance["seed"] == 0
    assert not (out / name).exists(), "nothing is left of the fit before, and no half of a file"
    if name != "config.json":  # the snapshots stay: the same command writes the file
        assert globe("fit", "--no-calibrate", model_dir, "-o", out, *QUICK)[0] == 0
        assert (out / name).is_file() and not (out / ".snapshot").exists()


def test_the_metrics_of_a_running_fit_cannot_be_written(globe, model_dir, tmp_path, monkeypatch):
    usual = Path.open

    def unlucky(self, *arguments, **options):
        if self.name.startswith("metrics.jsonl") and self.parent.name == ".snapshot":
            fail()
        return usual(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", unlucky)
    code, _, stderr = globe("fit", "--no-calibrate", model_dir, "-o", tmp_path / "out", *QUICK)
    assert code == 0 and stderr.count("the fit goes on, and the curve of later steps is not kept") == 1
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize("step", ["globe_fit.export.model_card", "write"])
def test_a_card_that_cannot_be_made_or_written(globe, model_dir, fit_tiny, tmp_path, monkeypatch, step):
    write = Path.write_text
    unlucky = lambda self, *rest, **named: fail() if self.name == "README.md" else write(self, *rest, **named)  # noqa: E731
    monkeypatch.setattr(Path if step == "write" else step, *(("write_text", unlucky) if step == "write" else (fail,)))
    code, _, stderr = globe("export", fit_tiny()[0], "--base", model_dir, "-o", tmp_path / "hf")
    assert code == 0 and "the model card failed (OSError: [Errno 28] No space left on device); the export" in stderr
    assert (tmp_path / "hf" / "README.md").exists() == (step != "write")
    assert (tmp_path / "hf" / "globe-model.safetensors").is_file()


@pytest.mark.parametrize("broken", ["plots.sweep", "plots.save_png", "replacing_file"])
def test_a_plot_or_the_rows_of_a_sweep_fail(globe, model_dir, tmp_path, monkeypatch, broken):
    monkeypatch.setattr("globe_fit.cli.sweep.plots.sweep", lambda rows: None)  # without matplotlib too
    monkeypatch.setattr(f"globe_fit.cli.sweep.{broken}", fail)
    sizes = ("--rank", "16", "--atoms", "8", "--support", "4", "--steps", "2", "--device", "cpu")
    code, stdout, stderr = globe("sweep", model_dir, "-o", tmp_path / "out", *sizes)
    assert code == 0 and "relative squared error" in stdout.lower()
    assert "globe: Drawing sweep.png failed (" in stderr and "no plot" in stdout
    assert ("globe: Writing sweep.jsonl failed (" in stderr) == (broken == "replacing_file")
    assert GlobeCheckpoint(tmp_path / "out" / "r16-m8-s4", verify=True)


def test_an_exception_of_the_callers_function_costs_no_step(model_dir, tmp_path):
    """Also long before the next snapshot is due; the result is the result without the exception."""
    expected = compress(model_dir, tmp_path / "whole", CONFIG, calibrate=None)

    class Mine(Exception):
        pass

    for at in (("gate", 0), ("gate", 3), ("up", 1), ("up", 3)):
        seen: list[tuple] = []

        def on_step(record, at=at, seen=seen):
            seen.append((record["family"], record["step"]))
            if seen[-1] == at:
                raise Mine(str(at))

        with pytest.raises(Mine):
            compress(model_dir, tmp_path / "out", CONFIG, on_step=on_step, calibrate=None)
        assert seen[-1] == at and list((tmp_path / "out" / ".snapshot").glob("*.safetensors"))
    result = compress(model_dir, tmp_path / "out", CONFIG, calibrate=None)
    for family in ("gate", "up"):
        assert torch.equal(result.families[family].adapter, expected.families[family].adapter)


def test_an_exception_without_snapshots_comes_at_once(model_dir):
    seen: list[dict] = []

    def on_step(record):
        seen.append(record)
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        fit(ExpertSource(model_dir), CONFIG, on_step=on_step)
    assert len(seen) == 1


def test_a_python_caller_gets_warnings(model_dir, tmp_path, monkeypatch):
    wandb_that_fails(monkeypatch, log=Unlucky(RuntimeError("down")))
    with pytest.warns(
        GlobeWarning, match="Sending metrics to wandb failed .RuntimeError: down.; the fit goes on"
    ) as said:
        assert compress(model_dir, tmp_path / "out", CONFIG, wandb_project="p", calibrate=None).status.completed
    assert len(said) == 1
    sentence = r"A step failed \(ValueError: two lines\); all is well\."
    with pytest.warns(GlobeWarning, match=sentence), tolerating("A step", "all is well"):
        raise ValueError("two\nlines.")
    with pytest.raises(KeyboardInterrupt), tolerating("A step", "all is well"):
        raise KeyboardInterrupt


STREAMS = """
import os, sys
from globe_fit.__main__ import main
case, sys.argv = sys.argv[1], ["globe", *sys.argv[2:]]
if case == "both without a reader":
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)
    os.dup2(writer, 2)
elif case == "a full disk":
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
elif case == "both are closed":
    sys.stdout = sys.stderr = None
elif case == "ASCII":
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="ascii", errors="strict")
main()
"""


@pytest.mark.parametrize(
    "case",
    [
        "both without a reader",
        pytest.param("a full disk", marks=pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")),
        "both are closed",
    ],
)
def test_a_console_that_goes_away(model_dir, warm_python, tmp_path, case):
    done = warm_python.run("-c", STREAMS, case, "fit", "--no-calibrate", model_dir, "-o", tmp_path / "out", *QUICK)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    assert GlobeCheckpoint(tmp_path / "out", verify=True) and not (tmp_path / "out" / ".snapshot").exists()
    if case == "a full disk":
        assert "The figures cannot be printed ([Errno 28]" in done.stderr


class Full(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


def test_figures_that_are_the_work_itself_are_missed(globe, model_dir, tmp_path, monkeypatch):
    """The checkpoint of a fit is on the disk; a plan is its figures."""
    monkeypatch.setattr(sys, "stdout", Full())
    code, _, stderr = globe("plan", model_dir, "--support", "4", "--json")
    assert code == 1 and "([Errno 28] No space left on device); give stdout a place" in stderr
    code, _, stderr = globe("fit", "--no-calibrate", model_dir, "-o", tmp_path / "out", *QUICK, "--json")
    assert code == 0 and f"the work of the command is complete in {tmp_path / 'out'}." in stderr


def test_a_terminal_that_is_not_utf8(model_dir, warm_python, tmp_path):
    path = tmp_path / "Modell-für-μ-日本"
    model_dir.rename(path)
    done = warm_python.run("-c", STREAMS, "ASCII", "fit", "--no-calibrate", path, "-o", tmp_path / "aus-é", *QUICK)
    assert done.returncode == 0 and "aus-\\xe9" in done.stdout


class Gone:
    """A terminal whose other end is away."""

    encoding = "utf-8"

    def __init__(self, is_terminal: bool):
        self.isatty = lambda: is_terminal

    def write(self, text: str) -> int:
        raise OSError(5, "Input/output error")

    def flush(self) -> None:
        self.write("")


@pytest.mark.parametrize("is_terminal", [True, False], ids=["a bar", "lines"])
def test_progress_on_a_terminal_that_is_gone(model_dir, tmp_path, monkeypatch, is_terminal):
    monkeypatch.setattr(sys, "stderr", Gone(is_terminal))
    result = compress(model_dir, tmp_path / "out", CONFIG, progress=True, calibrate=None)
    display.say("nobody reads this")
    assert result.status.completed and GlobeCheckpoint(tmp_path / "out", verify=True)


def test_a_character_that_the_stream_lacks_is_written_as_an_escape(capsys, monkeypatch, tmp_path):
    with (tmp_path / "log").open("w", encoding="ascii") as stream:
        display.write("Größe 日", stream)
    assert (tmp_path / "log").read_text() == "Gr\\xf6\\xdfe \\u65e5\n"


def test_the_callers_function_of_an_export(model_dir, fit_tiny, tmp_path):
    checkpoint, source = GlobeCheckpoint(fit_tiny()[0]), ExpertSource(model_dir)
    with pytest.raises(LookupError):
        export_globe(checkpoint, source, tmp_path / "hf", on_tensor=Unlucky(LookupError()))
    assert not (tmp_path / "hf").exists()


def test_an_evaluation_that_cannot_be_kept_is_printed(globe, with_tokenizer, tmp_path):
    compress(with_tokenizer, tmp_path / "globe", CONFIG, calibrate=None)
    (tmp_path / "globe" / ".evaluation.json.partial").mkdir()
    options = ("--base", with_tokenizer, "--text", with_tokenizer / "text.txt", "--device", "cpu")
    code, stdout, stderr = globe("eval", tmp_path / "globe", *options)
    assert code == 0 and "perplexity" in stdout and "will not have these figures" in stderr
