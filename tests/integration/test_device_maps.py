"""Models that are spread: layers offloaded to disk, layers on several devices."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import globe_kernels
from globe_fit import ExpertSource, FitConfig, VarProConfig, fit, save_fit
from globe_kernels import GlobeCheckpoint, GlobeMoEFFN, RequestError
from globe_kernels.format.names import FAMILIES
from globe_kernels.model.patching import resident_bytes
from globe_kernels.model.targets import globe_modules
from globe_kernels.strategies import STRATEGIES
from globe_kernels.strategies.budget import palettes_of, resident
from globe_kernels.strategies.cached import pool_bytes
from globe_kernels.testing import assert_close, tiny_model
from tests.integration.test_patching import logits

pytestmark = pytest.mark.filterwarnings("ignore:A layer of this checkpoint uses")

ONE, OTHER = torch.device("cpu"), torch.device("cpu", 0)  # the same to torch, two to who compares them


@pytest.mark.parametrize("bank", ["cpu", "disk"])
def test_layers_may_be_offloaded_to_disk(bank, export_tiny, tmp_path):
    """The weights of these layers come when they are called; what is made from the codes stays."""
    pytest.importorskip("accelerate")
    expected = logits(AutoModelForCausalLM.from_pretrained(export_tiny(), dtype=torch.float32))
    places = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head", "model.layers.0"), "cpu")
    places |= {"globe_bank": bank, "model.layers.1": "disk", "model.layers.2": "disk"}
    model = AutoModelForCausalLM.from_pretrained(
        export_tiny(), dtype=torch.float32, device_map=places, offload_folder=tmp_path
    )
    first, *others = globe_modules(model).values()
    assert not first.gate_adapter.is_meta and all(module.gate_adapter.is_meta for module in others)
    for strategy in ("auto", *STRATEGIES):
        globe_kernels.set_strategy(model, strategy)
        before = globe_kernels.call_counts()
        assert_close(logits(model), expected, rms=1e-6, peak=1e-5)
        after = globe_kernels.call_counts()
        assert sum(after[name] - before.get(name, 0) for name in after) == 3
        offloaded = sum(weights.nbytes for module in others for weights in module.parameters())
        assert resident_bytes(model) + offloaded == resident_bytes_of_all(model)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert_close(logits(again), expected, rms=1e-6, peak=1e-5)


def resident_bytes_of_all(model) -> int:
    """Whatever device they are on."""
    parts = (*globe_modules(model).values(), model.globe_bank)
    return sum(tensor.nbytes for part in parts for tensor in (*part.parameters(), *part.buffers()))


@pytest.fixture
def checkpoint(save_tiny, tmp_path) -> GlobeCheckpoint:
    """Of layers that use different atoms, as those of a palette do."""
    source = ExpertSource(save_tiny("qwen3_moe"))
    save_fit(fit(source, FitConfig(ratio=0.8, support=3, palette=4, varpro=VarProConfig(steps=5))), source, tmp_path)
    return GlobeCheckpoint(tmp_path)


@pytest.fixture
def spread(checkpoint, monkeypatch):
    """A patched model whose second layer is on another device, and the logits of one that is not."""
    whole, model = tiny_model("qwen3_moe"), tiny_model("qwen3_moe")
    globe_kernels.patch(whole, checkpoint.path, strategy="composed")
    expected = logits(whole)
    monkeypatch.setattr(GlobeMoEFFN, "device", property(lambda module: OTHER if module.layer == 1 else ONE))
    globe_kernels.patch(model, checkpoint.path, strategy="scratch")
    return model, expected


def test_layers_on_two_devices_run_by_every_strategy(spread, checkpoint):
    model, expected = spread
    keys = list(model.state_dict())
    used = {(layer, f): set(checkpoint.code(layer, f).index.flatten().tolist()) for layer in range(3) for f in FAMILIES}
    bank_atoms = sum(len(used[0, f] | used[2, f]) + len(used[1, f]) for f in FAMILIES)
    assert bank_atoms < 4 * checkpoint.config.num_atoms, "no device needs all: else the test shows nothing"
    for strategy in STRATEGIES:
        arrangement = globe_kernels.set_strategy(model, strategy, cache_bytes=pool_bytes(checkpoint.config, 7, 4))
        assert arrangement.strategies == (strategy,)
        assert_close(logits(model), expected, rms=1e-6, peak=1e-5)
        assert list(model.state_dict()) == keys, "copies of the bank are not saved"
        if strategy == "composed":
            continue
        planned = resident(
            checkpoint.config,
            arrangement.strategies,
            item_size=4,
            cache_bytes=arrangement.cache_bytes,
            palettes=palettes_of(checkpoint),
            bank_atoms=bank_atoms,
        )
        # 7 slots for 24 experts, 8 of them on one device: 4 and 2, and each cache counts for itself
        unused = pool_bytes(checkpoint.config, 7, 4) - pool_bytes(checkpoint.config, 6, 4) - 5 * 8
        held = resident_bytes(model) - planned.host  # on a CPU the parked bank counts
        assert planned.host > 0 and planned.total - held == (unused if strategy == "cached" else 0)
    first, second, third = globe_modules(model).values()
    assert first.device_bank is third.device_bank and second.device_bank is not first.device_bank


def test_a_cache_on_two_devices_is_one_to_the_user(spread, checkpoint):
    model, _ = spread
    config = checkpoint.config
    globe_kernels.set_strategy(model, "cached", cache_bytes=pool_bytes(config, 9, 4))
    logits(model)
    found = globe_kernels.cache_stats(model)
    assert sorted(found.uses) == [0, 1, 2] and found.slots == 6 + 3
    assert found.hits + found.misses == sum(int(uses.sum()) for uses in found.uses.values()) > 0
    globe_kernels.set_strategy(model, "cached", cache_bytes=pool_bytes(config, 9, 4))
    globe_kernels.warm_cache(model, found.uses)
    assert [int((cache.owner >= 0).sum()) for cache in model.globe_bank.caches] == [6, 3]
    logits(model)
    assert globe_kernels.cache_stats(model).hits > 0
    with pytest.raises(RequestError, match="The uses of layer 9"):
        globe_kernels.warm_cache(model, {9: torch.ones(8)})
    with pytest.raises(RequestError, match="has 1 slots for layers on 2 devices; give more, at least one slot"):
        globe_kernels.set_strategy(model, "cached", cache_bytes=pool_bytes(config, 1, 4))
    assert model.globe_bank.arrangement.cache_bytes == pool_bytes(config, 9, 4), "what is refused changes nothing"


def test_a_cast_reaches_every_copy(spread):
    model, expected = spread
    model.bfloat16()
    assert {tensor.dtype for tensor in model.globe_bank.buffers()} == {torch.bfloat16}
    assert_close(logits(model), expected, rms=5e-2, peak=1e-1)


def test_codes_that_are_offloaded_are_refused(spread, monkeypatch):
    model, _ = spread
    monkeypatch.setattr(GlobeMoEFFN, "device", property(lambda module: torch.device("meta")))
    with pytest.raises(RequestError, match="The codes of some experts are offloaded; load the model with offload_buf"):
        globe_kernels.set_strategy(model, "bank_first")
    assert model.globe_bank.arrangement.strategies == ("scratch",)


@pytest.mark.parametrize("strategy", ["bank_first", "scratch", "cached"])
def test_layers_that_were_moved_without_their_atoms_are_refused(strategy, checkpoint):
    model = tiny_model("qwen3_moe")
    globe_kernels.patch(model, checkpoint.path, strategy=strategy)
    model.globe_bank.to("meta")
    with pytest.raises(
        RequestError, match=r"Layer 0 runs on cpu and its atoms are on meta; .* call globe_kernels.set_st"
    ):
        logits(model)


def test_dense_experts_come_back_to_where_their_layer_runs(fit_tiny):
    model = tiny_model("qwen3_moe")
    expected = logits(model)
    globe_kernels.patch(model, fit_tiny()[0], keep_dense=True)
    model.model.embed_tokens.to("meta")  # as offloading leaves it
    globe_kernels.unpatch(model)
    model.model.embed_tokens = tiny_model("qwen3_moe").model.embed_tokens
    assert torch.equal(logits(model), expected)
