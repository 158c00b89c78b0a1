import copy
import json
import pickle
import random
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub.repocard import metadata_load
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

import globe_kernels
from globe_fit import ExpertSource, compress, export_dense, export_globe
from globe_fit.measure.evaluate import record_evaluation
from globe_kernels import GlobeCheckpoint, GlobeError, GlobeMoEFFN, RequestError
from globe_kernels.format import writing
from globe_kernels.format.names import EXPORT_GUARD
from globe_kernels.testing import assert_close, tiny_model
from globe_kernels.units import format_bytes
from tests.conftest import MODEL_TYPES, TINY_FIT
from tests.integration.test_patching import TOKENS, logits


def load(path, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_export_load_save_load(model_type, export_tiny, fit_tiny, tmp_path):
    patched = tiny_model(model_type)
    globe_kernels.patch(patched, fit_tiny(model_type)[0])
    expected = logits(patched)

    model, info = AutoModelForCausalLM.from_pretrained(
        export_tiny(model_type), dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert any(isinstance(module, GlobeMoEFFN) for module in model.modules())
    assert not any("gate_up" in name for name, _ in model.named_parameters())
    # not equal: weights from a file are mapped, and how products round may depend on where in a cache line they begin
    assert_close(logits(model.eval()), expected, rms=1e-6, peak=1e-5)

    for name, source in {"loaded": model, "patched": patched}.items():
        source.save_pretrained(tmp_path / name)
        again = load(tmp_path / name)
        assert_close(logits(again), expected, rms=1e-6, peak=1e-5)
        values = again.state_dict()
        assert values.keys() == model.state_dict().keys()
        assert all(torch.equal(values[key], value) for key, value in model.state_dict().items())


def test_the_bank_is_stored_once(export_tiny, fit_tiny):
    keys = load_file(export_tiny() / "globe-model.safetensors")
    banks = [name for name in keys if "bank" in name]
    assert sorted(banks) == ["globe_bank.gate", "globe_bank.up"]
    assert keys["globe_bank.up"].shape == fit_tiny()[1].config.bank_shape()
    assert keys["model.layers.0.mlp.experts.gate_code_value"].dtype == torch.float32


def test_loads_in_bf16_with_fp32_codes(export_tiny):
    model = load(export_tiny(), torch.bfloat16)
    module = next(module for module in model.modules() if isinstance(module, GlobeMoEFFN))
    assert module.device_bank.gate.dtype == module.gate_adapter.dtype == module.down_proj.dtype == torch.bfloat16
    assert module.gate_code_value.dtype == torch.float32
    assert_close(logits(model), logits(load(export_tiny())), rms=5e-2, peak=1e-1)


def test_the_base_model_without_a_head(export_tiny):
    body = AutoModel.from_pretrained(export_tiny(), dtype=torch.float32).eval()
    with torch.no_grad():
        hidden = body(TOKENS).last_hidden_state
        expected = load(export_tiny()).model(TOKENS).last_hidden_state
    assert torch.equal(hidden, expected)


def test_generates(export_tiny):
    model = load(export_tiny())
    out = model.generate(TOKENS[:, :8], max_new_tokens=4, do_sample=False)
    with torch.no_grad():
        expected = model(out[:, :-1]).logits[0, 7:].argmax(-1)
    assert torch.equal(out[0, 8:], expected)


def test_everything_else_of_the_base_is_copied(save_tiny, export_tiny):
    base = ExpertSource(save_tiny("qwen3_moe"))
    exported = load_file(export_tiny() / "globe-model.safetensors")
    kept = [key for key in base.files.keys if ".experts." not in key or "down_proj" in key]
    assert len(kept) > 20
    for key in kept:
        assert torch.equal(exported[key], base.files.read(key))
    assert (export_tiny() / "generation_config.json").is_file()
    assert "import globe_kernels" in (export_tiny() / "README.md").read_text()


@pytest.mark.parametrize(
    ("model_type", "fused"),
    [("qwen3_moe", False), ("qwen3_moe", True), ("gpt_oss", True)],
    ids=["per expert", "fused", "fused, transposed and interleaved"],
)
def test_dense_export_in_the_layout_of_the_base(model_type, fused, save_tiny, fit_tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "MAX_SHARD_BYTES", 200_000)
    base = ExpertSource(save_tiny(model_type, fused))
    export_dense(GlobeCheckpoint(fit_tiny(model_type)[0]), base, tmp_path / "dense")
    exported = ExpertSource(tmp_path / "dense")
    assert exported.files.keys == base.files.keys
    assert len([*(tmp_path / "dense").glob("*.safetensors")]) > 3
    for key in base.files.keys:
        if key.endswith("_bias") or ".down_proj" in key:
            assert torch.equal(exported.files.read(key), base.files.read(key))
    patched = tiny_model(model_type)
    globe_kernels.patch(patched, fit_tiny(model_type)[0])
    model = load(tmp_path / "dense")
    assert not any(isinstance(module, GlobeMoEFFN) for module in model.modules())
    assert (logits(model) - logits(patched)).abs().max() <= 1e-4


def test_a_sharded_export_and_another_dtype(save_tiny, fit_tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "MAX_SHARD_BYTES", 100_000)
    base, checkpoint = ExpertSource(save_tiny("qwen3_moe")), GlobeCheckpoint(fit_tiny()[0])
    export_globe(checkpoint, base, tmp_path / "hf", dtype=torch.bfloat16)
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 3
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto")
    assert model.dtype == torch.bfloat16
    # a second, unsharded export into the same directory leaves nothing of the first
    monkeypatch.undo()
    for _ in range(3):
        export_globe(checkpoint, base, tmp_path / "hf")
        (left,) = (tmp_path / "hf").glob("*.safetensors*")
        assert re.fullmatch(r"globe-model(-[0-9a-f]{8})?.safetensors", left.name)
        assert load(tmp_path / "hf") is not None


def test_a_cast_spares_what_decides_between_experts_and_refuses_what_it_cannot_hold(save_tiny, fit_tiny, tmp_path):
    checkpoint = GlobeCheckpoint(fit_tiny("deepseek_v3")[0])
    base_dir = shutil.copytree(save_tiny("deepseek_v3"), tmp_path / "base")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    shard = base_dir / ExpertSource(base_dir).files.files.weight_map[name]
    tensors = load_file(shard)
    tensors[name] = 8 + torch.linspace(0, 0.02, len(tensors[name]))
    save_file(tensors, shard, {"format": "pt"})
    export_globe(checkpoint, ExpertSource(base_dir), tmp_path / "hf", dtype=torch.bfloat16)
    exported = load_file(tmp_path / "hf" / "globe-model.safetensors")
    assert torch.equal(exported[name], tensors[name])
    assert exported["lm_head.weight"].dtype == torch.bfloat16

    norm = "model.norm.weight"
    shard = base_dir / ExpertSource(base_dir).files.files.weight_map[norm]
    tensors = load_file(shard)
    tensors[norm] += 1e5
    save_file(tensors, shard, {"format": "pt"})
    with pytest.raises(GlobeError, match="model.norm.weight has values that torch.float16 cannot hold"):
        export_globe(checkpoint, ExpertSource(base_dir), tmp_path / "fp16", dtype=torch.float16)
    assert not (tmp_path / "fp16").exists()


def test_a_checkpoint_beside_its_base_is_not_copied_into_the_export(save_tiny, fit_tiny, tmp_path):
    base_dir = shutil.copytree(save_tiny("qwen3_moe"), tmp_path / "base")
    for file in fit_tiny()[0].iterdir():
        if file.name != "config.json":
            shutil.copy(file, base_dir)
    export_globe(GlobeCheckpoint(base_dir), ExpertSource(base_dir), tmp_path / "hf")
    assert not {"globe_config.json", "fit_report.json", "metrics.jsonl", "globe.safetensors"} & {
        path.name for path in (tmp_path / "hf").iterdir()
    }


def test_an_export_that_was_killed_can_be_written_again(save_tiny, fit_tiny, tmp_path):
    (tmp_path / "hf" / ".staging").mkdir(parents=True)
    export_globe(GlobeCheckpoint(fit_tiny()[0]), ExpertSource(save_tiny("qwen3_moe")), tmp_path / "hf")
    assert load(tmp_path / "hf") is not None
    assert not list((tmp_path / "hf").glob(".staging*"))


@pytest.fixture
def exported(export_tiny, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(export_tiny(), tmp_path / "hf")


def rewrite(path, change) -> None:
    tensors = load_file(path / "globe-model.safetensors")
    change(tensors)
    save_file(tensors, path / "globe-model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: t.pop("model.layers.1.mlp.experts.up_adapter"), "layers.1.mlp.experts.up_adapter is missing"),
        (lambda t: t.pop("globe_bank.gate"), "globe_bank.gate is missing"),
        (lambda t: t.update({"globe_bank.gate": t["globe_bank.gate"][:3].clone()}), r"globe_bank.gate is \(3, "),
        (lambda t: t["model.layers.0.mlp.experts.gate_code_index"].fill_(99), "atom ids from 99 to 99"),
    ],
    ids=["a missing adapter", "a missing bank", "another shape", "a code outside the bank"],
)
def test_a_damaged_export_is_refused(exported, change, sentence, monkeypatch):
    rewrite(exported, change)
    with monkeypatch.context() as patched, pytest.raises(GlobeError, match=sentence):
        patched.setenv("GLOBE_VERIFY", "0")
        load(exported)
    with pytest.raises(GlobeError):
        load(exported)


def flip(path: Path, seed: int) -> None:
    """Flip a bit of the tensors in a safetensors file."""
    data = bytearray(path.read_bytes())
    header = int.from_bytes(data[:8], "little") + 8
    position = random.Random(seed).randrange(8 * header, 8 * len(data))
    data[position // 8] ^= 1 << position % 8
    path.write_bytes(data)


def test_a_loaded_export_can_be_copied(export_tiny):
    model = load(export_tiny())
    for same in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(same), logits(model))


@pytest.mark.parametrize("seed", range(6))
def test_a_flipped_bit_is_refused(exported, seed):
    flip(exported / "globe-model.safetensors", seed)
    with pytest.raises(GlobeError, match=r"has sha256 .* is recorded: the file was changed or damaged; export"):
        load(exported)


def test_a_shard_of_another_export_is_refused(save_tiny, fit_tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "MAX_SHARD_BYTES", 100_000)
    base = ExpertSource(save_tiny("qwen3_moe"))
    compress(base.model_dir, tmp_path / "other", replace(TINY_FIT, seed=1), calibrate=None)
    for name, checkpoint in (("one", fit_tiny()[0]), ("two", tmp_path / "other")):
        export_globe(GlobeCheckpoint(checkpoint), base, tmp_path / name)
    last = sorted((tmp_path / "one").glob("*.safetensors"))[-1]
    shutil.copyfile(tmp_path / "two" / last.name, last)
    with pytest.raises(GlobeError, match=f"{last.name} has sha256"):
        load(tmp_path / "one")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t, at: t.pop(f"{at}.up_bias"), "experts.up_bias is missing"),
        (lambda t, at: t.pop(f"{at}.down_proj"), "experts.down_proj is missing"),
        (lambda t, at: t.update({f"{at}.down_bias": t[f"{at}.down_bias"][:4].clone()}), r"down_bias is \(4, 64\)"),
        (
            lambda t, at: t.update({f"{at}.down_proj": t[f"{at}.down_proj"].mT.contiguous()}),
            r"down_proj is \(8, 48, 64\) .* says \(8, 64, 48\)",
        ),
    ],
    ids=["a missing bias", "a missing down", "a bias of another shape", "down in the layout of the base"],
)
def test_a_damaged_export_with_biases_is_refused(export_tiny, tmp_path, change, sentence):
    exported = shutil.copytree(export_tiny("gpt_oss"), tmp_path / "hf")
    rewrite(exported, lambda tensors: change(tensors, "model.layers.1.mlp.experts"))
    with pytest.raises(GlobeError, match=sentence):
        load(exported)


