"""The plugin for vLLM against stand-ins of its interfaces, which the record of the real interfaces holds in place."""

import json
import pickle
import sys

import pytest
import torch

from globe_kernels.errors import GlobeError, GlobeWarning, RequestError
from globe_kernels.serving import vllm_plugin
from tests.kernels.serving import interfaces, standins

LAYER = "model.layers.{}.mlp.experts"


@pytest.fixture
def start(monkeypatch, export_tiny):
    """Registers the plugin in a process of vLLM; returns the quantization of the export of a model type."""

    def run(model_type: str = "qwen3_moe", **options):
        export = export_tiny(model_type)
        methods = standins.install(monkeypatch, standins.vllm_config(**{"model": str(export)} | options))
        vllm_plugin.register()
        config = json.loads((export / "config.json").read_text(encoding="utf-8"))
        quantization = methods["globe"].from_config(config["quantization_config"])
        quantization.maybe_update_config(str(export), None)
        return quantization

    return run


def make_layers(quantization, *, top_k: int = 2, tp=(1, 0), expert_map=None, dtype=torch.float32, **moe):
    """Make the routed experts of every layer, as the model of vLLM does; return [(layer, method)]."""
    base, made = quantization._globe.base, []
    for number, experts in base.num_experts.items():
        parallel = standins.FusedMoEParallelConfig(*tp)
        settings = {"has_bias": base.has_bias} | moe
        config = standins.FusedMoEConfig(
            experts, top_k, base.intermediate_size, moe_parallel_config=parallel, **settings
        )
        layer = standins.RoutedExperts(config, expert_map)
        method = quantization.get_quant_method(layer, LAYER.format(number))
        local = experts if expert_map is None else int((expert_map >= 0).sum())
        method.create_weights(layer, local, base.hidden_size, base.intermediate_size // tp[0], dtype)
        made.append((layer, method))
    return made


def load(made) -> None:
    for layer, method in made:
        method.process_weights_after_loading(layer)


def routing(quantization, tokens: int = 7, top_k: int = 2):
    base = quantization._globe.base
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, base.hidden_size, generator=generator)
    scores = torch.rand(tokens, next(iter(base.num_experts.values())), generator=generator)
    weights, ids = scores.softmax(-1).topk(top_k)
    return x, weights, ids.int()


def call(made, x, weights, ids) -> list[torch.Tensor]:
    return [method.apply(layer, x, weights, ids, None, None) for layer, method in made]


def by_transformers(export, x, weights, ids) -> list[torch.Tensor]:
    from transformers import AutoModelForCausalLM

    import globe_kernels

    model = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32)
    globe_kernels.set_strategy(model, "composed")
    modules = [m for m in model.modules() if isinstance(m, globe_kernels.GlobeMoEFFN)]
    with torch.no_grad():
        return [module(x, ids.long(), weights) for module in modules]


def test_the_stand_ins_have_the_recorded_interfaces(monkeypatch):
    standins.install(monkeypatch, standins.vllm_config())
    assert interfaces.differences() == []
    monkeypatch.setitem(interfaces.PARAMETERS, "vllm.config:get_current_vllm_config", "device")
    assert interfaces.differences() == ["vllm.config:get_current_vllm_config takes '' in place of 'device'"]


def test_the_entry_point_registers_once(start, monkeypatch):
    first = type(start())
    vllm_plugin.register()
    assert type(start()).__name__ == first.__name__ == "GlobeQuantization"


def test_a_vllm_that_is_too_old(monkeypatch):
    monkeypatch.setattr(standins, "VERSION", "0.29.1")
    methods = standins.install(monkeypatch, standins.vllm_config())
    with pytest.warns(
        GlobeWarning, match="vLLM 0.29.1 cannot serve GloBE exports .ImportError: it is older than 0.30."
    ):
        vllm_plugin.register()
    assert methods == {}


