"""Tensors that are missing on disk, of another shape, or of a layer that the model does not have."""

import json
import re
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from globe_fit.data.model import load_model
from globe_fit.data.outline import model_class
from globe_fit.data.source import ExpertSource
from globe_fit.data.whole import require_whole
from globe_kernels.errors import GlobeError

WHERE = Path("of-disk")
# A matrix per expert, other names on disk, fused, buffers beside weights, tied embeddings and nested modules.
TYPES = ("qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "gemma4")


class Tensors(dict[str, torch.Tensor]):
    """The tensors of a checkpoint, as StoredTensors gives their headers."""

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self[key].shape)

    def dtype(self, key: str) -> torch.dtype:
        return self[key].dtype

    @property
    def keys(self):  # type: ignore[override]
        return list(self)

    def find(self, pattern: str) -> str:
        return next(key for key in self if re.search(pattern, key))


@pytest.fixture
def on_disk(save_tiny):
    """(the model on the meta device, its tensors) of a model type."""

    @cache
    def outline(path: Path):
        config = AutoConfig.from_pretrained(path)
        with torch.device("meta"):
            return model_class(config)(config)

    def read(model_type: str, **changes):
        path = save_tiny(model_type)
        model = outline(path)
        for name, value in changes.items():
            setattr(model.config.get_text_config(), name, value)
        return model, Tensors({k: t for file in path.glob("*.safetensors") for k, t in load_file(file).items()})

    return read


MISSING = {
    "router": r"layers\.1\..*(gate|router)\.(proj\.)?weight$",
    "attention": r"layers\.2\.self_attn\.(k_proj|kv_a_proj_with_mqa)\.weight$",
    "norm": r"layers\.1\.\w*norm\.weight$",
    "last norm": r"^[^0-9]*\.norm\.weight$",
    "embedding": r"embed_tokens\.weight$",
    "down experts": r"layers\.1\..*experts\.(down_proj|(\d+\.)(down_proj|w2)\.weight)$",
}


@pytest.mark.parametrize("kind", MISSING)
@pytest.mark.parametrize("model_type", TYPES)
def test_a_missing_tensor(on_disk, model_type, kind):
    model, tensors = on_disk(model_type)
    require_whole(WHERE, model, tensors)
    for key in [key for key in tensors if re.search(MISSING[kind], key)]:
        del tensors[key]
    with pytest.raises(GlobeError, match=r"^of-disk lacks \S+ \(\d+ of \d+ tensors of the model are missing\), and"):
        require_whole(WHERE, model, tensors)


@pytest.mark.parametrize("kind", MISSING)
@pytest.mark.parametrize("model_type", TYPES)
def test_a_tensor_of_another_shape_or_of_whole_numbers(on_disk, model_type, kind):
    model, tensors = on_disk(model_type)
    key = tensors.find(MISSING[kind])
    kept = tensors[key]
    for changed in (kept[..., :-1], kept[..., None], kept.to(torch.int64)):
        tensors[key] = changed
        sentence = r"is of shape \(.*\) and config.json says \(|transformers cannot make|is stored as torch.int64;"
        if "experts" not in key or changed.is_floating_point():  # torch turns a mixture of dtypes into numbers
            with pytest.raises(GlobeError, match=sentence):
                require_whole(WHERE, model, tensors)


def test_a_buffer_that_one_layer_lacks(on_disk):
    """A checkpoint may leave out a buffer that transformers computes: then no layer has the buffer."""
    model, tensors = on_disk("deepseek_v3")
    biases = [key for key in tensors if key.endswith("e_score_correction_bias")]
    del tensors[biases.pop()]
    with pytest.raises(GlobeError, match=r"lacks model\.layers\.3\.mlp\.gate\.e_score_correction_bias \(1 of"):
        require_whole(WHERE, model, tensors)
    for key in biases:
        del tensors[key]
    require_whole(WHERE, model, tensors)


def test_tied_weights(on_disk):
    """Either name of the same weight may be on disk."""
    model, tensors = on_disk("gemma4")
    embedding = tensors.find("embed_tokens.weight$")
    assert model.all_tied_weights_keys and "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors.pop(embedding)
    require_whole(WHERE, model, tensors)
    tensors[embedding] = tensors["lm_head.weight"][:-1]
    with pytest.raises(GlobeError, match="is of shape"):
        require_whole(WHERE, model, tensors)
    del tensors["lm_head.weight"], tensors[embedding]
    with pytest.raises(GlobeError, match="lacks .* tensors of the model are missing"):
        require_whole(WHERE, model, tensors)


@pytest.mark.parametrize(("model_type", "layers"), [("qwen3_moe", 3), ("mixtral", 3), ("deepseek_v3", 4)])
def test_a_layer_too_many(on_disk, model_type, layers):
    model, tensors = on_disk(model_type, num_nextn_predict_layers=0)
    further = {key: t for key, t in tensors.items() if f"layers.{layers - 1}." in key}
    for key, tensor in further.items():
        tensors[key.replace(f"layers.{layers - 1}.", f"layers.{layers}.")] = tensor
    with pytest.raises(GlobeError, match=rf"holds model\.layers\.{layers}\.\S+ and config.json says {layers} such"):
        require_whole(WHERE, model, tensors)
    model, _ = on_disk(model_type, num_nextn_predict_layers=1)  # layers that predict further tokens
    require_whole(WHERE, model, tensors)
    tensors["value_head.weight"] = torch.zeros(1, 64)
    require_whole(WHERE, model, tensors)


def drop(model_dir: Path, dropped: str, *, listed: bool) -> None:
    """Remove a tensor from its shard and, unless it stays `listed`, from the index."""
    index_path = model_dir / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    shard = model_dir / index["weight_map"][dropped]
    save_file({k: t for k, t in load_file(shard).items() if k != dropped}, shard, {"format": "pt"})
    if not listed:
        del index["weight_map"][dropped]
        index_path.write_text(json.dumps(index))


@pytest.mark.parametrize("listed", [True, False])
def test_every_reader_of_a_model_refuses_a_hole(save_tiny, tmp_path, listed):
    model_dir = Path(shutil.copytree(save_tiny("qwen3_moe"), tmp_path / "model"))
    drop(model_dir, "model.layers.1.mlp.gate.weight", listed=listed)
    sentence = "lacks model.layers.1.mlp.gate.weight" + (", which the index lists" if listed else " (1 of ")
    for read in (ExpertSource, load_model):
        with pytest.raises(GlobeError, match=re.escape(sentence)):
            read(model_dir)


def test_pickled_weights_with_a_hole(save_tiny, tmp_path):
    model_dir = Path(shutil.copytree(save_tiny("qwen3_moe", True), tmp_path / "model"))
    tensors = {}
    for file in [*model_dir.glob("*.safetensors"), model_dir / "model.safetensors.index.json"]:
        tensors |= load_file(file) if file.suffix == ".safetensors" else {}
        file.unlink()
    torch.save(tensors, model_dir / "pytorch_model.bin")
    load_model(model_dir)
    del tensors["model.layers.1.mlp.gate.weight"]
    torch.save(tensors, model_dir / "pytorch_model.bin")
    with pytest.raises(GlobeError, match="gate.weight is missing in the model's .* random values"):
        load_model(model_dir)
