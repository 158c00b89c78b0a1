"""Every strategy computes the same model, by the op of its name and from the bytes that the plan says."""

import copy
import re
import warnings
import weakref
from contextlib import contextmanager, nullcontext

import pytest
import torch
from transformers import AutoModelForCausalLM

import globe_kernels
from globe_fit import ExpertSource, FitConfig, VarProConfig, fit, save_fit
from globe_fit.result import reconstruct
from globe_kernels import GlobeCheckpoint, RequestError
from globe_kernels.format.names import FAMILIES
from globe_kernels.model import arrange, scratch
from globe_kernels.model.discovery import routed_experts
from globe_kernels.model.scratch import ScratchBuffers
from globe_kernels.model.targets import globe_modules
from globe_kernels.ops import compose_layer, moe_ffn, moe_ffn_bank_first, moe_ffn_cached
from globe_kernels.strategies import STRATEGIES, bank_first, composed, palette_codes
from globe_kernels.strategies.budget import palettes_of, resident
from globe_kernels.strategies.cached import pool_bytes
from globe_kernels.testing import relative_errors, tiny_model
from tests.conftest import MODEL_TYPES, TINY_FIT
from tests.kernels.cases import needs_kernels, same_tiles

TOKENS = torch.randint(128, (1, 256), generator=torch.Generator().manual_seed(0))
TOP_K = 2  # experts per token of the tiny models

# strategy, and the share of all composed bases that the cache holds; None: as many slots as a token has experts
RUNS = {
    "composed": ("composed", 0.0),
    "bank_first": ("bank_first", 0.0),
    "scratch": ("scratch", 0.0),
    "cached, all bases": ("cached", 1.0),
    "cached, a quarter": ("cached", 0.25),
    "cached, a slot per active expert": ("cached", None),
}
OPS = {name: strategy.op for name, strategy in STRATEGIES.items()}


def options(run: str, path) -> dict:
    """Arguments of `patch` for a fp32 model."""
    strategy, share = RUNS[run]
    if strategy != "cached":
        return {"strategy": strategy}
    config = GlobeCheckpoint(path).config
    slots = TOP_K if share is None else round(share * config.base.total_experts)
    return {"strategy": strategy, "cache_bytes": pool_bytes(config, slots, 4)}


def logits(model, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens).logits


@contextmanager
def routed(model):
    """The experts (T, K) that each layer is given inside, in the order of the layers."""
    seen: list[torch.Tensor] = []
    modules = globe_modules(model) or {dense.name: dense.module for dense in routed_experts(model).values()}
    hooks = [module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1])) for module in modules.values()]
    yield seen
    for hook in hooks:
        hook.remove()


def patched(path, model_type: str = "qwen3_moe", run: str = "composed", model=None, **more):
    model = tiny_model(model_type) if model is None else model
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "A layer of this checkpoint uses")
        globe_kernels.patch(model, path, **options(run, path), **more)
    return model


@pytest.fixture(scope="session")
def shallow(tmp_path_factory):
    """Makes a patched model of two layers, for tests whose time grows with the layers; fitted once per architecture."""
    fitted = {}

    def make(model_type: str = "qwen3_moe", run: str = "composed"):
        if model_type not in fitted:
            base, fitted[model_type] = (tmp_path_factory.mktemp(f"{model_type}-shallow") for _ in range(2))
            tiny_model(model_type, num_hidden_layers=2).save_pretrained(base)
            source = ExpertSource(base)
            save_fit(fit(source, TINY_FIT), source, fitted[model_type])
        return patched(fitted[model_type], model_type, run, tiny_model(model_type, num_hidden_layers=2))

    return make


@pytest.fixture(scope="module")
def reconstructions(fit_tiny):
    """The tiny models with the weights that their checkpoints stand for, in dense experts, once per architecture."""
    made = {}

    def dense(model_type: str):
        if model_type not in made:
            model, checkpoint = tiny_model(model_type), GlobeCheckpoint(fit_tiny(model_type)[0])
            for layer, experts in routed_experts(model).items():
                both = [
                    reconstruct(checkpoint.layer(layer, family), checkpoint.bank(family), checkpoint.config.phi)
                    for family in ("gate", "up")
                ]
                interleaved = model_type == "gpt_oss"
                fused = torch.stack(both, dim=2).flatten(1, 2).mT if interleaved else torch.cat(both, dim=1)
                experts.module.gate_up_proj.data = fused.contiguous()
            made[model_type] = model
        return made[model_type]

    return dense