def test_a_newer_format_is_refused(exported):
    config = json.loads((exported / "config.json").read_text())
    config["quantization_config"]["format_version"] = 9
    (exported / "config.json").write_text(json.dumps(config))
    with pytest.raises(GlobeError, match="format version 9"):
        load(exported)


def test_export_refuses_another_base_and_a_directory_that_is_not_its_own(save_tiny, fit_tiny, tmp_path):
    checkpoint, base = GlobeCheckpoint(fit_tiny()[0]), ExpertSource(save_tiny("qwen3_moe"))
    with pytest.raises(RequestError, match="with model_type qwen3_moe and .* has olmoe"):
        export_globe(checkpoint, ExpertSource(save_tiny("olmoe")), tmp_path / "hf")
    with pytest.raises(RequestError, match="is the base model itself"):
        export_dense(checkpoint, base, base.model_dir)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep")
    with pytest.raises(RequestError, match="and no export of GloBE; give a new"):
        export_globe(checkpoint, base, tmp_path / "notes")
    assert [path.name for path in (tmp_path / "notes").iterdir()] == ["mine.txt"]


def test_without_globe_kernels_transformers_refuses(export_tiny, fit_tiny, tmp_path):
    """In a process of its own, because this process has imported globe_kernels."""
    model = load(export_tiny())
    model.save_pretrained(tmp_path / "again")
    patched = tiny_model("qwen3_moe")
    globe_kernels.patch(patched, fit_tiny()[0], keep_dense=True)
    patched.save_pretrained(tmp_path / "patched")
    globe_kernels.unpatch(patched)
    patched.save_pretrained(tmp_path / "unpatched")
    script = """
import sys
from transformers import AutoModelForCausalLM, Qwen3MoeForCausalLM
for path in sys.argv[1:]:
    for loader in (AutoModelForCausalLM, Qwen3MoeForCausalLM):
        try:
            loader.from_pretrained(path)
            print("loaded")
        except ValueError as error:
            print(" ".join(str(error).split()))
"""
    paths = [export_tiny(), tmp_path / "again", tmp_path / "patched", fit_tiny()[0], tmp_path / "unpatched"]
    done = subprocess.run([sys.executable, "-c", script, *map(str, paths)], capture_output=True, text=True, timeout=120)
    lines = done.stdout.splitlines()
    assert all("`import globe_kernels` before from_pretrained" in line for line in lines[:6]), done.stderr
    assert all("call globe_kernels.patch(model, this directory), or run `globe export`" in line for line in lines[6:8])
    assert lines[8:] == ["loaded", "loaded"]


