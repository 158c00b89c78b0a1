"""The files of an export: all that the base needs to run, its dtype, its licence, and nothing of others."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from globe_fit import ExpertSource, compress, export_dense, export_globe
from globe_fit.data.beside import state_dtype
from globe_kernels import GlobeCheckpoint
from globe_kernels.errors import GlobeError, GlobeWarning, RequestError
from tests.conftest import TINY_FIT
from tests.integration.test_patching import logits


@pytest.fixture
def base_dir(save_tiny, tmp_path) -> Path:
    return Path(shutil.copytree(save_tiny("qwen3_moe"), tmp_path / "base"))


@pytest.fixture
def exported(fit_tiny, base_dir, tmp_path):
    """Exports the base to tmp_path/hf and returns that directory."""

    def run(*, dense: bool = False, **options) -> Path:
        write = export_dense if dense else export_globe
        write(GlobeCheckpoint(fit_tiny()[0]), ExpertSource(base_dir), tmp_path / "hf", **options)
        return tmp_path / "hf"

    return run


def names(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


NEEDED = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "tekken.json",
    "sentencepiece.bpe.model",
    "qwen.tiktoken",
    "chat_template.jinja",
    "additional_chat_templates/tool_use.jinja",
    "custom_generate/generate.py",
    "custom_generate/requirements.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "modeling_mine.py",
    "mine/__init__.py",
    "mine/inner/attention.py",
    "mine/defaults.json",
    "assets/prompt.txt",
    "LICENSE.txt",
    "License-Model.md",
    "NOTICE",
    "USE_POLICY.md",
)
OTHERS = (
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "model.fp16.safetensors",
    "consolidated.safetensors",
    "adapter_config.json",
    "adapter_model.safetensors",
    "tokenizer.safetensors",
    "tf_model.h5",
    "model.gguf",
    "onnx/model.onnx",
    "original/consolidated.00.pth",
    "mine/weights.bin",
    "mine/__pycache__/attention.pyc",
    "assets/voice.pt",
    "checkpoint-500/model.safetensors",
    "checkpoint-500/trainer_state.json",
    "runs/events.out.tfevents",
    "optimizer.pt",
    "training_args.bin",
    "trainer_state.json",
    "results.json",
    ".gitattributes",
    ".cache/huggingface/download/config.json.metadata",
    ".git/config",
)


@pytest.mark.parametrize("dense", [False, True], ids=["globe", "dense"])
def test_an_export_has_the_files_that_the_base_needs_and_no_others(base_dir, exported, dense):
    for name in (*NEEDED, *OTHERS):
        (base_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (base_dir / name).write_text("{}")
    with pytest.warns(
        GlobeWarning, match="holds an adapter too .* it is no part of the weights that GloBE fits"
    ) as said:
        out = exported(dense=dense)
    assert len(said) == 1
    weights = "model.safetensors" if dense else "globe-model.safetensors"
    own = {"config.json", "README.md", "generation_config.json", weights}
    assert names(out) == {*NEEDED} | own
    # again into the same place, where a user has put files of his own
    (out / "assets" / "mine.txt").write_text("mine")
    (base_dir / "additional_chat_templates" / "tool_use.jinja").write_text("new")
    with pytest.warns(GlobeWarning):
        exported(dense=dense)
    assert (out / "assets" / "mine.txt").read_text() == "mine"
    assert (out / "additional_chat_templates" / "tool_use.jinja").read_text() == "new"
    assert not list(out.glob(".staging*"))


def test_the_tokenizer_of_an_export_has_all_templates(base_dir, exported):
    words = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?")
    tokenizer.chat_template = {"default": "D", "tool_use": "T", "rag": "R"}
    tokenizer.save_pretrained(base_dir)
    assert AutoTokenizer.from_pretrained(exported()).chat_template == tokenizer.chat_template


def test_a_failure_leaves_the_folders_of_the_earlier_export(base_dir, exported, tmp_path):
    (base_dir / "additional_chat_templates").mkdir()
    (base_dir / "additional_chat_templates" / "a.jinja").write_text("old")
    out = exported()
    before = {name: (out / name).read_bytes() for name in names(out)}
    (base_dir / "additional_chat_templates" / "a.jinja").write_text("new")

    def fail(done: int, count: int) -> None:
        if done == count // 2:
            raise RuntimeError("of the caller")

    with pytest.raises(RuntimeError, match="of the caller"):
        exported(on_tensor=fail)
    assert {name: (out / name).read_bytes() for name in names(out)} == before


@pytest.mark.parametrize("swapped", [False, True], ids=["a file where a folder goes", "a folder where a file goes"])
def test_a_folder_and_a_file_of_one_name(base_dir, exported, swapped):
    out = exported()
    one, other = (base_dir, out) if swapped else (out, base_dir)
    (one / "assets").write_text("a file")
    (other / "assets").mkdir()
    (other / "assets" / "a.txt").write_text("in a folder")
    before = names(out)
    with pytest.raises(
        RequestError, match="assets is a (file and a directory|directory and a file) must go there; move"
    ):
        exported()
    assert names(out) == before


@pytest.mark.parametrize("name", ["tokenizer.json", "custom_generate/generate.py", "assets"])
def test_a_link_that_leads_out_of_the_base_is_not_copied(base_dir, exported, tmp_path, name):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key").write_text("secret")
    (base_dir / name).parent.mkdir(exist_ok=True)
    (base_dir / name).symlink_to(tmp_path / ("secret" if name == "assets" else "secret/key"))
    with pytest.raises(GlobeError, match="which is outside of the directory"):
        exported()
    assert not (tmp_path / "hf").exists()


def set_config(directory: Path, change) -> None:
    config = json.loads((directory / "config.json").read_text())
    change(config)
    (directory / "config.json").write_text(json.dumps(config))


def without_a_dtype(config: dict) -> None:
    for key in ("dtype", "torch_dtype"):
        config.pop(key, None)


def as_of_transformers_4(config: dict) -> None:
    without_a_dtype(config)
    config["torch_dtype"] = "float32"


def both_dtypes(config: dict) -> None:
    config |= {"torch_dtype": "float16", "dtype": "float32"}


@pytest.mark.parametrize("dense", [False, True], ids=["globe", "dense"])
@pytest.mark.parametrize("stated", [without_a_dtype, as_of_transformers_4, both_dtypes])
def test_auto_is_the_dtype_of_the_export(base_dir, exported, stated, dense):
    set_config(base_dir, stated)
    for dtype, expected in ((None, torch.float32), (torch.bfloat16, torch.bfloat16)):
        model = AutoModelForCausalLM.from_pretrained(exported(dense=dense, dtype=dtype), dtype="auto")
        assert model.dtype == expected
        config = json.loads((base_dir.parent / "hf" / "config.json").read_text())
        name = str(expected).removeprefix("torch.")
        if dtype is not None:
            assert {config[key] for key in ("dtype", "torch_dtype") if key in config} == {name}


def test_auto_without_a_dtype_is_the_dtype_of_the_weights(base_dir, tmp_path):
    """The codes are in fp32: without a dtype in config.json transformers would take theirs."""
    for path in base_dir.glob("*.safetensors"):
        save_file({key: tensor.bfloat16() for key, tensor in load_file(path).items()}, path, {"format": "pt"})
    set_config(base_dir, without_a_dtype)
    assert AutoModelForCausalLM.from_pretrained(base_dir, dtype="auto").dtype == torch.bfloat16
    compress(base_dir, tmp_path / "globe", TINY_FIT, calibrate=None)
    export_globe(GlobeCheckpoint(tmp_path / "globe"), ExpertSource(base_dir), tmp_path / "hf")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto").dtype == torch.bfloat16


def test_a_dtype_is_stated_in_every_part():
    config = {
        "dtype": {"": "float32", "text_config": "float32"},
        "text_config": {"model_type": "qwen3_moe", "torch_dtype": "float32"},
        "vision_config": {"model_type": "siglip_vision_model"},
        "vocabulary_map": {"dtype": 17},
    }
    state_dtype(config, "bfloat16", change=True)
    assert config["dtype"] == {"": "bfloat16", "text_config": "bfloat16"}
    assert config["text_config"]["torch_dtype"] == config["vision_config"]["dtype"] == "bfloat16"
    assert config["vocabulary_map"] == {"dtype": 17}


def test_a_base_with_a_name_of_its_own_for_its_weights(base_dir, exported):
    (base_dir / "model.safetensors.index.json").rename(base_dir / "mine.safetensors.index.json")
    set_config(base_dir, lambda config: config.update(transformers_weights="mine.safetensors.index.json"))
    for dense in (True, False):
        assert torch.isfinite(logits(AutoModelForCausalLM.from_pretrained(exported(dense=dense)))).all()


CARDS = {
    "license: mit": {"license": "mit"},
    "license: other\nlicense_name: qwen\nlicense_link: LICENSE\nlanguage: [en, de]": {
        "license": "other",
        "license_name": "qwen",
        "license_link": "LICENSE",
        "language": ["en", "de"],
    },
    "pipeline_tag: image-text-to-text\nlicense: apache-2.0": {
        "pipeline_tag": "image-text-to-text",
        "license": "apache-2.0",
    },
    "license: [unclosed": {},
}


@pytest.mark.parametrize("front", CARDS)
@pytest.mark.parametrize("dense", [False, True], ids=["globe", "dense"])
def test_the_metadata_of_the_card(base_dir, exported, front, dense):
    (base_dir / "README.md").write_text(f"---\n{front}\n---\n# The base\n")
    card = ModelCard.load(exported(dense=dense) / "README.md")
    data, expected = card.data.to_dict(), {"pipeline_tag": "text-generation", **CARDS[front]}
    assert {key: data.get(key) for key in expected} == expected
    assert data["library_name"] == "transformers" and {"globe", "moe"} <= {*data["tags"]}
    # "base" is a directory, not an id of the Hub, which refuses a card with it
    assert "base_model" not in data and card.text.strip()


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        ("                Apache License\n          Version 2.0, January 2004", {"license": "apache-2.0"}),
        ("MIT License\n\nCopyright", {"license": "mit"}),
        (
            "Tongyi Qianwen LICENSE AGREEMENT",
            {"license": "other", "license_name": "license", "license_link": "LICENSE"},
        ),
    ],
)
def test_the_licence_without_a_card_is_of_the_file(base_dir, exported, text, licence):
    (base_dir / "LICENSE").write_text(text)
    for card, expected in (("", licence), ("---\nlicense: gemma\n---\n", {"license": "gemma"})):
        (base_dir / "README.md").write_text(card)
        data = ModelCard.load(exported() / "README.md").data.to_dict()
        assert {key: data[key] for key in data if key.startswith("license")} == expected


def test_a_card_of_a_model_of_the_hub(save_tiny, fit_tiny, tmp_path):
    from tests.fake_hub import cached

    snapshot = cached(save_tiny("qwen3_moe"), tmp_path / "hub", "Org/My-MoE")
    for write, relation in ((export_globe, "quantized"), (export_dense, None)):
        write(GlobeCheckpoint(fit_tiny()[0]), ExpertSource(snapshot), tmp_path / "hf")
        data = ModelCard.load(tmp_path / "hf" / "README.md").data.to_dict()
        assert data["base_model"] == "Org/My-MoE" and data.get("base_model_relation") == relation


def rewrite(out: Path, change) -> None:
    path = out / "globe-model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def without(*parts: str):
    def change(tensors: dict) -> None:
        for key in [key for key in tensors if all(part in key for part in parts)]:
            del tensors[key]

    return change


def a_short_matrix(tensors: dict) -> None:
    key = next(key for key in tensors if "layers.1" in key and key.endswith("experts.3.down_proj.weight"))
    tensors[key] = tensors[key][:10].clone()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (without("down_proj"), "experts.down_proj is missing"),
        (without("layers.1.", "experts.3.down_proj"), r"layers.1.mlp.experts.down_proj is in 7 matrices .* says \(8, "),
        (without("layers.1.", "experts.7.down_proj"), "is in 7 matrices"),
        (a_short_matrix, r"is in 8 matrices .* and config.json says \(8, 64, 48\)"),
        (without("model.norm.weight"), "model.norm.weight is missing .* transformers gave it random values"),
        (without("lm_head"), "lm_head.weight is missing"),
        (without("embed_tokens"), "embed_tokens.weight is missing"),
        (without("layers.2.", "q_proj"), "layers.2.self_attn.q_proj.weight is missing"),
        (without("layers.0.mlp.gate."), "layers.0.mlp.gate.weight is missing"),
    ],
)
def test_an_export_without_a_weight_is_refused(exported, change, sentence):
    out = exported()
    rewrite(out, change)
    with pytest.raises(GlobeError, match=sentence):
        AutoModelForCausalLM.from_pretrained(out)


def test_a_new_head_is_no_missing_weight(export_tiny):
    assert AutoModelForSequenceClassification.from_pretrained(export_tiny(), num_labels=3).score.out_features == 3


def test_a_body_without_a_weight_is_refused(exported, monkeypatch):
    monkeypatch.setenv("GLOBE_VERIFY", "0")
    out = exported()
    rewrite(out, without("lm_head"))
    assert AutoModel.from_pretrained(out) is not None
    rewrite(out, without("model.norm"))
    with pytest.raises(GlobeError, match="norm.weight is missing"):
        AutoModel.from_pretrained(out)


def test_tied_embeddings_are_one_weight(tmp_path):
    from globe_kernels.testing import tiny_model

    tiny_model("qwen3_moe", tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    compress(tmp_path / "tied", tmp_path / "globe", TINY_FIT, calibrate=None)
    export_globe(GlobeCheckpoint(tmp_path / "globe"), ExpertSource(tmp_path / "tied"), tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_a_checkpoint_that_names_a_file_outside(fit_tiny, tmp_path):
    out = Path(shutil.copytree(fit_tiny()[0], tmp_path / "globe"))
    (out / "globe.safetensors").rename(tmp_path / "globe.safetensors")
    config = json.loads((out / "globe_config.json").read_text())
    config["files"] = {"../globe.safetensors": config["files"]["globe.safetensors"]}
    (out / "globe_config.json").write_text(json.dumps(config))
    with pytest.raises(GlobeError, match="which is outside of the directory"):
        GlobeCheckpoint(out)
