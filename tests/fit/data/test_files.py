"""The files of a model: GloBE reads the files and the tensors that from_pretrained reads, or says why it does not."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from globe_fit.data.source import ExpertSource
from globe_kernels.errors import GlobeError, RequestError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
EXPERT = "model.layers.0.mlp.experts.2.up_proj.weight"


@pytest.fixture
def model_dir(save_tiny, tmp_path) -> Path:
    return Path(shutil.copytree(save_tiny("qwen3_moe"), tmp_path / "model"))


def weights(model_dir: Path) -> dict[str, torch.Tensor]:
    shards = sorted(set(index(model_dir).values()))
    return {key: tensor for name in shards for key, tensor in load_file(model_dir / name).items()}


def index(model_dir: Path) -> dict[str, str]:
    return json.loads((model_dir / INDEX).read_text())["weight_map"]


def write_index(model_dir: Path, weight_map: dict[str, str]) -> None:
    (model_dir / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def change_config(model_dir: Path, **changes) -> None:
    config = json.loads((model_dir / "config.json").read_text())
    (model_dir / "config.json").write_text(json.dumps(config | changes))


def save(tensors: dict[str, torch.Tensor], path: Path, scale: float = 1.0) -> None:
    path.parent.mkdir(exist_ok=True)
    save_file({key: tensor * scale for key, tensor in tensors.items()}, path, {"format": "pt"})


def one_newer_file_beside_the_shards(model_dir: Path) -> None:
    save(weights(model_dir), model_dir / SINGLE, 2.0)


def one_file_beside_a_stale_index(model_dir: Path) -> None:
    tensors = weights(model_dir)
    for path in model_dir.glob("model-*"):
        path.unlink()
    save(tensors, model_dir / SINGLE, 2.0)


def one_file_beside_a_broken_index(model_dir: Path) -> None:
    one_newer_file_beside_the_shards(model_dir)
    (model_dir / INDEX).write_text("{")


def one_file_alone(model_dir: Path) -> None:
    one_newer_file_beside_the_shards(model_dir)
    (model_dir / INDEX).unlink()


def shards_in_a_folder(model_dir: Path) -> None:
    (model_dir / "shards").mkdir()
    for name in set(index(model_dir).values()):
        (model_dir / name).rename(model_dir / "shards" / name)
    write_index(model_dir, {key: f"shards/{name}" for key, name in index(model_dir).items()})


def a_shard_that_the_index_does_not_name(model_dir: Path) -> None:
    save(weights(model_dir), model_dir / "model-99999-of-99999.safetensors", 3.0)
    save(weights(model_dir), model_dir / "consolidated.safetensors", 3.0)


def a_tensor_in_two_shards(model_dir: Path) -> None:
    """The index names the first; transformers keeps the last."""
    save({EXPERT: weights(model_dir)[EXPERT]}, model_dir / "model-99999-of-99999.safetensors", 3.0)
    write_index(model_dir, {**index(model_dir), "lm_head.weight": "model-99999-of-99999.safetensors"})


def a_tensor_that_the_index_forgot(model_dir: Path) -> None:
    write_index(model_dir, {key: name for key, name in index(model_dir).items() if key != EXPERT})


def a_tensor_in_another_shard_than_the_index_says(model_dir: Path) -> None:
    names = sorted(set(index(model_dir).values()))
    write_index(model_dir, {**index(model_dir), EXPERT: next(n for n in names if n != index(model_dir)[EXPERT])})


def a_name_of_its_own(model_dir: Path) -> None:
    save(weights(model_dir), model_dir / "mine.safetensors", 2.0)
    change_config(model_dir, transformers_weights="mine.safetensors")


def an_index_with_a_name_of_its_own(model_dir: Path) -> None:
    (model_dir / INDEX).rename(model_dir / "mine.safetensors.index.json")
    save(load_file(next(model_dir.glob("model-00001-*"))), model_dir / SINGLE)
    change_config(model_dir, transformers_weights="mine.safetensors.index.json")


def a_variant_beside(model_dir: Path) -> None:
    save(weights(model_dir), model_dir / "model.fp16.safetensors", 3.0)


def a_pickle_beside(model_dir: Path) -> None:
    torch.save({key: 3 * tensor for key, tensor in weights(model_dir).items()}, model_dir / "pytorch_model.bin")


def a_folder_with_the_original_format(model_dir: Path) -> None:
    save(weights(model_dir), model_dir / "original" / SINGLE, 3.0)


@pytest.mark.parametrize(
    "arrange",
    [
        one_newer_file_beside_the_shards,
        one_file_beside_a_stale_index,
        one_file_beside_a_broken_index,
        one_file_alone,
        shards_in_a_folder,
        a_shard_that_the_index_does_not_name,
        a_tensor_in_two_shards,
        a_tensor_that_the_index_forgot,
        a_tensor_in_another_shard_than_the_index_says,
        a_name_of_its_own,
        an_index_with_a_name_of_its_own,
        a_variant_beside,
        a_pickle_beside,
        a_folder_with_the_original_format,
    ],
    ids=lambda arrange: arrange.__name__,
)
def test_reads_what_transformers_loads(model_dir, arrange):
    arrange(model_dir)
    source, model = ExpertSource(model_dir), AutoModelForCausalLM.from_pretrained(model_dir)
    for layer in source.layers:
        both = model.model.layers[layer.layer].mlp.experts.gate_up_proj.detach()
        assert torch.equal(source.read(layer, "gate"), both[:, :48]) and torch.equal(
            source.read(layer, "up"), both[:, 48:]
        )
    head = {"model.norm.weight": model.model.norm.weight, "lm_head.weight": model.lm_head.weight}
    assert all(torch.equal(source.files.read(key), tensor) for key, tensor in head.items())


def only(*names: str):
    """Leaves the weights in these files alone."""

    def arrange(model_dir: Path) -> None:
        for path in [*model_dir.glob("model-*"), model_dir / INDEX]:
            path.unlink()
        for name in names:
            (model_dir / name).parent.mkdir(exist_ok=True)
            (model_dir / name).write_bytes(b"weights")

    return arrange


def shards_without_an_index(model_dir: Path) -> None:
    (model_dir / INDEX).unlink()


def names_that_lead_to(name: str):
    def arrange(model_dir: Path) -> None:
        save(weights(model_dir), model_dir.parent / "outside.safetensors")
        write_index(model_dir, dict.fromkeys(index(model_dir), name.format(model_dir.parent)))

    return arrange


def a_link_to_a_file_outside(model_dir: Path) -> None:
    save(weights(model_dir), model_dir.parent / "outside.safetensors")
    only()(model_dir)
    (model_dir / SINGLE).symlink_to("../outside.safetensors")


def a_link_to_a_folder_outside(model_dir: Path) -> None:
    save(weights(model_dir), model_dir.parent / "elsewhere" / "outside.safetensors")
    (model_dir / "shards").symlink_to("../elsewhere")
    write_index(model_dir, dict.fromkeys(index(model_dir), "shards/outside.safetensors"))


def a_configuration_that_leads_out(model_dir: Path) -> None:
    save(weights(model_dir), model_dir.parent / "outside.safetensors")
    change_config(model_dir, transformers_weights="../outside.safetensors")


@pytest.mark.parametrize(
    ("arrange", "kind", "sentence"),
    [
        (only(), RequestError, "holds neither model.safetensors nor"),
        (
            only("pytorch_model.bin"),
            RequestError,
            "its weights in pytorch_model.bin, in a format of pickled files; load",
        ),
        (only("pytorch_model-00001-of-00002.bin"), RequestError, "in a format of pickled files"),
        (
            only("model.fp16.safetensors"),
            RequestError,
            "model.fp16.safetensors, as a variant, which",
        ),
        (only("model.bf16.safetensors.index.json"), RequestError, "as a variant"),
        (
            only("consolidated.safetensors"),
            RequestError,
            "by a name that transformers does not load; add",
        ),
        (
            only("weights/model.safetensors"),
            RequestError,
            "weights/model.safetensors, below it; give the directory",
        ),
        (only("adapter_model.safetensors"), RequestError, "for an adapter alone; add the weights of the model"),
        (only("tf_model.h5"), RequestError, "in a format of TensorFlow"),
        (only("flax_model.msgpack"), RequestError, "in a format of Flax"),
        (shards_without_an_index, RequestError, f"without {INDEX}, which says its tensors; download the index"),
        (lambda d: write_index(d, {}), GlobeError, "is not a valid shard index"),
        (lambda d: write_index(d, {"a": 3}), GlobeError, "has 3 as weight_map.a, where GloBE expects text"),  # type: ignore[dict-item]
        (lambda d: change_config(d, transformers_weights="no.safetensors"), GlobeError, "config.json lists it"),
        (names_that_lead_to("../outside.safetensors"), GlobeError, "which is outside of the directory"),
        (names_that_lead_to("{}/outside.safetensors"), GlobeError, "which is outside of the directory"),
        (names_that_lead_to("x/../../outside.safetensors"), GlobeError, "which is outside of the directory"),
        (a_link_to_a_file_outside, GlobeError, "a link to .*outside.safetensors, which is outside of the directory"),
        (a_link_to_a_folder_outside, GlobeError, "which is outside of the directory"),
        (a_configuration_that_leads_out, GlobeError, "which is outside of the directory"),
    ],
)
def test_weights_that_are_refused(model_dir, arrange, kind, sentence):
    arrange(model_dir)
    with pytest.raises(kind, match=sentence if ".*" in sentence else re.escape(sentence)):
        ExpertSource(model_dir)


def test_links_within_the_directory_are_its_own(model_dir):
    (model_dir / "store").mkdir()
    for name in set(index(model_dir).values()):
        (model_dir / name).rename(model_dir / "store" / name)
        (model_dir / name).symlink_to(f"store/{name}")
    (model_dir.parent / "shortcut").symlink_to(model_dir)
    assert len(ExpertSource(model_dir.parent / "shortcut").layers) == 3