@pytest.mark.parametrize("run", list(RUNS))
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_fp32_logits_are_those_of_the_dense_reconstruction(model_type, run, fit_tiny, reconstructions):
    path, _ = fit_tiny(model_type)
    original, model = logits(tiny_model(model_type)), patched(path, model_type, run)
    layers, op = len(globe_modules(model)), f"{OPS[RUNS[run][0]]}_ref"
    dense = reconstructions(model_type)
    before = globe_kernels.call_counts()
    with routed(model) as own, routed(dense) as others:
        found, expected = logits(model), logits(dense)
    after = globe_kernels.call_counts()
    ran = {name: after[name] - before.get(name, 0) for name in after if after[name] != before.get(name, 0)}
    assert ran == {op: layers} and layers > 0, "another op ran"
    # where two experts tie to rounding, the router may take either
    alike = torch.stack([(a.sort().values == b.sort().values).all(1) for a, b in zip(own, others, strict=True)]).all(0)
    assert alike.sum() >= len(alike) - 1
    assert (found - expected)[0, alike].abs().max() <= 1e-4
    assert (found - original).abs().max() > 3e-3, "the experts do not matter in this model: the test shows nothing"
    if run.startswith("cached"):
        stats = globe_kernels.cache_stats(model)
        assert stats.misses >= layers and stats.hits + stats.misses == sum(
            int(uses.sum()) for uses in stats.uses.values()
        )
        assert (stats.evictions > 0) == (run != "cached, all bases")


@pytest.mark.parametrize("run", [run for run in RUNS if "slot" not in run])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_bf16_logits_err_no_more_than_twice_as_much_as_dense_ones(model_type, run, fit_tiny, reconstructions):
    """Both against fp32: a bf16 router may choose another expert in either, so the limit is relative to dense."""
    dense = reconstructions(model_type)
    expected = logits(dense)
    rms, _ = relative_errors(logits(patched(fit_tiny(model_type)[0], model_type, run).bfloat16()), expected)
    dense_rms, _ = relative_errors(logits(copy.deepcopy(dense).bfloat16()), expected)
    assert rms <= 2 * dense_rms
    assert dense_rms < 0.1


@needs_kernels
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the kernels run there")
@pytest.mark.parametrize("run", ["composed", "bank_first", "scratch", "cached, a slot per active expert"])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_the_kernels_run_a_whole_model(model_type, run, shallow, monkeypatch):
    """In the interpreter, fp32: the same logits as the reference path."""
    model, tokens = shallow(model_type, run), TOKENS[:, :20]
    expected, op = logits(model, tokens), OPS[RUNS[run][0]]
    if run.startswith("cached"):
        model.globe_bank.device_banks[0].cache.clear()
    for module in (moe_ffn, moe_ffn_bank_first, moe_ffn_cached, compose_layer):
        monkeypatch.setattr(module, "use_triton", lambda tensor: True)
    for module in (moe_ffn, moe_ffn_cached):
        monkeypatch.setattr(module, "choose", lambda *_: same_tiles(16, 64, 64, group_m=2))
    calls = globe_kernels.call_counts().get(op, 0)
    assert (logits(model, tokens) - expected).abs().max() <= 1e-4
    assert globe_kernels.call_counts()[op] == calls + len(globe_modules(model))


class Stream:
    """As torch.cuda.Stream, where everything is done at once."""

    def record_event(self) -> None: ...

    def wait_event(self, event: None) -> None: ...


