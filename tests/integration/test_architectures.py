"""Every model type of transformers with routed experts: it runs, or the refusal says why.

docs/architectures.md lists the types; here each is read, and a type of every kind is fitted, patched and loaded.
"""

import json
import re
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from docs.generate_architectures import LIMITS, PAGE, Trial, row_of, without_figures
from globe_fit import ExpertSource, export_globe, fit, save_fit
from globe_fit.data.outline import Outline
from globe_fit.plan.serving import read_model
from globe_kernels import GlobeCheckpoint, GlobeMoEFFN, RequestError, patch
from globe_kernels.model.discovery import routed_experts
from globe_kernels.testing import assert_close, auto_class, moe_model_types, text_inputs, text_logits, tiny_model
from tests.conftest import TINY_FIT
from tests.integration.conftest import assert_refused

ROWS = {
    line.split("`")[1]: line
    for line in without_figures(PAGE.read_text(encoding="utf-8")).splitlines()
    if line.startswith("| `")
}


def test_the_page_lists_every_model_type():
    assert sorted(ROWS) == moe_model_types()
    supported = sum("`AutoModel" in row for row in ROWS.values())
    assert supported >= 54 and len(ROWS) - supported == len(REFUSED)
    text = PAGE.read_text(encoding="utf-8")
    assert f"{supported} of the {len(ROWS)} model types" in text
    assert f"transformers {transformers.__version__} has" in text, "python docs/generate_architectures.py"


@pytest.mark.parametrize("model_type", moe_model_types())
def test_reads_and_plans_as_the_page_says(model_type, tmp_path):
    """Every layout on disk gives the weights of the live model, and config.json alone gives its sizes."""
    row = row_of(model_type, tmp_path)
    assert f"| `{model_type}` | {' | '.join(row.cells)} |" == ROWS[model_type]


# {model type: why it is tried}
KINDS = {
    "aria": "transposed, with other names on disk; nested",
    "deepseek_v4": "clamped activation; other names on disk, of layers too",
    "dots3_note": "experts in the vision tower too; the text model has other names",
    "gemma4": "no block around the experts",
    "granitemoe": "fused tensors with other names on disk",
    "inkling": "interleaved on disk, not in the model",
    "inkling2": "softcapped activation",
    "jamba": "layers without experts between layers with experts",
    "kimi_k25": "a wrapper around the model of another type",
    "mistral_large4": "renamed twice",
    "openai_privacy_filter": "transposed, with biases; no language model head",
    "qwen3_5_moe": "nested; a class for the text model alone",
    "qwen3_omni_moe": "a thinker and a talker, and experts in both",
    "qwen3_vl_moe": "published transposed, and not so in the model",
    "zaya": "a token takes one expert",
}


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    """Trial of a model type, once."""
    made: dict[str, Trial] = {}

    def make(model_type: str) -> Trial:
        if model_type not in made:
            made[model_type] = Trial(tiny_model(model_type), tmp_path_factory.mktemp(model_type))
        return made[model_type]

    return make


@pytest.fixture(scope="module")
def fitted(trial, tmp_path_factory):
    """(directory of the checkpoint, directory of the export) of a model type, once."""
    made = {}

    def make(model_type: str):
        if model_type not in made:
            out, source = tmp_path_factory.mktemp(f"{model_type}-out"), trial(model_type).sources["original"]
            save_fit(fit(source, TINY_FIT), source, out / "globe")
            export_globe(GlobeCheckpoint(out / "globe"), source, out / "hf")
            made[model_type] = (out / "globe", out / "hf")
        return made[model_type]

    return make


@pytest.mark.parametrize("model_type", KINDS)
def test_from_the_fit_to_the_logits(model_type, trial):
    found = trial(model_type).figures()
    assert found.effect > 0.1, "the compression must show in the logits"
    assert max(found.patched, found.exported) < LIMITS[-1]


def test_the_published_layouts_are_tried(trial):
    assert {*trial("qwen3_vl_moe").sources} == {"original", "published"}
    key = "model.language_model.layers.1.mlp.experts.gate_up_proj"
    assert trial("qwen3_vl_moe").sources["published"].files.shape(key) == (8, 64, 96)
    assert any(key.endswith("experts.w13_weight") for key in trial("inkling").sources["original"].files.keys)
    assert any("block_sparse_moe.input_linear" in key for key in trial("granitemoe").sources["original"].files.keys)


