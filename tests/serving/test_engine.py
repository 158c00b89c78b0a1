"""The interfaces of the installed vLLM, the bytes that it holds, and the sentences for what it cannot serve."""

import json
import shutil

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from globe_kernels import GlobeCheckpoint
from globe_kernels.strategies.budget import palettes_of, resident
from tests.kernels.serving import interfaces
from tests.serving.engine import PROMPTS, engine, generate


def test_the_recorded_interfaces():
    assert interfaces.differences() == []


def registered_bytes(model) -> int:
    """Bytes of the tensors that belong to routed experts, each storage once."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for name, tensor in tensors
        if "experts" in name and not tensor.is_meta  # where the bank is, when all bases are composed
    }
    return sum(storages.values())


def test_the_bytes_of_each_strategy(shipped, record_property):
    """Every strategy registers what it holds and nothing of the dense gate and up matrices."""
    found = {}
    with engine(shipped.dense, dtype="bfloat16") as llm:
        (found["dense"],) = llm.apply_model(registered_bytes)
    for strategy in ("auto", "composed", "bank_first", "cached", "scratch"):
        with engine(shipped.globe, dtype="bfloat16", strategy=strategy) as llm:
            (found[strategy],) = llm.apply_model(registered_bytes)
    record_property("bytes", found)
    config = GlobeCheckpoint(shipped.checkpoint).config
    palettes = palettes_of(GlobeCheckpoint(shipped.checkpoint))
    for strategy in ("composed", "bank_first", "scratch"):
        predicted = resident(config, (strategy,), item_size=2, palettes=palettes).total
        assert abs(found[strategy] / predicted - 1) < 0.01, (strategy, found, predicted)
    assert found["dense"] == resident(config, ("dense",), item_size=2).total
    assert found["auto"] < found["dense"]  # so it is not composed, which is larger at this rank


def refusal(directory, **options) -> str:
    """Start an engine that must not start; return what it says."""
    with pytest.raises(Exception) as error, engine(directory, **options):
        pass
    return str(error.value)


@pytest.fixture
def copied(shipped, tmp_path):
    return shutil.copytree(shipped.globe, tmp_path / "export")


def test_a_truncated_export(copied):
    (file,) = copied.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1000])
    assert "is truncated or damaged" in refusal(copied)


def test_an_export_with_a_changed_tensor(copied):
    (file,) = copied.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-5] ^= 4
    file.write_bytes(content)
    assert "the file was changed or damaged; export the checkpoint again" in refusal(copied)


@pytest.mark.parametrize("key", ["model.layers.2.mlp.experts.up_adapter", "model.layers.2.self_attn.q_proj.weight"])
def test_an_export_without_a_tensor(copied, key):
    """vLLM itself would serve garbage without a word."""
    (file,) = copied.glob("*.safetensors")
    with safe_open(file, framework="pt") as handle:
        metadata = handle.metadata()
    tensors = load_file(file)
    del tensors[key]
    save_file(tensors, file, metadata)
    assert "has no" in refusal(copied) or "was changed or damaged" in refusal(copied)


def test_another_version_of_the_format(copied):
    config = json.loads((copied / "config.json").read_text())
    config["quantization_config"]["format_version"] = 9
    (copied / "config.json").write_text(json.dumps(config))
    assert "has GloBE format version 9 and this library reads version 1" in refusal(copied)


def test_options_that_are_not_known(shipped):
    assert "strategy 'fastest' is not known" in refusal(shipped.globe, strategy="fastest")
    assert "'stratgy' in the key" in refusal(shipped.globe, additional_config={"globe": {"stratgy": "auto"}})


def test_weights_that_come_again(shipped):
    with engine(shipped.globe) as llm:
        before = generate(llm, PROMPTS[:1], tokens=4)
        assert len(before[0].tokens) == 4
        with pytest.raises(Exception, match="GloBE experts cannot be replaced; start the engine again"):
            llm.collective_rpc("reload_weights")


def test_dummy_weights(shipped):
    with engine(shipped.globe, load_format="dummy") as llm:
        assert len(generate(llm, PROMPTS[:1], tokens=4)[0].tokens) == 4
