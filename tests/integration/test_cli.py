"""The command line: what it prints, its exit codes, and one sentence for mistakes in options."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from globe_fit.cli.demo import shipped_model
from globe_fit.data.model import load_model, load_tokenizer, shared_copy
from globe_kernels import patch
from globe_kernels.format.names import CONFIG_NAME
from globe_kernels.model.targets import is_patched
from globe_kernels.testing import tiny_model
from tests.integration.conftest import QUICK, assert_refused


@pytest.mark.parametrize("model_dir", ["qwen3_moe", "gpt_oss"], indirect=True)
def test_the_whole_way(globe, with_tokenizer, tmp_path):
    out, hf, dense = tmp_path / "globe", tmp_path / "hf", tmp_path / "dense"
    code, stdout, stderr = globe("fit", "--no-calibrate", with_tokenizer, "-o", out, *QUICK)
    assert (
        code == 0
        and "SVD, equal bytes" in stdout
        and "fit gate step 3 of 3, error 0." in stderr
        and "fit up step 3 of 3, error 0." in stderr
    )
    code, stdout, stderr = globe("fit", "--no-calibrate", with_tokenizer, "-o", out, *QUICK, "--json")
    fitted = json.loads(stdout)
    assert code == 0 and "holds this fit already, finished" in stderr
    assert 0 < fitted["families"]["up"]["relative_error"] < 0.5
    assert fitted["bytes"]["globe_on_disk"] == (out / "globe.safetensors").stat().st_size

    assert globe("export", out, "--base", with_tokenizer, "-o", hf)[0] == 0
    code, stdout, _ = globe(
        "export", out, "--base", with_tokenizer, "-o", dense, "--dense", "--dtype", "bf16", "--json"
    )
    assert code == 0 and json.loads(stdout)["format"] == "dense"

    text = with_tokenizer / "text.txt"
    figures = {}
    for name, target in {"checkpoint": out, "export": hf, "dense export": dense}.items():
        code, stdout, _ = globe("eval", target, "--base", with_tokenizer, "--text", text, "--device", "cpu", "--json")
        assert code == 0
        figures[name] = json.loads(stdout)
        assert figures[name]["dense"]["kl"] == 0 and figures[name]["dense"]["top1"] == 1
        assert figures[name]["dense"]["router_agreement"] == 1 > figures[name]["globe"]["router_agreement"] > 0
    assert figures["export"]["globe"]["kl"] == pytest.approx(figures["checkpoint"]["globe"]["kl"], rel=1e-3)
    assert figures["checkpoint"]["globe"]["kl"] > 1e-7
    assert figures["checkpoint"]["globe"]["perplexity"] > 1
    code, stdout, _ = globe("eval", hf, "--text", text, "--json")
    assert set(json.loads(stdout)["model"]) == {"perplexity", "tokens_per_s", "timed_batches"}
    assert "perplexity" in globe("eval", hf, "--text", text)[1]

    code, stdout, _ = globe("inspect", out, "--verify", "--json")
    inspected = json.loads(stdout)
    assert inspected["families"]["gate"]["relative_error"] == fitted["families"]["gate"]["relative_error"]
    assert inspected["families"]["gate"]["support"] == {"min": 4, "median": 4, "max": 4}
    sizes = inspected["bytes"]
    assert sizes["globe_on_disk"] < sizes["resident"]["bank_first"] < sizes["resident"]["composed"]
    assert all(sizes["peak"][path] > held for path, held in sizes["resident"].items())
    code, stdout, _ = globe("inspect", out)
    assert code == 0 and "dead atoms" in stdout and "error of a layer, gate" in stdout and "Layers" not in stdout
    assert re.search(r"Layers\n.*\n.*\n-.*\n0 .*\n1 .*\n2 .*\n$", globe("inspect", out, "--layers")[1])


def test_the_dense_model_is_loaded_once_and_stays_as_it_is(globe, with_tokenizer, fit_tiny, tmp_path, monkeypatch):
    loaded, expected, windows = [], [], torch.arange(24).view(2, 12)

    def load(*arguments):
        loaded.append(load_model(*arguments))
        expected.append(loaded[-1](windows).logits)
        return loaded[-1]

    monkeypatch.setattr("globe_fit.cli.commands.load_model", load)
    options = ("--base", with_tokenizer, "--text", with_tokenizer / "text.txt", "--device", "cpu", "--json")
    checkpoint = shutil.copytree(fit_tiny()[0], tmp_path / "globe")  # the evaluation stays beside it
    code, stdout, _ = globe("eval", checkpoint, *options)
    assert code == 0 and json.loads(stdout)["globe"]["kl"] > 1e-7
    (dense,) = loaded
    assert not is_patched(dense) and torch.equal(dense(windows).logits, expected[0])

    twin = shared_copy(dense)
    own = {id(tensor) for tensor in (*dense.parameters(), *dense.buffers())}
    assert {id(tensor) for tensor in (*twin.parameters(), *twin.buffers())} == own
    patch(twin, fit_tiny()[0])
    assert is_patched(twin) and not is_patched(dense)
    assert dense.config.to_dict().get("quantization_config") is None


def test_settings_from_a_file(globe, model_dir, tmp_path):
    (tmp_path / "fit.toml").write_text("ratio = 0.7\nsupport = 3\n[varpro]\nsteps = 1\n")
    code, stdout, _ = globe(
        "fit",
        "--no-calibrate",
        model_dir,
        "-o",
        tmp_path / "out",
        "--config",
        tmp_path / "fit.toml",
        "--support",
        "2",
        "--json",
    )
    assert code == 0
    config = json.loads((tmp_path / "out" / CONFIG_NAME).read_text())
    assert config["support"] == 2 and config["provenance"]["fit"]["ratio"] == 0.7


def test_the_solver_can_be_chosen(globe, model_dir, tmp_path):
    sizes = ("--ratio", "0.8", "--support", "4", "--steps", "2", "--json")
    code, _, _ = globe("fit", "--no-calibrate", model_dir, "-o", tmp_path / "out", *sizes, "--solver", "alternating")
    assert code == 0
    fitted = json.loads((tmp_path / "out" / CONFIG_NAME).read_text())["provenance"]["fit"]
    assert fitted["solver"] == "alternating" and fitted["alternating"]["steps"] == 2
    code, _, stderr = globe("fit", "--no-calibrate", model_dir, "-o", tmp_path / "out", *sizes, "--solver", "als")
    assert code == 2 and "solver is 'als'; expected one of varpro, alternating." in stderr


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--phi", "relu"), "phi is 'relu'; expected one of identity, silu, tanh"),
        (("--scope", "half"), "scope is 'half'"),
        (("--device", "tpu9"), "device is 'tpu9'; expected auto, cpu or cuda"),
        (("--config", "nothing.toml"), "nothing.toml is not a readable TOML file"),
        (("--bogus",), "No such option"),
        (("--support", "x"), "Invalid value for '--support'"),
    ],
    ids=str,
)
def test_a_request_that_cannot_be_met(globe, model_dir, tmp_path, options, sentence):
    assert_refused(globe("fit", "--no-calibrate", model_dir, "-o", tmp_path / "out", *options), 2, sentence)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(globe, model_dir, tmp_path):
    result = globe("fit", "--no-calibrate", model_dir, "-o", tmp_path / "out", "--device", "cuda")
    assert_refused(result, 2, "torch sees no CUDA device; use cpu")


def test_a_checkpoint_of_another_model(globe, fit_tiny, save_tiny, with_tokenizer, tmp_path):
    other = save_tiny("olmoe")
    result = globe("export", fit_tiny()[0], "--base", other, "-o", tmp_path / "hf")
    assert_refused(result, 2, "model_type qwen3_moe and")
    result = globe("eval", fit_tiny("olmoe")[0], "--base", with_tokenizer, "--text", with_tokenizer / "text.txt")
    assert_refused(result, 2, "fitted on a olmoe model")
    assert not (tmp_path / "hf").exists()


def test_evaluation_needs_a_text_a_base_and_a_tokenizer(
    globe, fit_tiny, model_dir, with_tokenizer, save_tiny, tmp_path
):
    text = with_tokenizer / "text.txt"
    assert_refused(globe("eval", fit_tiny()[0], "--text", text), 2, "give --base MODEL_DIR")
    assert_refused(globe("eval", with_tokenizer, "--text", tmp_path / "no.txt"), 2, "is not a file")
    (tmp_path / "short.txt").write_text("abc")
    assert_refused(globe("eval", with_tokenizer, "--text", tmp_path / "short.txt"), 2, "has 3 tokens")
    assert_refused(globe("eval", save_tiny("qwen3_moe"), "--text", text), 2, "add the tokenizer of the model")
    (tmp_path / "latin.txt").write_bytes(b"\xe9\xe8" * 300)
    assert_refused(globe("eval", with_tokenizer, "--text", tmp_path / "latin.txt"), 2, "is not UTF-8")


def test_evaluation_on_tasks_of_lm_eval(globe, fit_tiny, with_tokenizer, tmp_path, warm_python):
    """In a process of its own, as a user runs it: lm-eval and its libraries are large guests."""
    pytest.importorskip("lm_eval")
    options = ("--lm-eval", "last_word", "--lm-eval-tasks", shipped_model().parent / "lm_eval" / "tasks")
    sentence = "has no bos_token and no eos_token, and lm-eval"
    assert_refused(globe("eval", with_tokenizer, *options, "--json"), 2, sentence)
    tokenizer = load_tokenizer(with_tokenizer)
    tokenizer.eos_token = "?"
    tokenizer.save_pretrained(with_tokenizer)
    checkpoint = shutil.copytree(fit_tiny()[0], tmp_path / "globe")
    text = ("--text", with_tokenizer / "text.txt", "--lm-eval-limit", 2)
    command = ("-m", "globe_fit", "eval", checkpoint, "--base", with_tokenizer, *options, *text)
    done = warm_python.run(*command)
    assert done.returncode == 0 and "last_word, perplexity" in done.stdout and "text.txt" in done.stdout
    assert "lm-eval runs last_word on the model dense" in done.stderr


def test_evaluation_needs_a_text_or_tasks(globe, with_tokenizer, monkeypatch):
    assert_refused(
        globe("eval", with_tokenizer), 2, "nothing to measure on; give --text FILE, --lm-eval TASKS, or both"
    )
    assert_refused(globe("eval", with_tokenizer, "--lm-eval-limit", 3), 2, "need tasks; name the tasks with --lm-eval")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert_refused(globe("eval", with_tokenizer, "--lm-eval", "arc_easy"), 2, "lm-eval is not installed; run `pip")


def test_models_that_do_not_share_a_vocabulary(globe, with_tokenizer, tmp_path):
    other = tmp_path / "other"
    tiny_model("qwen3_moe", vocab_size=64).save_pretrained(other)
    text = with_tokenizer / "text.txt"
    result = globe("eval", other, "--base", with_tokenizer, "--text", text)
    assert_refused(result, 2, "dense has 128, globe has 64")
    tiny_model("qwen3_moe", vocab_size=8).save_pretrained(with_tokenizer)
    assert_refused(globe("eval", with_tokenizer, "--text", text), 2, "model has 8, the text needs 27")


def test_a_damaged_model_cannot_be_evaluated(globe, with_tokenizer):
    shard = sorted(with_tokenizer.glob("*.safetensors"))[2]
    shard.write_bytes(shard.read_bytes()[:-64])
    assert_refused(globe("eval", with_tokenizer, "--text", with_tokenizer / "text.txt"), 1, "is truncated or damaged")
    (with_tokenizer / "tokenizer.json").write_text("{}")
    assert_refused(globe("eval", with_tokenizer, "--text", with_tokenizer / "text.txt"), 2, "has no tokenizer")


def test_a_fit_that_diverges_saves_the_best_state_and_exits_1(globe, model_dir, tmp_path):
    (tmp_path / "fit.toml").write_text("ratio = 0.8\nsupport = 4\n[varpro]\nlr = 1e30\nsteps = 12\nwarmup_steps = 0\n")
    code, stdout, stderr = globe(
        "fit", "--no-calibrate", model_dir, "-o", tmp_path / "out", "--config", tmp_path / "fit.toml", "--json"
    )
    assert code == 1 and "diverged and its best state is kept; lower the lr. The checkpoint is in" in stderr
    assert json.loads(stdout)["status"]["completed"] is False
    assert globe("inspect", tmp_path / "out", "--verify")[0] == 0


def test_the_demo_does_not_write_over_the_work_of_others(globe, fit_tiny, tmp_path):
    shutil.copytree(fit_tiny()[0], tmp_path / "globe")
    before = (tmp_path / "globe" / CONFIG_NAME).read_text()
    assert_refused(globe("demo", "-o", tmp_path), 2, "holds a finished fit with other settings")
    assert (tmp_path / "globe" / CONFIG_NAME).read_text() == before


def test_report(globe, model_dir, fit_tiny, tmp_path):
    page = tmp_path / "new" / "page.html"
    code, stdout, stderr = globe("report", fit_tiny()[0], "-o", page, "--base", model_dir, "--png", "--json")
    assert (code, stderr) == (0, "") and json.loads(stdout)["html"] == str(page) and page.is_file()
    checkpoint = Path(shutil.copytree(fit_tiny()[0], tmp_path / "globe"))
    assert globe("report", checkpoint) == (0, f"{checkpoint / 'report.html'}\n", "")
    assert globe("inspect", checkpoint, "--verify")[0] == 0


def test_a_report_that_cannot_be_written(globe, fit_tiny, save_tiny, tmp_path, monkeypatch):
    assert_refused(globe("report", tmp_path), 2, "holds no globe_config.json")
    assert_refused(globe("report", fit_tiny()[0], "--base", save_tiny("olmoe")), 2, "model_type qwen3_moe and")
    (tmp_path / "file").touch()
    assert_refused(globe("report", fit_tiny()[0], "-o", tmp_path / "file" / "x.html"), 2, "is a file; give the path")
    assert_refused(globe("report", fit_tiny()[0], "-o", tmp_path), 2, "is a directory; give the name of a file")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert_refused(globe("report", fit_tiny()[0]), 2, "draws with matplotlib; run `pip install matplotlib`")


def test_wandb_that_is_not_installed(globe, model_dir, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    result = globe("fit", "--no-calibrate", model_dir, "-o", tmp_path / "out", *QUICK, "--wandb", "mine")
    assert_refused(result, 2, "wandb is not installed; run `pip install wandb`, or fit without --wandb")
    assert not (tmp_path / "out").exists()


def test_inspect_of_something_else(globe, tmp_path):
    assert_refused(globe("inspect", tmp_path), 2, "holds no globe_config.json")


def test_no_command_prints_the_help(globe):
    code, stdout, _ = globe()
    assert code == 0 and "Usage: globe" in stdout and "fit " in stdout


def test_an_interrupt_writes_nothing(globe, model_dir, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("globe_fit.compression.fit", interrupt)
    code, _, stderr = globe("fit", "--no-calibrate", model_dir, "-o", tmp_path / "out", *QUICK)
    assert code == 130 and stderr.endswith("globe: interrupted; nothing was written.\n")
    assert not (tmp_path / "out").exists()


def test_an_interrupt_of_a_fit_that_began_again(globe, model_dir, tmp_path, monkeypatch):
    """--restart again would discard the snapshot."""
    out = tmp_path / "out"
    command = ("fit", "--no-calibrate", model_dir, "-o", out, *QUICK, "--snapshot-minutes", "0")

    def interrupt(*_):
        raise KeyboardInterrupt

    for more, again in (((), "the same command"), (("--restart",), "the same command without --restart")):
        with monkeypatch.context() as patched:
            patched.setattr("globe_fit.run.snapshots.Snapshots.stop_if_asked", interrupt)
            code, _, stderr = globe(*command, *more)
        sentence = f"interrupted; {again} goes on from step 1 of gate (snapshot in {out / '.snapshot'})."
        assert code == 130 and stderr.endswith(f"globe: {sentence}\n")
    assert globe(*command)[0] == 0


def test_the_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "globe_fit", "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    for command in ("fit", "heal", "sweep", "export", "eval", "inspect", "report", "demo"):
        assert command in done.stdout


def test_a_dry_run_says_what_a_fit_takes_and_writes_nothing(globe, model_dir, tmp_path):
    code, out, _ = globe("fit", "--no-calibrate", model_dir, "-o", tmp_path / "out", "--dry-run", "--json", *QUICK)
    figures = json.loads(out)
    assert code == 0 and not (tmp_path / "out").exists()
    parts = (figures[name] for name in ("solver_bytes", "block_bytes", "host_bytes"))
    assert figures["peak_bytes"] == sum(parts) > figures["bytes"]["globe_on_disk"] / 2
    assert figures["seconds"] > 0 and figures["rank"] > 0
    refused = globe("fit", "--no-calibrate", model_dir, "-o", tmp_path / "out", "--memory-limit", "100kB", *QUICK)
    assert_refused(refused, 2, "at its peak and the memory limit is 100 kB; give a smaller ratio")


def test_a_dry_run_of_a_calibrated_fit_counts_the_model(globe, tmp_path):
    model, text = shipped_model(), shipped_model() / "heldout.txt"
    options = ("fit", model, "-o", tmp_path / "out", "--dry-run")
    free, calibrated = (
        json.loads(globe(*options, "--json", *more)[1])
        for more in (("--no-calibrate",), ("--calibrate", text, "--memory-limit", "97MB"))
    )
    assert (free["calibration_bytes"], free["run_bytes"]) == (0, 0)
    metric, rows = 6 * 192**2 * 4, 6 * 20 * 64 * 4
    assert (calibrated["calibration_bytes"], calibrated["host_bytes"]) == (metric + rows, metric + 2 * rows)
    assert calibrated["block_bytes"] > free["block_bytes"]
    assert calibrated["peak_bytes"] == calibrated["run_bytes"] < 97e6
    code, out, _ = globe(*options, "--calibrate", text)
    assert (
        code == 0
        and re.search(r"metric +915 kB", out)
        and "Before the fit the model runs over the text in at most" in out
    )
    refused = globe(*options, "--calibrate", text, "--memory-limit", "11MB")
    assert_refused(refused, 2, "over a text layer by layer needs 16.7 MB and 11.0 MB may be used")


def test_a_model_may_write_the_text_it_is_calibrated_on(globe, tmp_path):
    options = ("fit", shipped_model(), "-o", tmp_path / "out", "--calibrate", "self")
    figures = json.loads(globe(*options, "--dry-run", "--json")[1])
    assert figures["run_bytes"] > 0 and figures["calibration_bytes"] > 6 * 192**2 * 4
    refused = globe(*options, "--memory-limit", "64MB")  # enough to run over a text
    assert_refused(refused, 2, "MB to write a text and 64.0 MB may be used; give a text")
    refused = globe(*options[:-1], tmp_path / "none.txt")
    assert_refused(refused, 2, 'none.txt is not a file; give a text file to calibrate on, or "self"')
    assert not (tmp_path / "out").exists()