def test_a_vllm_whose_parts_have_moved(monkeypatch):
    """vLLM calls the entry point for every model, so no failure may leave it."""
    monkeypatch.setattr(standins, "VERSION", "dev")
    methods = standins.install(monkeypatch, standins.vllm_config())
    with pytest.warns(GlobeWarning, match="vLLM dev cannot serve GloBE exports .InvalidVersion"):
        vllm_plugin.register()
    monkeypatch.setattr(standins, "VERSION", "0.99.0")
    methods = standins.install(monkeypatch, standins.vllm_config())
    del sys.modules["vllm.model_executor.layers.fused_moe.routed_experts"]
    with pytest.warns(GlobeWarning, match="vLLM 0.99.0 cannot serve GloBE exports .ModuleNotFoundError"):
        vllm_plugin.register()
    assert methods == {}


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("strategy", ["auto", "composed", "bank_first", "cached", "scratch"])
def test_a_process_with_all_experts(start, export_tiny, model_type, strategy):
    quantization = start(model_type, additional={"globe": {"strategy": strategy}})
    clamped = {"activation": standins.MoEActivation.SWIGLUOAI} if model_type == "gpt_oss" else {}
    made = make_layers(quantization, **clamped)
    load(made)
    inputs = routing(quantization)
    for found, expected in zip(call(made, *inputs), by_transformers(export_tiny(model_type), *inputs), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("kind", ["tensor", "expert", "round robin"])
def test_processes_that_share_the_experts(start, export_tiny, model_type, kind):
    """The parts add up to the whole; a bias of down counts once."""
    parts, inputs = [], None
    clamped = {"activation": standins.MoEActivation.SWIGLUOAI} if model_type == "gpt_oss" else {}
    for rank in (0, 1):
        quantization = start(model_type)
        inputs = inputs or routing(quantization)
        share: dict = {"tp": (2, rank)}
        if kind != "tensor":
            places = torch.full((8,), -1)
            own = torch.arange(8)[rank::2] if kind == "round robin" else torch.arange(4 * rank, 4 * rank + 4)
            places[own] = torch.arange(4)
            share = {"expert_map": places}
        made = make_layers(quantization, **share, **clamped)
        load(made)
        parts.append(call(made, *inputs))
    for one, other, expected in zip(*parts, by_transformers(export_tiny(model_type), *inputs), strict=True):
        torch.testing.assert_close(one + other, expected, rtol=1e-5, atol=1e-6)
        assert one.abs().sum() > 0 and other.abs().sum() > 0


def test_rows_that_fill_up_a_batch(start):
    """vLLM routes them to expert -1, and indexing with -1 is the last expert."""
    quantization = start()
    made = make_layers(quantization, expert_map=torch.tensor([-1, -1, -1, -1, 0, 1, 2, 3]))
    load(made)
    x, weights, ids = routing(quantization)
    assert not any(y.any() for y in call(made, x, weights, torch.full_like(ids, -1)))
    assert any(y.any() for y in call(made, x, weights, ids))


def test_a_snapshot_with_its_revision(start, export_tiny):
    """Without a network vLLM gives both."""
    quantization = start()
    quantization.maybe_update_config(str(export_tiny("qwen3_moe")), revision="main")
    load(make_layers(quantization))


def test_the_bank_is_registered_once(start):
    made = make_layers(start(additional={"globe": {"strategy": "scratch"}}))
    load(made)
    banks = [layer for layer, _ in made if hasattr(layer, "globe_bank")]
    assert len(banks) == 1
    names = [name for layer, _ in made for name, _ in layer.named_parameters()]
    assert names.count("globe_bank.gate") == 1 and names.count("globe.gate_adapter") == len(made)


def test_the_loader_leaves_out_what_the_plugin_reads(start, export_tiny):
    from safetensors import safe_open

    quantization = start("qwen3_moe")
    make_layers(quantization)
    mapper = quantization.get_checkpoint_weight_mapper()
    (file,) = export_tiny("qwen3_moe").glob("*.safetensors")
    with safe_open(file, framework="pt") as handle:
        keys = list(handle.keys())
    left = {key for key in keys if mapper.map_name(key) is not None}
    assert {key for key in keys if "experts" in key or "globe_bank" in key}.isdisjoint(left)
    assert {key for key in keys if "experts" not in key and "globe_bank" not in key} == left
    assert len(left) < len(keys)
    # under a prefix, as in a model of several parts; and of layers that stay dense
    assert mapper.map_name("language_model.model.layers.1.mlp.experts.up_code_index") is None
    for name in (
        "model.layers.99.mlp.experts.0.down_proj.weight",
        "model.layers.1.mlp.shared_experts.down_proj.weight",
    ):
        assert mapper.map_name(name) == name


def test_dummy_weights_read_no_file(start):
    made = make_layers(start(load_format="dummy"))
    load(made)
    x, weights, ids = routing(start())
    assert all(torch.isfinite(y).all() and y.abs().sum() > 0 for y in call(made, x, weights, ids))


def test_a_copy_of_the_configuration_goes_to_another_process(start):
    import copy

    quantization = start()
    make_layers(quantization)
    assert copy.deepcopy(quantization) is quantization
    state = pickle.loads(pickle.dumps(quantization.__getstate__()))
    assert state["_experts"] is None and state["_globe"] == quantization._globe


def test_other_layers_stay_as_they_are(start):
    quantization = start()
    assert type(quantization.get_quant_method(standins.LinearBase(), "lm_head")) is standins.UnquantizedLinearMethod
    assert quantization.get_quant_method(torch.nn.Linear(1, 1), "x") is None
    dense = standins.RoutedExperts(standins.FusedMoEConfig(8, 2, 48))
    assert quantization.get_quant_method(dense, LAYER.format(99)) is None


def test_weights_that_come_again_are_refused(start):
    quantization = start()
    made = make_layers(quantization)
    quantization.get_checkpoint_weight_mapper()
    quantization.get_checkpoint_weight_mapper()  # of a part of the model
    load(made)
    with pytest.raises(RequestError, match="GloBE experts cannot be replaced; start the engine again"):
        quantization.get_checkpoint_weight_mapper()


def test_a_draft_model_stays_dense(start):
    """Its layers are made after those of the model, and may have their numbers."""
    quantization = start()
    made = make_layers(quantization)
    load(made)
    linear = standins.LinearBase()
    method = quantization.get_quant_method(linear, "mtp.fc")
    assert isinstance(method, standins.UnquantizedLinearMethod)
    assert quantization.get_quant_method(made[0][0], "mtp.layers.0.mlp.experts") is None
    mapper = quantization.get_checkpoint_weight_mapper()
    assert mapper.map_name("globe_bank.gate") is None
    assert mapper.map_name("mtp.layers.0.mlp.experts.0.down_proj.weight") is not None
    method.process_weights_after_loading(linear)
    with pytest.raises(RequestError, match="cannot be replaced"):
        quantization.get_checkpoint_weight_mapper()


def test_a_model_that_asks_for_no_experts_is_refused(start):
    with pytest.raises(RequestError, match="runs the experts of a qwen3_moe model by code that takes no quantization"):
        start().get_checkpoint_weight_mapper()
    quantization = start()
    make_layers(quantization)
    quantization._experts._shares.pop(0)
    with pytest.raises(RequestError, match="made 2 layers of experts and the export has 1 more, the first is layer 0"):
        quantization.get_checkpoint_weight_mapper()
    start(pipeline_parallel_size=2).get_checkpoint_weight_mapper()  # all of them are on another process
    quantization = start(pipeline_parallel_size=2)
    make_layers(quantization)
    quantization._experts._shares.pop(0)
    quantization.get_checkpoint_weight_mapper()


def test_the_method_by_name_for_another_model(start):
    with pytest.raises(RequestError, match="--quantization globe is for a directory that `globe export` wrote and"):
        type(start())()


def test_the_export_is_let_go(start):
    quantization = start()
    made = make_layers(quantization)
    assert quantization._experts._export is None  # vLLM may not have downloaded it yet
    made[0][1].process_weights_after_loading(made[0][0])
    assert quantization._experts._export is not None
    load(made[1:])
    assert quantization._experts._export is None and quantization._experts.is_arranged


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"has_bias": True}, "has biases True in vLLM and False in the export"),
        (
            {"activation": standins.MoEActivation.SITU},
            "has the activation situ .alpha None, limit None, beta None., which",
        ),
    ],
)
def test_layers_that_are_refused(start, options, sentence):
    with pytest.raises(RequestError, match=sentence):
        make_layers(start(), **options)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"tensor_parallel_size": 5}, "Experts of 48 rows cannot be split over 5 processes; give a --tensor-parallel-"),
        ({"data_parallel_size": 5}, "Experts of 48 rows cannot be split over 5 processes"),
        (
            {"download_dir": "elsewhere", "model": "Org/name"},
            "--download-dir is not followed for the experts of Org/",
        ),
        ({"enable_eplb": True}, "--enable-eplb moves experts between processes"),
        ({"lora": standins.LoRAConfig()}, "--enable-lora puts adapters on the experts too"),
        ({"lora": standins.LoRAConfig(["q_proj", "experts"])}, "--enable-lora puts adapters on the experts too"),
    ],
)
def test_options_of_vllm_that_are_refused(start, options, sentence):
    with pytest.raises(RequestError, match=sentence):
        make_layers(start(**options))


