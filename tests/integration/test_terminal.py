"""Names and texts out of files reach neither the terminal nor a page as they are: they may hold escape codes."""

import json
import shutil
import sys
from html import unescape
from pathlib import Path

import pytest

from globe_fit.cli.plots import new_figure, save_png
from globe_fit.data.outline import Outline
from globe_fit.result import stored_fit
from globe_kernels import GlobeCheckpoint
from globe_kernels.table import Table
from tests.integration.conftest import QUICK

CODES = ("\x1b", "\x07", "\r", "\x9b", "\u202e", "\u2028")
ODD = "a\x1b]0;owned\x07b\u202ec\rd\x9b31m\nINJECTED [red]e[bold] $\\frac$ <script>{{ 1 }}"
LONG = "y" * 10**6


@pytest.fixture(autouse=True)
def terminal(monkeypatch):
    """A wide terminal, so that a line begins with an injected word only if a name turned the line."""
    monkeypatch.setenv("COLUMNS", "4000")
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("globe_fit.cli.commands.enable_progress_bars", lambda: None)


def assert_tame(text: str, *, is_live: bool = False) -> None:
    """`is_live`: with the bar of rich, which moves the cursor."""
    codes = ("\x1b]", *CODES[1:2], *CODES[3:]) if is_live else CODES
    assert not [code for code in codes if code in text]
    assert not [line for line in text.splitlines() if line.startswith("INJECTED")]
    assert len(text) < 200_000


def change(path: Path, change_data) -> None:
    data = json.loads(path.read_text())
    change_data(data)
    path.write_text(json.dumps(data))


@pytest.fixture(params=[ODD, LONG], ids=["codes", "long"])
def checkpoint(fit_tiny, tmp_path, request) -> Path:
    """A checkpoint whose files hold odd text wherever they hold text."""
    path, text = Path(shutil.copytree(fit_tiny()[0], tmp_path / "globe")), request.param
    change(path / "globe_config.json", lambda data: data["base"].update(name=text, model_type=text))

    def of_report(data: dict) -> None:
        data["status"]["advice"] = f"{text}."
        data["command"] = text

    change(path / "fit_report.json", of_report)
    quality = {"perplexity": 3.0, "kl": 0.0, "top1": 1.0, "tokens_per_s": 1.0}
    facts = {"text": text, "tokens": 9, "command": text, "device": text, "threads": 1, "dense": quality}
    fingerprint = GlobeCheckpoint(path).fingerprint
    (path / "evaluation.json").write_text(json.dumps(facts | {"globe": quality, "fingerprint": fingerprint}))
    return path


def test_inspect(globe, checkpoint):
    for arguments in (("inspect", checkpoint, "--layers"), ("inspect", checkpoint, "--json")):
        code, out, err = globe(*arguments)
        assert (code, err) == (0, "")
        assert_tame(out)
    assert_tame(repr(stored_fit(GlobeCheckpoint(checkpoint))))


@pytest.mark.parametrize("checkpoint", [ODD], indirect=True)
def test_a_report(globe, checkpoint):
    assert globe("report", checkpoint)[0] == 0
    page = (checkpoint / "report.html").read_text()
    assert not [code for code in CODES[:4] if code in page] and "<script>{{" not in page
    assert "<script>{{ 1 }}" in unescape(page)


def test_the_errors_of_layers_that_no_model_has(globe, checkpoint):
    def rename(data: dict) -> None:
        for family in data["families"].values():
            errors = family["relative_error_by_layer"]
            errors[ODD] = errors.pop("1")

    change(checkpoint / "fit_report.json", rename)
    code, out, err = globe("inspect", checkpoint, "--layers")
    assert (code, out) == (1, "") and "a whole number as the key" in err
    assert_tame(err)


def test_a_directory_with_an_odd_name(globe, save_tiny, tmp_path):
    model_dir = Path(shutil.copytree(save_tiny("qwen3_moe"), tmp_path / ODD))
    out, plot = tmp_path / "globe", tmp_path / "plan.png"
    assert Outline.read(model_dir).name.startswith("a\\x1b]0;owned\\x07b\\u202ec d\\x9b31m INJECTED")
    assert Outline.read(model_dir / "config.json").name == Outline.read(model_dir).name
    for arguments, expected in (
        (("plan", model_dir, "--plot", plot), 0),
        (("plan", model_dir, "--json"), 0),
        (("fit", "--no-calibrate", model_dir, "-o", out, *QUICK, "--dry-run"), 0),
        (("fit", "--no-calibrate", model_dir, "-o", out, *QUICK), 0),
        (("inspect", out), 0),
        (("export", out, "--base", model_dir, "-o", tmp_path / "hf"), 0),
        (("eval", model_dir, "--text", tmp_path / ODD), 2),
        (("inspect", model_dir), 2),
    ):
        code, stdout, stderr = globe(*arguments)
        assert code == expected, stderr
        assert_tame(stdout)
        assert_tame(stderr, is_live=arguments[0] in ("fit", "--no-calibrate", "export"))
    assert plot.stat().st_size > 10_000
    card = (tmp_path / "hf" / "README.md").read_text()
    assert_tame(card.partition("## Made by")[0])


def test_a_path_that_may_not_be_used(globe, fit_tiny, monkeypatch):
    def denied(*_, **__):
        raise PermissionError(13, "Permission denied", f"/models/{ODD}")

    monkeypatch.setattr("globe_fit.cli.commands.inspect_checkpoint", denied)
    code, out, err = globe("inspect", fit_tiny()[0])
    assert (code, out) == (2, "") and err.startswith("globe: /models/a\\x1b]0;owned\\x07b\\u202ec d\\x9b31m INJECTED ")
    assert err.endswith(": permission denied; give a path that you may use.\n")
    assert_tame(err)


def test_a_figure_whose_title_is_no_formula(tmp_path):
    figure, _ = new_figure(2, 2)
    save_png(figure, "a$\\frac$ on h100", str(tmp_path / "plot.png"))
    assert (tmp_path / "plot.png").stat().st_size > 0


def test_tables():
    table = Table(ODD, ["", ODD], [[ODD, "1"]])
    assert not [code for code in CODES if code in table.text()] and "<script>" not in table._repr_html_()
