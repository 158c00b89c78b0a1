"""Every text that a person reads fits 80 columns, no name is cut, and the whole model stands beside every ratio."""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from globe_fit.cli import tables
from globe_fit.result import FitResult
from globe_kernels import Explanation, explain, patch
from globe_kernels.table import Table
from globe_kernels.testing import tiny_model
from tests.integration.conftest import QUICK
from tests.integration.test_plan import CONFIGS

WHOLE = ("gate and up on disk", "whole model on disk", "whole model in memory", "whole model at its peak, predicted")
SIZES = {
    "gate_up": {"dense": 5_898_240, "globe": 3_663_360},
    "model": {"dense": 10_909_568, "globe": 8_674_688},
    "resident": {"dense": 10_909_568, "globe": 8_740_000},
    "peak": {"dense": 31_000_000, "globe": 58_000_000},
    "strategies": ["scratch"],
}
UNKNOWN = dict.fromkeys(SIZES, None) | {"gate_up": SIZES["gate_up"]}
BYTES = {"dense_experts": 5_898_240, "globe_on_disk": 3_663_360}
QUALITY = {"perplexity": 30.30, "kl": 0.0047, "top1": 0.951}


@pytest.fixture
def printed(monkeypatch, capsys):
    """Prints on a terminal of 80 columns, on one of 300 and into a pipe; returns the text of the pipe."""

    def show(command: Callable[[], object]) -> str:
        texts = {}
        for width in (80, 300, None):
            with monkeypatch.context() as patched:
                patched.setenv("COLUMNS", str(width or 300))
                patched.setattr(sys.stdout, "isatty", lambda width=width: width is not None)
                capsys.readouterr()
                command()
                texts[width] = capsys.readouterr().out
        # only a word that is longer, such as a path, goes past the end of its line
        assert texts[80] and all(len(line) <= 80 or " " not in line for line in texts[80].splitlines()), texts[80]
        # in a pipe a sentence is one line; the lines of a table have gaps between their columns
        assert all(len(line) <= 80 for line in texts[None].splitlines() if "  " in line.strip()), texts[None]
        # numbers aside: times are measured again
        found = {frozenset(re.sub(r"[\d.,]+", "0", text.replace("--", "")).split()) for text in texts.values()}
        assert len(found) == 1 and "…" not in texts[80], "a word is broken or cut"
        return texts[None]

    return show


@pytest.fixture
def command(globe, printed, monkeypatch):
    """Runs `globe ARGS` three times, as `printed` does."""

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["globe", *map(str, arguments)])

        def once() -> None:
            from globe_fit.__main__ import main

            with pytest.raises(SystemExit) as stopped:
                main()
            assert not stopped.value.code

        return printed(once)

    return run


def assert_whole_model(text: str) -> None:
    assert all(row in text for row in WHOLE) and "is not counted" not in text, text


def test_every_command_on_a_tiny_model(command, with_tokenizer, tmp_path):
    model, out, text = with_tokenizer, tmp_path / "globe", ("--text", with_tokenizer / "text.txt", "--device", "cpu")
    assert_whole_model(command("fit", "--no-calibrate", model, "-o", out, *QUICK, "--dry-run"))
    assert_whole_model(command("fit", "--no-calibrate", model, "-o", out, *QUICK))
    assert_whole_model(command("inspect", out, "--layers"))
    assert_whole_model(command("export", out, "--base", model, "-o", tmp_path / "hf"))
    assert "KL to dense" in command("eval", out, "--base", model, *text)
    sizes = ("--rank", "48", "--atoms", "8", "--support", "4", "--palette", "none,6", *QUICK[4:])
    estimate = command("sweep", model, "-o", tmp_path / "sweep", *sizes, "--dry-run")
    swept = command("sweep", model, "-o", tmp_path / "sweep", *sizes)
    for found in (estimate, swept):
        assert "whole model" in found and "is not counted" not in found and "r48-m8-s4-u6" in found


@pytest.mark.parametrize(
    ("name", "options"),
    [("qwen3-30b-a3b", ("--palette", "none,32")), ("qwen3-235b-a22b", ()), ("deepseek-v3", ("--on", "cpu"))],
)
def test_plans_of_large_models(globe, printed, name, options):
    figures = json.loads(globe("plan", CONFIGS / f"{name}.json", *options, "--json")[1])
    assert_whole_model(printed(partial(tables.print_plan, figures)))
    for point in figures["points"]:
        sizes, experts = point["sizes"], point["bytes_on_disk"]
        outside = sizes["model"]["dense"] - experts["dense"]
        assert sizes["model"]["globe"] == outside + experts["globe"] and outside > 0
        resident = {key: point["strategies"][name]["resident"] for key, name in (("dense", "dense"), ("globe", "auto"))}
        assert sizes["resident"] == {key: figures["outside_bytes"] + held for key, held in resident.items()}


def sweep_row(name: str) -> dict:
    pair = {"gate": 0.0271, "up": 0.0268}
    return {
        "point": name,
        "bytes": BYTES,
        "sizes": SIZES,
        "relative_error": pair,
        "svd_equal_bytes": pair,
        "rank_bound": pair,
        "largest_palette": {"gate": 16384, "up": 16384},
        "seconds": 123456.0,
        "completed": True,
        "finished": False,
        **QUALITY,
        "dense_perplexity": 30.21,
    }