def test_no_option_of_from_pretrained_gives_random_experts(export_tiny, save_tiny):
    loaded, path = load(export_tiny()), export_tiny()
    again = AutoModelForCausalLM.from_pretrained(path, config=loaded.config).eval()
    assert torch.equal(logits(again), logits(loaded))
    for options in ({"config": tiny_model("qwen3_moe").config}, {"transformers_weights": None}):
        try:
            model = AutoModelForCausalLM.from_pretrained(path, **options)
        except OSError as refused:
            assert "model.safetensors" in str(refused)
        else:
            assert torch.equal(logits(model.eval()), logits(loaded)), options


def test_a_configuration_with_the_guard_is_the_same_configuration(export_tiny):
    config, plain = load(export_tiny()).config, tiny_model("qwen3_moe").config
    assert type(config).__name__ == type(plain).__name__ and isinstance(config, type(plain))
    assert config.to_diff_dict()["transformers_weights"] == EXPORT_GUARD
    assert "transformers_weights" not in config.to_dict()
    for same in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config)):
        assert same.to_diff_dict() == config.to_diff_dict() and type(same) is type(config)


def test_an_export_of_an_earlier_version_still_loads(export_tiny, tmp_path):
    old = shutil.copytree(export_tiny(), tmp_path / "old")
    (old / "globe-model.safetensors").rename(old / "model.safetensors")
    config = json.loads((old / "config.json").read_text())
    assert config.pop("transformers_weights") == EXPORT_GUARD
    assert config["quantization_config"].pop("weights") == "globe-model.safetensors"
    del config["quantization_config"]["files"]
    (old / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits(load(old)), logits(load(export_tiny())))