@pytest.mark.parametrize(
    ("model_type", "replaced", "left"),
    [
        ("dots3_note", "model.language_model.", "model.vision_tower."),
        ("qwen3_omni_moe", "thinker.model.language_model.", "talker."),
    ],
)
def test_experts_outside_of_the_language_model_stay_dense(model_type, replaced, left, fitted, trial):
    globe, export = fitted(model_type)
    patched = tiny_model(model_type)
    before = {name for name, module in patched.named_modules() if hasattr(module, "has_gate")}
    patch(patched, globe)
    loaded = auto_class(patched).from_pretrained(export, dtype=torch.float32)
    dense = trial(model_type).model.state_dict()
    for model in (patched, loaded):
        globe_paths = {name for name, module in model.named_modules() if isinstance(module, GlobeMoEFFN)}
        still_dense = {name for name, module in model.named_modules() if hasattr(module, "has_gate")}
        assert globe_paths == {name for name in before if name.startswith(replaced)}
        assert still_dense - globe_paths == {name for name in before if name.startswith(left)} != set()
    for name in still_dense - globe_paths:
        assert torch.equal(loaded.get_submodule(name).gate_up_proj, dense[f"{name}.gate_up_proj"])


@pytest.mark.parametrize("model_type", ["gemma4", "granitemoe", "kimi_k25", "mistral_large4", "qwen3_5_moe"])
def test_an_export_loads_without_a_head(model_type, fitted, trial):
    globe, export = fitted(model_type)
    body = transformers.AutoModel.from_pretrained(export, dtype=torch.float32).eval()
    dense = transformers.AutoModel.from_pretrained(trial(model_type).sources["original"].model_dir).float().eval()
    inputs = text_inputs(trial(model_type).model)
    with torch.no_grad():
        before = dense(**inputs).last_hidden_state
        patch(dense, globe)
        expected, loaded = dense(**inputs).last_hidden_state, body(**inputs).last_hidden_state
    assert_close(loaded, expected, rms=1e-6, peak=1e-5)
    assert not torch.allclose(loaded, before, atol=1e-2)


@pytest.mark.parametrize(
    ("model_type", "path"),
    [
        ("deepseek_v4", "model.layers.1.ffn.experts"),
        ("dots3_note", "model.layers.1.mlp.experts"),
        ("granitemoe", "model.layers.1.block_sparse_moe.experts"),
        ("mistral_large4", "layers.1.experts"),
    ],
)
def test_an_export_keeps_the_published_names(model_type, path, fitted):
    """Where transformers reads them: granitemoe has no module of experts on disk."""
    names = {key for file in fitted(model_type)[1].glob("*.safetensors") for key in load_file(file)}
    assert {f"{path}.{family}_{part}" for family in ("gate", "up") for part in ("adapter", "code_index")} <= names


@pytest.mark.parametrize("model_type", ["dots3_note", "qwen3_5_moe", "qwen4_exp"])
def test_the_text_model_alone(model_type, fitted, trial, tmp_path):
    """A checkpoint of a nested model runs in its text model, which is a base of its own too."""
    source = trial(model_type).sources["original"]
    text = transformers.AutoModelForCausalLM.from_pretrained(source.model_dir, dtype=torch.float32).eval()
    assert type(text) is not type(trial(model_type).model)
    text.save_pretrained(tmp_path / "text")
    alone = ExpertSource(tmp_path / "text")
    assert alone.weights_sha256 == source.weights_sha256
    assert alone.base.model_type == source.base.model_type and alone.base.num_experts == source.base.num_experts
    globe, export = fitted(model_type)
    patch(text, globe)
    whole = auto_class(trial(model_type).model).from_pretrained(export, dtype=torch.float32).eval()
    assert_close(text_logits(text), text_logits(whole), rms=1e-6, peak=1e-5)
    export_globe(GlobeCheckpoint(globe), alone, tmp_path / "hf")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    assert_close(text_logits(again), text_logits(text), rms=1e-6, peak=1e-5)