def test_a_layer_is_composed_ahead(fit_tiny, reconstructions, monkeypatch):
    """As on a GPU, in the order of the host: a forward composes the first layer when it is called, others before."""
    monkeypatch.setattr(ScratchBuffers, "can_run", lambda *_: True)
    monkeypatch.setattr(scratch, "_side_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)
    done, compose_into, run = [], arrange.compose_into, moe_ffn.moe_ffn_ref
    monkeypatch.setattr(
        arrange, "compose_into", lambda layer, out: (done.append(layer.layer), compose_into(layer, out))
    )
    model = patched(fit_tiny()[0], run="scratch")
    monkeypatch.setattr(moe_ffn, "moe_ffn_ref", lambda *args: (done.append("experts"), run(*args))[1])
    assert (logits(model) - logits(reconstructions("qwen3_moe"))).abs().max() <= 1e-4
    assert done == [0, "experts", 1, "experts", 2, "experts"]
    model.double().float()
    assert (logits(model) - logits(reconstructions("qwen3_moe"))).abs().max() <= 1e-4


def test_a_strategy_can_be_changed_at_any_time(fit_tiny, reconstructions):
    path, _ = fit_tiny()
    config, palettes = GlobeCheckpoint(path).config, palettes_of(GlobeCheckpoint(path))
    model = patched(path)
    keys, expected = list(model.state_dict()), logits(reconstructions("qwen3_moe"))
    for run in [*RUNS, "bank_first", "composed"]:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "A layer of this checkpoint uses")
            arrangement = globe_kernels.set_strategy(model, **options(run, path))
        assert arrangement.strategies == (RUNS[run][0],)
        assert (logits(model) - expected).abs().max() <= 1e-4
        assert list(model.state_dict()) == keys
        planned = resident(
            config, arrangement.strategies, item_size=4, cache_bytes=arrangement.cache_bytes, palettes=palettes
        )
        # on a CPU the bank that is parked in host memory is on the device of the model; it was cast to fp32 once
        parked = sum(atoms.nbytes for atoms in model.globe_bank.parameters()) if run == "composed" else 0
        assert globe_kernels.model.patching.resident_bytes(model) == planned.total + parked


def test_strategies_that_share_palette_codes_build_them_once(fit_tiny, monkeypatch):
    built = []
    make = palette_codes.make_palette_code
    monkeypatch.setattr(
        palette_codes,
        "make_palette_code",
        lambda layer, family: built.append((layer.layer, family)) or make(layer, family),
    )
    model = tiny_model("qwen3_moe")
    report = globe_kernels.patch(model, fit_tiny()[0], cache_bytes="1MB")
    assert {"bank_first", "scratch"} <= set(report.strategies)
    assert sorted(built) == sorted((m.layer, family) for m in globe_modules(model).values() for family in FAMILIES)


def test_auto_takes_the_strategy_that_explain_names(fit_tiny):
    path, _ = fit_tiny()
    model = tiny_model("qwen3_moe")
    report = globe_kernels.patch(model, path, cache_bytes="1MB")
    assert set(report.strategies) == {"bank_first", "cached", "scratch"}
    for tokens in (1, 16, 256):
        explained = globe_kernels.explain(model, tokens)
        name, text = explained.groups[0].taken, str(explained)
        assert name in report.strategies
        assert re.match(rf"T = {tokens}: {name}, in (each of \d layers such as )?model.layers.0.mlp.experts\n", text)
        assert all(f"\n{other} " in text for other in ("dense", *STRATEGIES))
        assert "not held" in next(line for line in text.splitlines() if line.startswith("composed"))
        before = globe_kernels.call_counts().get(f"{OPS[name]}_ref", 0)
        logits(model, TOKENS[:, :tokens])
        assert globe_kernels.call_counts()[f"{OPS[name]}_ref"] == before + 3