def test_the_card_of_an_export(save_tiny, fit_tiny, tmp_path):
    base_dir = shutil.copytree(save_tiny("qwen3_moe"), tmp_path / "models--Some--Model" / "snapshots" / "abc")
    (base_dir / "README.md").write_text("---\nlicense: mit\nlanguage: [en]\n---\n# A model\n")
    for name in ("train.txt", "trainer_state.json", "training_args.bin", "optimizer.pt", "all_results.json"):
        (base_dir / name).write_text("of the training")
    for name in ("LICENSE", "tokenizer_config.json", "chat_template.jinja"):
        (base_dir / name).write_text("{}")
    checkpoint = shutil.copytree(fit_tiny()[0], tmp_path / "globe")
    report = json.loads((checkpoint / "fit_report.json").read_text()) | {"command": "globe fit M -o O --steps 3"}
    (checkpoint / "fit_report.json").write_text(json.dumps(report))
    figures = {"perplexity": 12.5, "kl": 0.01234, "top1": 0.9512, "tokens_per_s": 1.0}
    evaluation = {
        "text": "held.txt",
        "tokens": 512,
        "command": "globe eval",
        "device": "cpu",
        "threads": 2,
        "dense": figures | {"perplexity": 12.25},
        "globe": figures,
    }
    record_evaluation(GlobeCheckpoint(checkpoint), evaluation)
    export_globe(GlobeCheckpoint(checkpoint), ExpertSource(base_dir), tmp_path / "hf")
    assert {path.name for path in (tmp_path / "hf").iterdir()} == {
        "README.md",
        "LICENSE",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "globe-model.safetensors",
        "tokenizer_config.json",
    }
    card = (tmp_path / "hf" / "README.md").read_text()
    data = metadata_load(tmp_path / "hf" / "README.md")
    assert data["base_model"] == "Some/Model" and data["license"] == "mit" and data["library_name"] == "transformers"
    source = ExpertSource(base_dir)
    for part in (
        f"| whole model on disk | {format_bytes(source.facts['bytes'])} |",
        "| perplexity, held.txt | 12.250 | 12.500 | |",
        "| KL(dense, this), nats per token | 0 | 0.01234 | |",
        "| same next token as the base | 100 % | 95.1% | |",
        "globe fit M -o O --steps 3",
        "import globe_kernels",
        "--dense",
    ):
        assert part in card, part
    export_dense(GlobeCheckpoint(checkpoint), source, tmp_path / "dense")
    card = (tmp_path / "dense" / "README.md").read_text()
    assert "import globe_kernels" not in card and "whole model on disk" not in card and "12.500" in card
    of_another_fit = json.loads((checkpoint / "evaluation.json").read_text()) | {"fingerprint": "of another fit"}
    (checkpoint / "evaluation.json").write_text(json.dumps(of_another_fit))
    export_dense(GlobeCheckpoint(checkpoint), source, tmp_path / "dense")
    card = (tmp_path / "dense" / "README.md").read_text()
    assert "12.500" not in card and "Perplexity and KL were not measured" in card
