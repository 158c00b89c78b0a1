"""`globe sweep`: which points there are, what is refused before the first fit, and how an interrupted one goes on."""

import json
import signal
import sys
from pathlib import Path

import pytest

from globe_fit.cli.sweep import PLOT_NAME, ROWS_NAME
from globe_fit.measure.evaluate import read_token_by_token
from globe_kernels.errors import GlobeError
from globe_kernels.format.names import CONFIG_NAME
from globe_kernels.format.writing import replacing_file
from tests.integration.conftest import assert_refused

SIZES = ("--rank", "16,48", "--atoms", "8", "--support", "2,4", "--palette", "none,6")
QUICK = ("--steps", "3", "--device", "cpu", "--snapshot-minutes", "0")
NAMES = [f"r{r}-m8-s{s}{u}" for r in (16, 48) for s in (2, 4) for u in ("", "-u6")]


def without_times(rows: list[dict]) -> list[dict]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def written(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / ROWS_NAME).read_text().splitlines()]


def test_every_combination_is_a_fit_and_a_row(globe, with_tokenizer, tmp_path):
    out, text = tmp_path / "out", ("--text", with_tokenizer / "text.txt")
    code, stdout, stderr = globe("sweep", with_tokenizer, "-o", out, *SIZES, *QUICK, *text, "--json")
    assert (code, stderr) == (0, "")
    found = json.loads(stdout)
    rows = found["points"]
    assert [row["point"] for row in rows] == NAMES and rows == written(out)
    assert found["plot"] == str(out / PLOT_NAME) and (out / PLOT_NAME).read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in out.iterdir()} == {*NAMES, ROWS_NAME, PLOT_NAME}
    for row in rows:
        report = json.loads((out / row["point"] / "fit_report.json").read_text())["families"]
        assert row["bytes"]["globe_on_disk"] == (out / row["point"] / "globe.safetensors").stat().st_size
        assert row["ratio"] == row["bytes"]["globe_on_disk"] / row["bytes"]["dense_experts"]
        for name in ("relative_error", "rank_bound", "svd_equal_bytes", "largest_palette"):
            assert row[name] == {family: report[family][name] for family in ("gate", "up")}
        assert max(row["largest_palette"].values()) <= (row["palette"] or 8)
        assert row["seconds"] > 0 and row["completed"]
        assert row["kl"] > 0 and 0 < row["top1"] <= 1 < row["dense_perplexity"]
    keys = {(row["m"], row["r"], row["target_support"], row["palette"]) for row in rows}
    assert keys == {(8, r, s, u) for r in (16, 48) for s in (2, 4) for u in (None, 6)}
    by_name = {row["point"]: row for row in rows}
    assert by_name["r48-m8-s4"]["kl"] < by_name["r16-m8-s2"]["kl"], "quality is not that of the point"

    # the same again: nothing is fitted, and the table is the same
    before = {name: (out / name / CONFIG_NAME).stat().st_mtime_ns for name in NAMES}
    code, stdout, stderr = globe("sweep", with_tokenizer, "-o", out, *SIZES, *QUICK)
    assert code == 0 and "fit" not in stderr and "%" not in stderr
    assert (
        all(name in stdout for name in NAMES)
        and "SVD, equal bytes" in stdout
        and f"plot in {out}" in " ".join(stdout.split())
    )
    assert {name: (out / name / CONFIG_NAME).stat().st_mtime_ns for name in NAMES} == before
    assert [row["seconds"] for row in written(out)] == [row["seconds"] for row in rows]

    code, stdout, _ = globe("sweep", with_tokenizer, "-o", out, "--rank", "32,48", "--atoms", "8", "--support", "4",
                            *QUICK, "--dry-run", "--json")  # fmt: skip
    first, second = json.loads(stdout)["points"]
    assert code == 0 and not (out / first["point"]).exists()
    assert not first["finished"] and first["seconds"] > 0 and second["finished"] and second["seconds"] == 0
    assert first["bytes"]["globe_on_disk"] < second["bytes"]["globe_on_disk"]


