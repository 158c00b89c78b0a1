"""Models, settings and disks that a fit cannot work with: one sentence, an exit code, and nothing lost."""

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from globe_fit.run.snapshots import Snapshots
from tests.integration.conftest import QUICK, assert_refused

EXPERT = "model.layers.1.mlp.experts.3.{}_proj.weight"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def out(fit_tiny, tmp_path) -> Path:
    """A directory that holds the checkpoint of an earlier fit."""
    return Path(shutil.copytree(fit_tiny()[0], tmp_path / "out"))


def contents(directory: Path, snapshots: bool = False) -> dict[str, bytes]:
    """All files but the snapshots of an unfinished fit, which may come to what there was."""
    paths = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path): path.read_bytes() for path in paths if snapshots or ".snapshot" not in path.parts}


def shard_of(model_dir: Path, key: str) -> Path:
    return model_dir / json.loads((model_dir / INDEX).read_text())["weight_map"][key]


def change_tensor(model_dir: Path, key: str, change) -> None:
    path = shard_of(model_dir, key)
    tensors = load_file(path)
    tensors[key] = change(tensors[key])
    save_file(tensors, path, {"format": "pt"})


def not_a_moe(model_dir: Path) -> None:
    (model_dir / "config.json").write_text('{"model_type": "llama"}')


def a_missing_shard(model_dir: Path) -> None:
    shard_of(model_dir, EXPERT.format("up")).unlink()


def a_truncated_shard(model_dir: Path) -> None:
    shard = shard_of(model_dir, EXPERT.format("up"))
    shard.write_bytes(shard.read_bytes()[:-64])


def nan_in_an_expert(model_dir: Path) -> None:
    change_tensor(model_dir, EXPERT.format("up"), lambda t: t.index_fill(0, torch.tensor([5]), float("nan")))


def infinity_in_an_expert(model_dir: Path) -> None:
    change_tensor(model_dir, EXPERT.format("gate"), lambda t: t.index_fill(1, torch.tensor([7]), float("-inf")))


def one_expert_of_another_shape(model_dir: Path) -> None:
    change_tensor(model_dir, EXPERT.format("up"), lambda t: t[:40].contiguous())


def all_experts_of_another_shape(model_dir: Path) -> None:
    config = json.loads((model_dir / "config.json").read_text())
    (model_dir / "config.json").write_text(json.dumps(config | {"moe_intermediate_size": 32}))


@pytest.mark.parametrize(
    ("damage", "code", "sentences"),
    [
        (
            not_a_moe,
            2,
            ["LlamaForCausalLM has no routed experts; give a Mixture-of-Experts model."],
        ),
        (a_missing_shard, 1, ["Shard model-0", "is missing from", "download it again."]),
        (a_truncated_shard, 1, ["Shard", "is truncated or damaged", "download it again."]),
        (nan_in_an_expert, 1, ["Expert 3 of layer 1 has NaN or infinity in its up matrix", EXPERT.format("up")]),
        (infinity_in_an_expert, 1, ["Expert 3 of layer 1 has NaN or infinity in its gate matrix"]),
        (one_expert_of_another_shape, 2, ["experts of layer 1 differ in shape:", "not layers whose experts differ"]),
        (all_experts_of_another_shape, 1, ["are 48 x 64 and config.json says 32 x 64"]),
    ],
)
def test_a_model_that_cannot_be_fitted(globe, model_dir, out, tmp_path, damage, code, sentences):
    damage(model_dir)
    before = contents(tmp_path)
    for directory in (out, tmp_path / "new"):
        result = globe("fit", "--no-calibrate", model_dir, "-o", directory, *QUICK, "--restart")
        for sentence in sentences:
            assert_refused(result, code, sentence)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--rank", "49"), "rank is 49 and the experts of model are 48 x 64; give a rank of at most 48."),
        (("--atoms", "8"), "support is 12 and the bank has 8 atoms; give a support of at most 8, or more atoms."),
        (("--atoms", "25"), "atoms is 25 and model has 24 experts; give at most one atom per expert."),
        (
            ("--ratio", "0.01"),
            "ratio 0.01 cannot be reached on model with support 12; give a ratio from 0.0417 to 1.7656.",
        ),
        (
            ("--ratio", "1.9", "--rank", "16"),
            "ratio 1.9 cannot be reached on model with support 12, rank 16; give a ratio",
        ),
        (("--ratio", "62.5"), "ratio is 62.5 and a ratio is a share of the dense bytes; did you mean 0.625?"),
    ],
    ids=["r > p", "s > m", "m > n", "a ratio that is too small", "a ratio that is too large", "a ratio in percent"],
)
def test_sizes_that_cannot_be_had(globe, model_dir, out, tmp_path, options, sentence):
    before = contents(tmp_path)
    assert_refused(globe("fit", "--no-calibrate", model_dir, "-o", out, *options), 2, sentence)
    assert_refused(globe("fit", "--no-calibrate", model_dir, "-o", tmp_path / "new", *options), 2, sentence)
    assert contents(tmp_path) == before and not (tmp_path / "new").exists()