def test_a_sweep_of_long_names(printed):
    names = ["r2048-m16384-s16-u16384", "r512-m16384-s12"]
    rows = [sweep_row(name) for name in names]
    rows.append(rows[0] | {"S_cache": 4_000_000_000, "slots": 123_456, "hit_rate": 0.987, "tokens_per_s": 1234.5})
    text = printed(lambda: tables.print_sweep("2 points on a model", rows, Path("out/sweep.jsonl"), None))
    for part in (*names, "0.0271 / 0.0268", "16384 / 16384", "34.3 hours", "95.10 %", "123,456", "5.90", "0.795"):
        assert part in text
    mixed = [rows[0], rows[1] | {"completed": False, "sizes": UNKNOWN}]
    text = printed(lambda: tables.print_sweep("2 points on a model", mixed, Path("out/sweep.jsonl"), None))
    assert "diverged" in text and "is not counted" in text
    assert "34.3 hours" in printed(lambda: tables.print_sweep_estimate("2 points on a model", rows[:2], 10**9))


def test_the_demo(printed):
    three = dict.fromkeys(("dense", "globe", "svd"), 30.0)
    five = dict.fromkeys((*three, "int8", "int4_g32"), 30.0)
    figures = {
        "relative_error": {"gate": 0.03, "up": 0.03},
        "baseline": dict.fromkeys(("svd", "rank_bound", "int8", "int4_g32"), {"gate": 0.1, "up": 0.1}),
        "perplexity": five,
        "kl": five,
        "top1": five,
        "bytes": BYTES
        | {"resident": 3_720_000, "dense_peak": 26_300_000, "peak": 53_500_000}
        | {"int8": 2_980_000, "int4_g32": 1_710_000},
        "sizes": SIZES,
        "paths": ["bank_first", "scratch"],
        "tokens_per_s": dict.fromkeys(("dense", "globe"), 12345.0),
        "continuation": three | {"prompt": "Return", **dict.fromkeys(three, " the sum of all numbers" * 9)},
    }
    assert_whole_model(printed(partial(tables.print_demo, figures)))


def test_labels_of_an_evaluation_stand_above_its_table(printed):
    labels = {"dense": f"dense: {'/a/long/directory' * 3}", "globe": "dense, reconstructed from GloBE: out/dense"}
    figures = {"labels": labels, "tokens": 123456, **dict.fromkeys(labels, QUALITY | {"tokens_per_s": 123456.0})}
    text = printed(lambda: tables.print_evaluation(figures, Path("heldout.txt")))
    assert text.splitlines()[:2] == list(labels.values())
    assert "heldout.txt, 123,456 tokens" in text and "123,456" in text and "95.10 %" in text


def test_a_checkpoint_that_knows_only_its_experts(printed):
    text = printed(partial(tables.print_sizes, UNKNOWN))
    assert WHOLE[0] in text and "0.621" in text
    assert not any(row in text for row in WHOLE[1:])
    assert text.splitlines()[-1] == "The whole model is not counted: its other sizes are not recorded here."


def test_a_table_that_is_too_wide_goes_on_below():
    table = Table("title", ["", *(f"column {number}" for number in range(9))], [["a long name", *"123456789"]])
    lines = table.text(40).splitlines()
    assert max(map(len, lines)) <= 40 and sum(line.startswith("a long name") for line in lines) == 5
    assert [word for line in lines if line.startswith("a long") for word in line.split()[3:]] == list("123456789")


def test_html_is_escaped_and_complete():
    html = Table("<b>", ["", "a &"], [["x < y", "1"]])._repr_html_()
    assert "<b>" not in html and "&lt;b&gt;" in html and "a &amp;" in html and "x &lt; y" in html
    assert html.count("<tr>") == html.count("</tr>") == 2


def test_the_results_of_a_notebook(fit_tiny):
    path, result = fit_tiny()
    fitted: FitResult = replace(result, report=result.report | {"sizes": SIZES})
    for text in (str(fitted), repr(fitted), fitted._repr_html_()):
        assert "SVD, equal bytes" in text and all(row in text for row in WHOLE) and result.status.advice in text
    assert "tensor(" not in repr(fitted)

    model = tiny_model("qwen3_moe")
    held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    report = patch(model, path)
    assert report.bytes_before + report.bytes_rest == held
    assert report.bytes_peak_before > report.bytes_before
    for text in (str(report), report._repr_html_()):
        assert all(part in text for part in ("whole model in memory", "GloBE experts in 3 layers", *report.strategies))

    found = explain(model, 16)
    assert isinstance(found, Explanation) and found.groups[0].taken in report.strategies
    states = {cost.strategy: cost.state for cost in found.groups[0].costs}
    assert states["dense"] == "-" and states["composed"] == "not held"
    for text in (str(found), found._repr_html_()):
        assert (
            all(strategy in text for strategy in states)
            and "not held" in text
            and "T = 16: " in text
            and "layers such as model.layers.0" in text
        )