def test_a_cache_is_a_key_of_its_own(globe, with_tokenizer, tmp_path, monkeypatch):
    options = ("--rank", "16,48", "--atoms", "8", "--support", "2", *QUICK, "--s-cache", "60kB,2MB")
    monkeypatch.setattr(
        "globe_fit.cli.sweep.read_token_by_token", lambda model, window: read_token_by_token(model, window[..., :64])
    )
    text = ("--text", with_tokenizer / "text.txt")
    code, stdout, _ = globe("sweep", with_tokenizer, "-o", tmp_path / "out", *options, *text, "--json")
    rows = json.loads(stdout)["points"]
    assert code == 0 and rows == written(tmp_path / "out")
    assert [(row["r"], row["S_cache"]) for row in rows] == [(r, s) for r in (16, 48) for s in (None, 60_000, 2_000_000)]
    for plain, small, large in (rows[:3], rows[3:]):
        assert plain["kl"] == small["kl"] == large["kl"] and "hit_rate" not in plain
        assert 0 <= small["hit_rate"] < large["hit_rate"] < 1 and small["slots"] < large["slots"] == 24
        assert small["tokens_per_s"] > 0 < large["tokens_per_s"]
    code, stdout, _ = globe("sweep", with_tokenizer, "-o", tmp_path / "out", *options, *text)
    assert code == 0 and "Token by token with a cache" in stdout and "60.0 kB" in stdout
    refused = globe("sweep", with_tokenizer, "-o", tmp_path / "out", *options)
    assert_refused(refused, 2, "--s-cache measures caches on a text and there is no text")


def test_settings_come_from_the_file_and_ratios_lead_to_sizes(globe, model_dir, tmp_path):
    config, out = tmp_path / "fit.toml", tmp_path / "out"
    config.write_text('support = 3\npalette = 5\nphi = "tanh"\n[varpro]\nsteps = 1\n')
    options = ("--ratio", "0.7,0.8,0.8001", "--config", config, "--device", "cpu", "--json")
    code, stdout, _ = globe("sweep", model_dir, "-o", out, *options)
    assert code == 0
    rows = json.loads(stdout)["points"]
    assert len(rows) == 2, "two ratios that lead to the same sizes are one point"
    for row, ratio in zip(rows, (0.7, 0.8), strict=True):
        assert (row["target_support"], row["palette"]) == (3, 5) and ratio - 0.05 < row["ratio"] < ratio + 0.02
        fitted = json.loads((out / row["point"] / CONFIG_NAME).read_text())["provenance"]["fit"]
        assert (fitted["phi"], fitted["varpro"]["steps"]) == ("tanh", 1)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            ("--rank", "48,64", "--atoms", "8,99", "--support", "4"),
            "3 of the 4 points of the sweep cannot be fitted, so no point is fitted; the first refusal: atoms is 99",
        ),
        (
            ("--rank", "64", "--atoms", "8", "--support", "4"),
            "the first refusal: rank is 64 and the experts of model are",
        ),
        (
            ("--atoms", "8", "--support", "4,9"),
            "1 of the 2 points of the sweep cannot be fitted, so no point is fitted",
        ),
        (("--ratio", "0.01,0.7", "--support", "4"), "ratio 0.01 cannot be reached on model with support 4; give a"),
        (("--ratio", "0.7", "--rank", "48", "--atoms", "8"), "give at most two of them"),
        (("--rank", "48,x"), "rank is '48,x'; expected numbers separated by commas, such as 12,24."),
        (("--support", "none"), "support is 'none'; expected numbers"),
        (("--palette", "none,"), "palette is 'none,'; expected numbers separated by commas, such as none,17."),
        (("--support", "4", "--text", "no.txt"), "no.txt is not a file"),
        (("--support", "4", "--device", "tpu9"), "device is 'tpu9'"),
    ],
    ids=str,
)
def test_what_cannot_be_had_is_found_before_the_first_fit(globe, model_dir, tmp_path, options, sentence):
    assert_refused(globe("sweep", model_dir, "-o", tmp_path / "out", *options), 2, sentence)
    assert not (tmp_path / "out").exists()


# Kills itself at the given step of all steps of the sweep.
KILLED = """
import os, signal, sys
from globe_fit import __main__
from globe_fit.run import loggers
steps, write = 0, loggers.MetricStream.__call__
def count(self, record):
    global steps
    write(self, record)
    steps += 1
    if steps == int(os.environ["KILL_AT"]):
        os.kill(os.getpid(), signal.SIGKILL)
loggers.MetricStream.__call__ = count
__main__.main()
"""