@pytest.mark.parametrize("model_type", ["dots3_note", "gemma4", "kimi_k25", "qwen3_5_moe", "qwen3_omni_moe"])
def test_a_nested_configuration_that_names_no_class(model_type, trial, tmp_path):
    """transformers has a class for the text alone; a nested configuration is not of that class."""
    config = json.loads((trial(model_type).sources["original"].model_dir / "config.json").read_text())
    named = config.pop("architectures")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert [type(Outline.read(tmp_path / "config.json").model).__name__] == named


def test_an_infinity_in_the_configuration(trial, tmp_path):
    """transformers writes it as {"__float__": "Infinity"}."""
    text = (trial("granitemoehybrid").sources["original"].model_dir / "config.json").read_text()
    assert '"__float__": "Infinity"' in text
    (tmp_path / "config.json").write_text(text)
    assert read_model(tmp_path / "config.json").base.num_experts == dict.fromkeys(range(4), 8)


@pytest.mark.parametrize(
    ("model_type", "layers", "experts", "top_k", "billions"),
    [
        ("qwen3_5_moe", 40, 256, 8, 35.1),  # Qwen3.5-35B-A3B
        ("gpt_oss", 36, 128, 4, 116.8),  # gpt-oss-120b
        ("deepseek_v4", 43, 256, 6, 284.3),  # DeepSeek-V4-Flash
        ("glm_moe_dsa", 75, 256, 8, 743.9),  # GLM-5
        ("minimax_m2", 62, 256, 8, 228.7),  # MiniMax-M2
        ("hy_v3", 79, 192, 8, 295.0),  # Hy3
        ("mimo_v2_flash", 47, 256, 8, 308.8),  # MiMo-V2-Flash
    ],
)
def test_the_sizes_of_the_published_model(model_type, layers, experts, top_k, billions, tmp_path):
    """They are the defaults of the configurations of these types."""
    transformers.AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    model = read_model(tmp_path / "config.json")
    base = model.base
    assert (len(base.num_experts), {*base.num_experts.values()}, model.top_k) == (layers, {experts}, top_k)
    inside = 3 * base.total_experts * base.intermediate_size * base.hidden_size
    assert (inside + model.outside_values) / 1e9 == pytest.approx(billions, abs=0.06)


@pytest.mark.parametrize(
    ("model_type", "values"),
    [
        ("gemma4", 2 * (3 * 2 * 16 + 2 * 512)),  # heads of another width in the last layer
        ("qwen3_5_moe", 2 * 1 * 2 * 16),  # three of four layers keep a state in place of keys and values
        ("jamba", 2 * 2 * 2 * 16),
        ("deepseek_v3", 4 * (16 + 8)),
    ],
)
def test_the_kv_cache_is_that_of_the_layers_with_keys_and_values(model_type, values, trial):
    assert read_model(trial(model_type).sources["original"].model_dir / "config.json").kv_values == values


def own_forward(path: str, model: str, experts: str) -> str:
    return (
        f"{path} of {model} is a {experts}, which computes in a forward of its own; GloBE cannot stand in for such "
        "experts, so give another model."
    )


def two_in_a_layer(layer: int, model: str, first: str, second: str) -> str:
    return (
        f"Layer {layer} of {model} has two modules of routed experts, {first} and {second}, and GloBE stands in for "
        "one in a layer; give another model."
    )


