"""Directories: work is never overwritten without a word, and an error says what a directory is."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import globe_kernels
from globe_fit import FitConfig, VarProConfig, compress
from globe_fit.measure.evaluate import read_evaluation
from globe_kernels import GlobeCheckpoint, RequestError
from globe_kernels.format import directories
from globe_kernels.testing import tiny_model
from tests.integration.conftest import QUICK, assert_refused

CONFIG = FitConfig(ratio=0.8, support=4, device="cpu", varpro=VarProConfig(steps=3))


def contents(directory) -> dict:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def test_a_finished_fit_is_done_or_refused(globe, model_dir, tmp_path):
    out = tmp_path / "out"
    first = compress(model_dir, out, CONFIG, calibrate=None)
    before = contents(out)
    steps: list[dict] = []
    again = compress(model_dir, out, CONFIG, on_step=steps.append, calibrate=None)
    assert not steps and contents(out) == before
    assert again.report == first.report | {"base": again.report["base"], "command": None}
    assert again.status == first.status and again.config.rank == first.config.rank
    assert again.families["up"].adapter.equal(first.families["up"].adapter)
    assert again.families["gate"].code.index.equal(first.families["gate"].code.index)

    code, _, stderr = globe("fit", "--no-calibrate", model_dir, "-o", out, *QUICK)
    assert code == 0 and f"{out} holds this fit already, finished; --restart" in stderr
    sentence = "holds a finished fit with other settings (seed was 0 and is 9); give another directory, or fit over it"
    assert_refused(globe("fit", "--no-calibrate", model_dir, "-o", out, *QUICK, "--seed", "9"), 2, sentence)
    assert contents(out) == before
    code, _, _ = globe("fit", "--no-calibrate", model_dir, "-o", out, *QUICK, "--seed", "9", "--restart")
    assert code == 0 and GlobeCheckpoint(out).config.provenance["seed"] == 9


def test_the_size_that_a_ratio_leads_to_is_the_same_fit(model_dir, tmp_path):
    done = compress(model_dir, tmp_path / "out", CONFIG, calibrate=None)
    sizes = FitConfig(rank=done.config.rank, atoms=done.config.num_atoms, support=4, device="cpu", varpro=CONFIG.varpro)
    steps: list[dict] = []
    compress(model_dir, tmp_path / "out", sizes, on_step=steps.append, calibrate=None)
    assert not steps


@pytest.mark.parametrize("command", ["fit", "sweep", "report", "export", "demo"])
def test_a_foreign_directory_is_left_alone(globe, command, model_dir, fit_tiny, tmp_path):
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "chapter.tex").write_text("years of work")
    checkpoint = fit_tiny()[0]
    page = foreign / "chapter.tex"
    arguments = {
        "fit": ("fit", "--no-calibrate", model_dir, "-o", foreign, *QUICK),
        "sweep": ("sweep", model_dir, "-o", foreign, "--ratio", "0.8"),
        "report": ("report", checkpoint, "-o", page),
        "export": ("export", checkpoint, "--base", model_dir, "-o", foreign),
        "demo": ("demo", "-o", foreign),
    }
    if command == "demo":
        foreign = foreign / "globe"
        foreign.mkdir()
        (foreign / "chapter.tex").write_text("years of work")
    before = contents(foreign)
    assert_refused(globe(*arguments[command]), 2, "chapter.tex")
    assert contents(foreign) == before


@pytest.mark.parametrize("command", ["fit", "sweep", "export"])
def test_the_directory_of_the_model_is_left_alone(globe, command, model_dir, fit_tiny):
    before = contents(model_dir)
    arguments = {
        "fit": ("fit", "--no-calibrate", model_dir, "-o", model_dir, *QUICK),
        "sweep": ("sweep", model_dir, "-o", model_dir, "--ratio", "0.8"),
        "export": ("export", fit_tiny()[0], "--base", model_dir, "-o", model_dir),
    }
    result = globe(*arguments[command])
    assert_refused(result, 2, str(model_dir))
    assert contents(model_dir) == before
    assert globe("plan", model_dir, "--support", "4")[0] == 0


@pytest.mark.parametrize("inner", [".", "inner"])
def test_a_link_that_leads_nowhere(globe, model_dir, tmp_path, inner):
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "gone")
    result = globe("fit", "--no-calibrate", model_dir, "-o", link / inner, *QUICK)
    sentence = f"{link} is a link to {tmp_path / 'gone'}, which does not exist; make that directory, or give another."
    assert_refused(result, 2, sentence)
    assert not (tmp_path / "gone").exists()


def test_hidden_files_are_no_work_of_others(globe, model_dir, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".DS_Store").touch()
    assert globe("fit", "--no-calibrate", model_dir, "-o", tmp_path / "out", *QUICK)[0] == 0


def named(tmp_path, name, **files):
    directory = tmp_path / name
    directory.mkdir()
    for file, text in files.items():
        (directory / file.replace("__", ".")).write_text(text)
    return directory


def test_what_is_no_model_is_named(globe, export_tiny, fit_tiny, model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    unfinished = named(tmp_path, "unfinished")
    (unfinished / ".snapshot").mkdir()
    (unfinished / ".snapshot" / "gate-3-0.safetensors").touch()
    sentences = {
        "Qwen/Qwen3-30B-A3B": "is no directory here, and a model of the Hugging Face Hub of this name is not",
        "/nowhere/at/all": "/nowhere/at/all does not exist; give the local directory",
        named(tmp_path, "lora", adapter_config__json="{}"): "is a LoRA adapter without its model; merge it first",
        named(tmp_path, "quants", model__gguf="GGUF"): "is a model in GGUF, which GloBE does not read",
        tmp_path / "quants" / "model.gguf": "is a model in GGUF",
        export_tiny(): "is a model that GloBE compressed already; give the dense model that it was made from",
        fit_tiny()[0]: "is a GloBE checkpoint without the rest of its model; give the dense model",
        unfinished: "holds an unfinished fit; give the dense model",
        named(tmp_path, "notes", a__txt="", b__txt=""): "holds no config.json but a.txt, b.txt",
        named(tmp_path, "nothing"): "is empty; give the local directory",
    }
    for path, sentence in sentences.items():
        assert_refused(globe("fit", "--no-calibrate", path, "-o", tmp_path / "new", *QUICK), 2, sentence)
    with pytest.raises(RequestError, match="is a model that GloBE compressed already"):
        compress(export_tiny(), tmp_path / "new", CONFIG, calibrate=None)
    assert not (tmp_path / "new").exists()


def test_what_is_no_checkpoint_is_named(globe, export_tiny, fit_tiny, model_dir, tmp_path):
    dense, unfinished, sweep = tmp_path / "dense", named(tmp_path, "unfinished"), named(tmp_path, "sweep")
    assert globe("export", fit_tiny()[0], "--base", model_dir, "-o", dense, "--dense")[0] == 0
    (unfinished / ".snapshot").mkdir()
    (unfinished / ".snapshot" / "gate-3-0.safetensors").touch()
    shutil.copytree(fit_tiny()[0], sweep / "r16-m8-s4")
    sentences = {
        export_tiny(): "it is the whole model that `globe export` wrote. Load it with from_pretrained after `import",
        dense: "it is a dense model that `globe export --dense` wrote; give the directory that",
        model_dir: f"it is a model. Fit it first: `globe fit {model_dir} -o OUT`, then give OUT.",
        unfinished: "its fit is not finished; run the same `globe fit` command again.",
        sweep: f"it is a sweep. Give one of its points, such as {sweep / 'r16-m8-s4'}.",
    }
    for path, sentence in sentences.items():
        assert_refused(globe("inspect", path), 2, sentence)
        with pytest.raises(RequestError) as refused:
            globe_kernels.patch(tiny_model("qwen3_moe"), path)
        assert sentence in str(refused.value)
    assert "give one of" not in globe("report", unfinished)[2], "the page of an unfinished fit is a page"


def test_arguments_in_the_wrong_order(globe, fit_tiny, model_dir, tmp_path):
    checkpoint, new = fit_tiny()[0], tmp_path / "new"
    for arguments, right in (
        (("fit", "--no-calibrate", new, "-o", model_dir, *QUICK), f"globe fit {model_dir} -o {new}"),
        (("sweep", new, "-o", model_dir, "--rank", "16"), f"globe sweep {model_dir} -o {new}"),
        (("export", model_dir, "--base", checkpoint, "-o", new), f"globe export {checkpoint} --base {model_dir}"),
        (("eval", model_dir, "--base", checkpoint, "--text", new), f"globe eval {checkpoint} --base {model_dir}"),
    ):
        assert_refused(globe(*arguments), 2, f"are in the wrong order; write {right}")
    assert_refused(globe("--json", "fit", model_dir), 2, "--json is an option of a command and goes after it")


def test_a_directory_that_may_not_be_read(globe, model_dir, tmp_path, monkeypatch):
    def denied(*_, **__):
        raise PermissionError(13, "Permission denied", str(model_dir / "config.json"))

    monkeypatch.setattr(directories.Path, "read_text", denied)
    assert_refused(globe("fit", "--no-calibrate", model_dir, "-o", tmp_path / "new", *QUICK), 2, "permission denied")


def test_the_evaluation_stays_beside_the_checkpoint(globe, fit_tiny, with_tokenizer, tmp_path):
    checkpoint = shutil.copytree(fit_tiny()[0], tmp_path / "globe")
    text = with_tokenizer / "text.txt"
    code, stdout, _ = globe("eval", checkpoint, "--base", with_tokenizer, "--text", text, "--json", "--device", "cpu")
    printed, kept = json.loads(stdout), json.loads((checkpoint / "evaluation.json").read_text())
    assert code == 0 and kept["globe"] == printed["globe"] and kept["dense"] == printed["dense"]
    assert kept["text"] == "text.txt" and kept["tokens"] == printed["tokens"] and kept["device"] == "cpu"
    assert kept["command"].startswith(f"globe eval {checkpoint}") and set(kept["strategies"]) <= {
        "composed",
        "bank_first",
        "cached",
        "scratch",
    }
    assert printed["labels"]["globe"].startswith(f"GloBE: checkpoint {checkpoint} in {with_tokenizer}, by ")
    assert globe("inspect", checkpoint, "--verify")[0] == 0


def test_a_checkpoint_without_its_report_is_not_overwritten(globe, model_dir, tmp_path):
    out = tmp_path / "out"
    compress(model_dir, out, CONFIG, calibrate=None)
    (out / "metrics.jsonl").unlink()
    before = contents(out)
    assert_refused(
        globe("fit", "--no-calibrate", model_dir, "-o", out, *QUICK), 2, "holds a checkpoint without its metrics.jsonl"
    )
    assert contents(out) == before
    assert globe("fit", "--no-calibrate", model_dir, "-o", out, *QUICK, "--restart")[0] == 0


def test_a_fit_that_was_killed_early_does_not_unlock_a_finished_fit(globe, model_dir, tmp_path):
    """--restart over a finished fit, killed before its first snapshot; then another fit without --restart."""
    out = tmp_path / "out"
    compress(model_dir, out, CONFIG, calibrate=None)
    (out / ".snapshot").mkdir()
    (out / ".snapshot" / "metrics.jsonl").write_text("")
    before = contents(out)
    assert_refused(
        globe("fit", "--no-calibrate", model_dir, "-o", out, *QUICK, "--seed", "5"),
        2,
        "holds a finished fit with other",
    )
    assert contents(out) == before


def test_experts_that_changed_are_another_model(globe, model_dir, tmp_path):
    """The same shapes and the same name, as after a fine-tune in place."""
    out, unfinished = tmp_path / "out", tmp_path / "unfinished"
    assert globe("fit", "--no-calibrate", model_dir, "-o", out, *QUICK)[0] == 0

    def stop(record):
        if (record["family"], record["step"]) == ("up", 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(model_dir, unfinished, CONFIG, on_step=stop, snapshot_minutes=0, calibrate=None)
    for shard in model_dir.glob("*.safetensors"):
        tensors = {name: tensor * 1.01 for name, tensor in load_file(shard).items()}
        save_file(tensors, shard, {"format": "pt"})
    before = contents(out)
    sentence = "the experts have changed since"
    assert_refused(globe("fit", "--no-calibrate", model_dir, "-o", out, *QUICK), 2, sentence)
    assert_refused(globe("export", out, "--base", model_dir, "-o", tmp_path / "hf"), 2, sentence)
    assert_refused(
        globe("fit", "--no-calibrate", model_dir, "-o", unfinished, *QUICK),
        2,
        "holds an unfinished fit with other settings (we",
    )
    assert contents(out) == before and not (tmp_path / "hf").exists()


def test_an_evaluation_belongs_to_its_fit(globe, with_tokenizer, tmp_path):
    out, text = tmp_path / "out", with_tokenizer / "text.txt"
    assert globe("fit", "--no-calibrate", with_tokenizer, "-o", out, *QUICK)[0] == 0
    assert globe("eval", out, "--base", with_tokenizer, "--text", text, "--device", "cpu")[0] == 0
    old = (out / "evaluation.json").read_text()
    assert read_evaluation(GlobeCheckpoint(out)) is not None
    assert globe("report", out)[0] == 0 and (out / "report.html").is_file()
    assert globe("fit", "--no-calibrate", with_tokenizer, "-o", out, *QUICK, "--seed", "4", "--restart")[0] == 0
    assert not (out / "evaluation.json").exists() and not (out / "report.html").exists()
    for text in (old, "{", "{}"):
        (out / "evaluation.json").write_text(text)
        assert read_evaluation(GlobeCheckpoint(out)) is None


def test_a_sweep_that_begins_again_keeps_files_and_finished_fits(globe, model_dir, tmp_path, monkeypatch):
    out = tmp_path / "sweep"
    options = ("--rank", "16", "--atoms", "8", "--support", "4", "--steps", "2", "--device", "cpu")
    assert globe("sweep", model_dir, "-o", out, *options)[0] == 0
    point = out / "r16-m8-s4"
    (point / "notes.txt").write_text("mine")
    before = contents(point)

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("globe_fit.compression.fit", interrupt)
        assert globe("sweep", model_dir, "-o", out, *options, "--restart")[0] == 130
    assert contents(point) == before
    assert globe("sweep", model_dir, "-o", out, *options, "--restart")[0] == 0
    assert (point / "notes.txt").read_text() == "mine"


def test_a_sweep_that_was_killed_early_goes_on(globe, model_dir, tmp_path):
    out = tmp_path / "sweep"
    (out / "r16-m8-s4" / ".snapshot").mkdir(parents=True)
    options = ("--rank", "16", "--atoms", "8", "--support", "4", "--steps", "2", "--device", "cpu")
    assert globe("sweep", model_dir, "-o", out, *options)[0] == 0
    (out / "notes.txt").write_text("mine")
    assert globe("sweep", model_dir, "-o", out, *options)[0] == 0
    assert (out / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("left", [".globe.lock", ".staging/globe.0.partial"])
def test_what_a_killed_writer_left_opens_no_directory_of_others(globe, fit_tiny, model_dir, tmp_path, left):
    mine = tmp_path / "mine"
    (mine / left).parent.mkdir(parents=True)
    (mine / left).touch()
    (mine / "model-00001-of-00002.safetensors").write_text("mine")
    for command in (("fit", "--no-calibrate", model_dir, *QUICK), ("export", fit_tiny()[0], "--base", model_dir)):
        assert_refused(globe(*command, "-o", mine), 2, f"{mine} holds other files")
    assert (mine / "model-00001-of-00002.safetensors").read_text() == "mine"


@pytest.mark.parametrize("dense", [(), ("--dense",)], ids=["globe", "dense"])
def test_an_export_over_an_export_of_another_model(globe, fit_tiny, model_dir, tmp_path, dense):
    out = tmp_path / "hf"
    (model_dir / "chat_template.jinja").write_text("of the first")
    command = ("export", fit_tiny()[0], "--base", model_dir, "-o", out, *dense)
    assert globe(*command)[0] == 0
    before = contents(out)
    (model_dir / "chat_template.jinja").unlink()
    sentence = f"{out} has chat_template.jinja and {model_dir} does not: the export there is of another model"
    assert_refused(globe(*command), 2, sentence)
    assert contents(out) == before
    (out / "chat_template.jinja").unlink()
    assert globe(*command)[0] == 0


def test_verify_of_inspect_refuses_a_flipped_bit(globe, fit_tiny, tmp_path):
    out = Path(shutil.copytree(fit_tiny()[0], tmp_path / "globe"))
    path = out / "globe.safetensors"
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)
    assert_refused(globe("inspect", out, "--verify"), 1, "globe.safetensors has sha256")