@pytest.mark.parametrize("run", ["composed", "bank_first", "scratch", "cached, a quarter"])  # a graph each
def test_one_graph_for_any_number_of_tokens(run, shallow):
    model = shallow(run=run)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for count in (7, 30):
        expected = logits(model, TOKENS[:, :count])
        with torch.no_grad():
            assert (compiled(TOKENS[:, :count]).logits - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("run", list(RUNS))
def test_generates_with_a_static_cache(run, fit_tiny, reconstructions):
    prompt = TOKENS[:, :8]
    settings = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": "static", "disable_compile": True}
    found = patched(fit_tiny()[0], run=run).generate(prompt, **settings)
    assert torch.equal(found, reconstructions("qwen3_moe").generate(prompt, **settings))


@pytest.mark.parametrize("run", ["bank_first", "scratch", "cached, a quarter"])
def test_a_copy_and_a_cast_run_on_their_own(run, fit_tiny):
    model = patched(fit_tiny()[0], run=run)
    expected, twin = logits(model), copy.deepcopy(model)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.zero_()
    assert torch.equal(logits(twin), expected)
    rms, _ = relative_errors(logits(twin.half().float()), expected)
    assert 0 < rms <= 2e-2


@pytest.mark.parametrize("run", ["bank_first", "scratch", "cached, all bases"])
def test_a_model_that_was_saved_is_the_same_model(run, fit_tiny, tmp_path):
    model = patched(fit_tiny()[0], run=run)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert (logits(again) - logits(model)).abs().max() <= 1e-4
    other = tiny_model("qwen3_moe", seed=1)
    assert (logits(other) - logits(model)).abs().max() > 1e-2


def test_new_weights_make_the_cache_forget(save_tiny, fit_tiny, tmp_path):
    source = ExpertSource(save_tiny("qwen3_moe"))
    save_fit(fit(source, FitConfig(ratio=0.8, support=4, varpro=VarProConfig(steps=2), seed=5)), source, tmp_path)
    one, other = patched(fit_tiny()[0]), patched(tmp_path, run="cached, all bases")
    assert (logits(one) - logits(other)).abs().max() > 1e-4  # fills the cache with what is about to be old
    other.load_state_dict(one.state_dict())
    assert (logits(one) - logits(other)).abs().max() <= 1e-5


def test_a_warm_cache_misses_less(fit_tiny):
    path, _ = fit_tiny()
    model = patched(path, run="cached, a quarter")
    logits(model)
    uses = globe_kernels.cache_stats(model).uses
    globe_kernels.set_strategy(model, **options("cached, a quarter", path))
    globe_kernels.warm_cache(model, uses)
    assert globe_kernels.cache_stats(model).misses == 0
    held = (model.globe_bank.device_banks[0].cache.owner >= 0).sum()
    assert held == 6, "a quarter of 24 experts"
    expected = logits(patched(path))
    assert (logits(model) - expected).abs().max() <= 1e-4
    assert globe_kernels.cache_stats(model).hits > 0


def test_what_cannot_be_had_is_refused_and_changes_nothing(fit_tiny, save_tiny, tmp_path):
    path, _ = fit_tiny()
    model = patched(path)
    with pytest.raises(RequestError, match="memory budget is .* and the smallest arrangement of this checkpoint"):
        globe_kernels.patch(tiny_model("qwen3_moe"), path, memory_budget="100kB")
    with pytest.raises(RequestError, match="'plenty' is no size"):
        globe_kernels.set_strategy(model, "cached", cache_bytes="plenty")
    with pytest.raises(RequestError, match="The cache is given 5 B"):
        globe_kernels.set_strategy(model, "cached", cache_bytes=5)
    with pytest.raises(RequestError, match=r"holds no cache of composed bases; globe_kernels.set_strategy\(model"):
        globe_kernels.cache_stats(model)
    with pytest.raises(RequestError, match="does not run on GloBE experts"):
        globe_kernels.explain(tiny_model("qwen3_moe"), 1)
    assert model.globe_bank.arrangement.strategies == ("composed",) and torch.isfinite(logits(model)).all()
    source = ExpertSource(save_tiny("qwen3_moe"))
    save_fit(fit(source, FitConfig(ratio=0.8, support=4, phi="tanh", varpro=VarProConfig(steps=2))), source, tmp_path)
    with pytest.raises(RequestError, match="bank_first needs phi identity and this checkpoint has phi tanh"):
        globe_kernels.patch(tiny_model("qwen3_moe"), tmp_path, strategy="bank_first")
    report = globe_kernels.patch(tiny_model("qwen3_moe"), tmp_path)
    assert set(report.strategies) <= {"cached", "scratch"}


def test_memory_that_runs_out_under_way_leaves_a_model_that_says_so(fit_tiny, reconstructions, monkeypatch):
    """The old pool is gone before the new one is allocated, so that two need not fit."""
    path, _ = fit_tiny()
    model = patched(path, run="cached, all bases")
    pool, compose, done = weakref.ref(model.globe_bank.caches[0].pool), composed.compose, []

    def fails(layer, *codes):
        done.append(pool())
        if layer.layer == 1:
            raise MemoryError
        return compose(layer, *codes)

    monkeypatch.setattr(composed, "compose", fails)
    with pytest.raises(MemoryError):
        globe_kernels.set_strategy(model, "composed")
    assert done == [None, None]
    with pytest.raises(RuntimeError, match=r"is not arranged; call globe_kernels.set_strategy\(model"):
        logits(model)
    assert not any(hasattr(module, "basis") for module in globe_modules(model).values())
    monkeypatch.undo()
    globe_kernels.set_strategy(model, "composed")
    assert (logits(model) - logits(reconstructions("qwen3_moe"))).abs().max() <= 1e-4


def test_without_a_palette_bank_first_says_what_it_costs(fit_tiny, monkeypatch):
    monkeypatch.setattr(bank_first, "_SLOW", 0.0)
    with pytest.warns(UserWarning, match=r"uses \d+ atoms per family, and bank_first multiplies every token with all"):
        globe_kernels.patch(tiny_model("qwen3_moe"), fit_tiny()[0], strategy="bank_first")