def test_killed_it_goes_on_with_the_same_table(globe, model_dir, warm_python, tmp_path):
    sizes = ("--rank", "16,48", "--atoms", "8", "--support", "4")
    code, stdout, _ = globe("sweep", model_dir, "-o", tmp_path / "whole", *sizes, *QUICK, "--json")
    assert code == 0
    out = tmp_path / "killed"
    command = ["sweep", model_dir, "-o", out, *sizes, *QUICK]
    # 8 steps a point; the first time in the second family of the first point, then in the first of the second
    for kill_at, begun in ((7, ["r16-m8-s4"]), (4, ["r16-m8-s4", "r48-m8-s4"])):
        done = warm_python.run("-c", KILLED, *command, KILL_AT=str(kill_at))
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert sorted(path.name for path in out.glob("[!.]*")) == begun
        assert (out / begun[-1] / ".snapshot").is_dir() and not (out / begun[-1] / CONFIG_NAME).exists()
    first = (out / "r16-m8-s4" / CONFIG_NAME).stat().st_mtime_ns
    unfinished = ("sweep", model_dir, "-o", out, *sizes, "--device", "cpu", "--steps", "4")
    assert_refused(
        globe(*unfinished), 2, "r16-m8-s4 holds a finished fit with other settings (varpro.steps was 3 and is 4)"
    )
    assert_refused(
        globe(*unfinished[:4], "--rank", "48", *unfinished[6:]), 2, "r48-m8-s4 holds an unfinished fit with other"
    )
    half_written = replacing_file(out / "sweep.jsonl")  # as by a kill in the first write of the rows
    half_written.__enter__().write_text("{")
    code, resumed, stderr = globe(*command, "--json")
    assert (code, stderr) == (0, "")
    assert (out / "r16-m8-s4" / CONFIG_NAME).stat().st_mtime_ns == first and not (
        out / "r48-m8-s4" / ".snapshot"
    ).exists()
    expected, found = json.loads(stdout)["points"], json.loads(resumed)["points"]
    assert without_times(found) == without_times(expected) == without_times(written(out))
    for name in ("r16-m8-s4", "r48-m8-s4"):
        whole, killed = (path / name / "globe.safetensors" for path in (tmp_path / "whole", out))
        assert whole.read_bytes() == killed.read_bytes()
    assert globe(*unfinished, "--restart")[0] == 0
    assert json.loads((out / "r16-m8-s4" / CONFIG_NAME).read_text())["provenance"]["fit"]["varpro"]["steps"] == 4


def test_an_interrupt_keeps_what_is_finished(globe, model_dir, tmp_path, monkeypatch):
    from globe_fit import compression

    fit, begun = compression.fit, []

    def interrupted(*arguments, **options):
        begun.append(None)
        if len(begun) == 2:
            raise KeyboardInterrupt
        return fit(*arguments, **options)

    command = ("sweep", model_dir, "-o", tmp_path / "out", "--rank", "16,48", "--atoms", "8", "--support", "4", *QUICK)
    with monkeypatch.context() as patched:
        patched.setattr("globe_fit.compression.fit", interrupted)
        code, stdout, stderr = globe(*command)
    assert (code, stdout) == (130, "") and stderr.endswith(
        "globe: interrupted in point r48-m8-s4 (2 of 2); the same command keeps the finished points and goes on from "
        "there.\n"
    )
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["r16-m8-s4"]
    assert globe(*command)[0] == 0 and len(written(tmp_path / "out")) == 2


def test_a_point_that_diverges_does_not_stop_the_others(globe, model_dir, tmp_path):
    config = tmp_path / "fit.toml"
    config.write_text("support = 4\natoms = 8\n[varpro]\nlr = 1e30\nsteps = 6\nwarmup_steps = 0\n")
    options = ("-o", tmp_path / "out", "--rank", "16,48", "--config", config, "--device", "cpu", "--json")
    code, stdout, stderr = globe("sweep", model_dir, *options)
    assert code == 1 and "r16-m8-s4, r48-m8-s4 diverged and the best state of each is kept; lower the lr" in stderr
    assert [row["completed"] for row in json.loads(stdout)["points"]] == [False, False]


def test_a_model_that_cannot_be_evaluated_costs_no_rows(globe, with_tokenizer, tmp_path, monkeypatch):
    def broken(*_):
        raise GlobeError("no such model")

    monkeypatch.setattr("globe_fit.cli.sweep.load_model", broken)
    out, text = tmp_path / "out", ("--text", with_tokenizer / "text.txt")
    result = globe("sweep", with_tokenizer, "-o", out, "--ratio", "0.8", "--support", "4", *QUICK, *text)
    assert result[0] == 1 and result[2].endswith("globe: no such model\n")
    assert len(written(out)) == 1 and "kl" not in written(out)[0]


def test_without_matplotlib_there_is_no_plot(globe, model_dir, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    out = tmp_path / "out"
    code, stdout, _ = globe("sweep", model_dir, "-o", out, "--ratio", "0.8", "--support", "4", *QUICK)
    assert code == 0 and "no plot without matplotlib" in stdout
    assert len(written(out)) == 1 and not (out / PLOT_NAME).exists()


def test_a_point_whose_report_lacks_its_errors(globe, model_dir, tmp_path):
    out = tmp_path / "out"
    sweep = ("sweep", model_dir, "-o", out, "--rank", "16", "--atoms", "8", "--support", "2", *QUICK)
    assert globe(*sweep)[0] == 0
    path = out / "r16-m8-s2" / "fit_report.json"
    report = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in report.items() if name != "families"}))
    assert_refused(globe(*sweep), 1, f"{path} has no families; restore the file or fit again.")