REFUSED = {
    "dbrx": own_forward("transformer.blocks.0.ffn.experts", "DbrxForCausalLM", "DbrxExperts"),
    "diffusion_gemma": two_in_a_layer(
        0,
        "DiffusionGemmaForBlockDiffusion",
        "model.encoder.language_model.layers.0.experts",
        "model.decoder.layers.0.experts",
    ),
    "ernie4_5_vl_moe": two_in_a_layer(
        1,
        "Ernie4_5_VLMoeForConditionalGeneration",
        "model.language_model.layers.1.mlp.text_moe.experts",
        "model.language_model.layers.1.mlp.vision_moe.experts",
    ),
    "jetmoe": own_forward("model.layers.0.mlp.input_linear", "JetMoeForCausalLM", "JetMoeParallelExperts"),
    "llama4": own_forward(
        "language_model.model.layers.0.feed_forward.experts", "Llama4ForConditionalGeneration", "Llama4TextExperts"
    ),
    "longcat_flash": own_forward("model.layers.0.mlp.experts", "LongcatFlashForCausalLM", "LongcatFlashExperts"),
    "muse_spark": "model.language_model.layers.1.mlp.experts of MuseSparkForConditionalGeneration is a "
    "MuseSparkExperts, which normalises the output of every expert; GloBE cannot stand in for such experts",
    "nemotron_h": "model.layers.1.mixer.experts of NemotronHForCausalLM is a NemotronHExperts, which has no gate: "
    "GloBE compresses gate and up; GloBE cannot stand in for such experts, so give another model.",
    "nllb_moe": own_forward("model.encoder.layers.1.ffn.experts", "NllbMoeForConditionalGeneration", "NllbMoeExperts"),
    "step3p7": own_forward(
        "model.language_model.layers.1.mlp.experts", "Step3p7ForConditionalGeneration", "Step3p7Experts"
    ),
    "switch_transformers": own_forward(
        "encoder.block.1.layer.1.mlp.experts", "SwitchTransformersForConditionalGeneration", "SwitchTransformersExperts"
    ),
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_every_refusal_gives_its_reason(model_type, globe, fit_tiny, tmp_path):
    model = tiny_model(model_type)
    model.save_pretrained(tmp_path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for refused in (
        lambda: ExpertSource(tmp_path),
        lambda: patch(model, fit_tiny()[0]),
        lambda: routed_experts(model),
    ):
        with pytest.raises(RequestError, match=re.escape(REFUSED[model_type])):
            refused()
    assert_refused(globe("plan", tmp_path / "config.json"), 2, REFUSED[model_type])
    assert_refused(globe("fit", "--no-calibrate", tmp_path, "-o", tmp_path / "out"), 2, REFUSED[model_type])
    assert not (tmp_path / "out").exists()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_experts_in_the_vision_tower_alone(tmp_path):
    model = tiny_model("dots3_note", mlp_layer_types=["dense"] * 4)
    assert not any("language_model" in name for name, module in model.named_modules() if hasattr(module, "has_gate"))
    sentence = r"model.vision_tower.blocks.0.mlp.experts of .* has routed experts outside of layers.N; give another"
    with pytest.raises(RequestError, match=sentence):
        routed_experts(model)


def test_a_head_for_prediction_is_copied_and_not_compressed(trial, tmp_path):
    """DeepSeek-V3 stores the layer after the last; transformers does not load it."""
    source = trial("deepseek_v3").sources["original"]
    shutil.copytree(source.model_dir, tmp_path / "base")
    (index_path,) = (tmp_path / "base").glob("*.index.json")
    index = json.loads(index_path.read_text())
    name = next(key for key in index["weight_map"] if "layers.3.mlp.experts.0.gate_proj" in key)
    extra = {
        name.replace("layers.3", "layers.4"): torch.full((48, 64), 2.0),
        "model.layers.4.eh_proj.weight": torch.full((64, 128), 3.0),
    }
    save_file(extra, tmp_path / "base" / "model-extra.safetensors", {"format": "pt"})
    index["weight_map"] |= dict.fromkeys(extra, "model-extra.safetensors")
    index_path.write_text(json.dumps(index))
    config = json.loads((tmp_path / "base" / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    with_head = ExpertSource(tmp_path / "base")
    assert [layer.layer for layer in with_head.layers] == [layer.layer for layer in source.layers] == [1, 2, 3]
    assert not extra.keys() & with_head.expert_keys.keys()
    save_fit(fit(with_head, TINY_FIT), with_head, tmp_path / "globe")
    export_globe(GlobeCheckpoint(tmp_path / "globe"), with_head, tmp_path / "hf")
    exported = {k: t for file in (tmp_path / "hf").glob("*.safetensors") for k, t in load_file(file).items()}
    assert all(torch.equal(exported[key], tensor) for key, tensor in extra.items())
    model, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not report["missing_keys"] and text_logits(model).isfinite().all()