def test_options_of_vllm_that_are_followed(start):
    make_layers(start(tensor_parallel_size=5, enable_expert_parallel=True))
    make_layers(start(download_dir="elsewhere"))  # the export is a directory
    load(make_layers(start(lora=standins.LoRAConfig(["q_proj", "o_proj"]))))


def test_inputs_with_weights_are_refused(start):
    quantization = start()
    layer = standins.RoutedExperts(standins.FusedMoEConfig(8, 2, 48))
    layer.apply_router_weight_on_input = True
    method = quantization.get_quant_method(layer, LAYER.format(0))
    with pytest.raises(RequestError, match="weights the inputs of its experts"):
        method.create_weights(layer, 8, quantization._globe.base.hidden_size, 48, torch.float32)


@pytest.mark.parametrize(
    ("additional", "sentence"),
    [
        ({"globe": {"strategie": "auto"}}, "'strategie' in the key \"globe\" of --additional-config is not known"),
        ({"globe": {"strategy": 3}}, 'the key "globe" of --additional-config'),
        ({"globe": 3}, 'the key "globe" of --additional-config'),
        ({"globe": {"strategy": "fast"}}, "strategy 'fast' is not known"),
        ({"globe": {"memory_budget": "1 B"}}, "The memory budget is 1 B"),
        ({"globe": {"memory_budget": "a lot"}}, "a lot"),
    ],
)
def test_options_that_are_refused(start, additional, sentence):
    with pytest.raises(RequestError) as error:
        load(make_layers(start(additional=additional)))
    assert sentence in str(error.value)


def test_another_version_of_the_format(start):
    quantization = start()
    with pytest.raises(GlobeError, match="has GloBE format version 7 and this library reads version 1"):
        type(quantization).from_config({"quant_method": "globe", "format_version": 7})