@pytest.mark.parametrize("key", ["model.layers.1.mlp.gate.weight", "model.layers.1.self_attn.o_proj.weight"])
def test_nan_outside_of_the_experts_has_no_figures(globe, with_tokenizer, fit_tiny, tmp_path, key):
    checkpoint = Path(shutil.copytree(fit_tiny()[0], tmp_path / "globe"))
    change_tensor(with_tokenizer, key, lambda t: t.index_fill(0, torch.tensor([1]), float("nan")))
    of_text = ("--text", with_tokenizer / "text.txt", "--json")
    sentence = "gives NaN or infinite logits on this text; restore its files."
    assert_refused(globe("eval", with_tokenizer, *of_text), 1, f"The model {sentence}")
    assert_refused(globe("eval", checkpoint, "--base", with_tokenizer, *of_text), 1, f"The dense model {sentence}")
    assert not (checkpoint / "evaluation.json").exists()


def test_a_configuration_with_which_the_model_fails(globe, with_tokenizer):
    config = json.loads((with_tokenizer / "config.json").read_text())
    (with_tokenizer / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": 99}))
    result = globe("eval", with_tokenizer, "--text", with_tokenizer / "text.txt")
    assert_refused(result, 1, "The model fails on this text (RuntimeError: selected index k out of range);")


@pytest.mark.parametrize("text", ["text.txt", "self"])
def test_a_model_that_fails_while_a_fit_is_calibrated(globe, with_tokenizer, tmp_path, monkeypatch, text):
    def fail(*_, **__):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr("transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeModel.forward", fail)
    calibrate = text if text == "self" else with_tokenizer / text
    result = globe("fit", with_tokenizer, "-o", tmp_path / "out", *QUICK, "--calibrate", calibrate)
    assert_refused(result, 1, "The model fails on this text (RuntimeError: CUDA out of memory); restore its files, or")
    assert not (tmp_path / "out").exists()


def test_a_metric_of_a_solver_that_is_infinite_is_null(globe, model_dir, tmp_path, monkeypatch):
    def infinite(self):
        return 0, float("inf")

    monkeypatch.setattr("globe_fit.solvers.dictionary.OptimalDirections.step", infinite)
    (tmp_path / "fit.toml").write_text('[alternating]\ndictionary = "mod"\n')
    out = tmp_path / "out"
    options = ("--solver", "alternating", "--config", tmp_path / "fit.toml", "--json")
    code, stdout, _ = globe("fit", "--no-calibrate", model_dir, "-o", out, *QUICK, *options)
    assert code == 0 and "Infinity" not in stdout
    records = (out / "metrics.jsonl").read_text()
    assert '"dictionary_condition": null' in records and "Infinity" not in records


@pytest.mark.parametrize("step", ["os.fsync", "globe_kernels.format.writing.save_file"])
def test_a_full_disk_keeps_the_old_checkpoint(globe, model_dir, out, monkeypatch, step):
    before = contents(out)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(step, full)
        result = globe("fit", "--no-calibrate", model_dir, "-o", out, *QUICK, "--seed", "1", "--restart")
    assert_refused(result, 1, "has no room for the new files")
    assert "nothing was written and the old files are unchanged; free some space" in result[2]
    assert contents(out) == before
    assert globe("inspect", out, "--verify")[0] == 0
    assert globe("fit", "--no-calibrate", model_dir, "-o", out, *QUICK, "--seed", "1", "--restart")[0] == 0
    assert len(contents(out, snapshots=True)) == len(before)


def test_the_unfinished_fit_of_other_settings(globe, model_dir, save_tiny, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def interrupted(self, *_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Snapshots, "stop_if_asked", interrupted)
        assert globe("fit", "--no-calibrate", model_dir, "-o", out, *QUICK, "--snapshot-minutes", "0")[0] == 130
    before = contents(out, snapshots=True)
    assert any(name.startswith(f"{out}/.snapshot/gate-") for name in before)
    (tmp_path / "fit.toml").write_text("[varpro]\nlr = 0.5\n")
    other = ("fit", "--no-calibrate", model_dir, "-o", out, *QUICK, "--seed", "7", "--config", tmp_path / "fit.toml")
    sentence = f"{out} holds an unfinished fit with other settings (seed was 0 and is 7, varpro.lr was 1.0 and is 0.5);"
    assert_refused(globe(*other), 2, sentence)
    result = globe("fit", "--no-calibrate", save_tiny("olmoe"), "-o", out, *QUICK)
    assert_refused(result, 2, "model.model_type was qwen3_moe and is olmoe")
    assert contents(out, snapshots=True) == before
    assert globe(*other, "--restart")[0] == 0
