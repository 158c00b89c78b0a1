"""The names of published checkpoints, as transformers maps them to the modules of a model."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from globe_fit.data.disk_names import DiskNames, ExpertKey
from globe_fit.data.outline import Outline
from globe_kernels.errors import RequestError
from globe_kernels.format.layout import ExpertsLayout
from globe_kernels.model.renaming import LiveKey
from globe_kernels.testing import tiny_model

CONFIGS = Path(__file__).parent.parent / "configs"
PLAIN = ExpertsLayout()


def names_of(model_type: str) -> DiskNames:
    """The names of a tiny model: 8 experts of 48 x 64."""
    model = tiny_model(model_type).to("meta")
    return DiskNames(Outline(Path("model"), model))


@pytest.mark.parametrize(
    ("model_type", "key", "shape", "expected"),
    [
        ("mixtral", "model.layers.1.block_sparse_moe.experts.3.w1.weight", (48, 64), (1, 3, "gate", PLAIN)),
        ("mixtral", "model.layers.1.block_sparse_moe.experts.3.w3.weight", (48, 64), (1, 3, "up", PLAIN)),
        ("mixtral", "model.layers.1.block_sparse_moe.experts.3.w2.weight", (64, 48), (1, 3, "down", PLAIN)),
        ("mixtral", "model.layers.1.block_sparse_moe.gate.weight", (8, 64), None),
        ("qwen2_moe", "model.layers.2.mlp.experts.0.up_proj.weight", (48, 64), (2, 0, "up", PLAIN)),
        ("qwen2_moe", "model.layers.2.mlp.shared_expert.up_proj.weight", (48, 64), None),
        ("qwen2_moe", "model.layers.1.mlp.up_proj.weight", (96, 64), None),
        ("deepseek_v4", "layers.2.ffn.experts.7.w3.weight", (48, 64), (2, 7, "up", PLAIN)),
        ("deepseek_v4", "layers.2.ffn.shared_experts.w3.weight", (48, 64), None),
        ("mistral_large4", "layers.2.experts.7.w1.weight", (48, 64), (2, 7, "gate", PLAIN)),
        (
            "granitemoe",
            "model.layers.0.block_sparse_moe.input_linear.weight",
            (8, 96, 64),
            (0, None, "gate_up_proj", PLAIN),
        ),
        ("granitemoe", "model.layers.0.block_sparse_moe.router.layer.weight", (8, 64), None),
        (
            "gpt_oss",
            "model.layers.0.mlp.experts.gate_up_proj_bias",
            (8, 96),
            (0, None, "gate_up_proj_bias", ExpertsLayout(transposed=True, interleaved=True, has_bias=True)),
        ),
        (
            "qwen3_vl_moe",  # as published: (E, D, 2P), and (E, P, D) of down
            "model.language_model.layers.3.mlp.experts.gate_up_proj",
            (8, 64, 96),
            (3, None, "gate_up_proj", ExpertsLayout(transposed=True)),
        ),
        (
            "qwen3_vl_moe",
            "model.language_model.layers.3.mlp.experts.down_proj",
            (8, 48, 64),
            (3, None, "down_proj", ExpertsLayout(transposed=True)),
        ),
        (
            "qwen3_vl_moe",  # as transformers saves it
            "model.language_model.layers.3.mlp.experts.gate_up_proj",
            (8, 96, 64),
            (3, None, "gate_up_proj", PLAIN),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_published_names(model_type, key, shape, expected):
    parsed = names_of(model_type).parse(key, shape)
    assert parsed == (expected and ExpertKey(*expected))


def test_deepseek_v3_with_the_layer_that_predicts_further_tokens():
    """The published files have a layer 61 with experts, and the model of transformers has 61 layers, from 0."""
    names = DiskNames(Outline.read(CONFIGS / "deepseek-v3.json"))
    gate = "mlp.experts.255.gate_proj.weight"
    assert names.parse(f"model.layers.60.{gate}", (2048, 7168)) == ExpertKey(60, 255, "gate", PLAIN)
    assert names.parse("model.layers.60.mlp.gate.e_score_correction_bias", (256,)) is None
    assert names.parse(f"model.layers.61.{gate}", (2048, 7168)) is None
    assert names.parse("model.layers.61.eh_proj.weight", (7168, 14336)) is None
    # experts in a layer that is dense in config.json are seen, for the message that refuses them
    assert names.parse(f"model.layers.1.{gate}", (2048, 7168)) == ExpertKey(1, 255, "gate", PLAIN)


@pytest.mark.parametrize("steps", [("Chunk",), ("MergeModulelist", "Transpose"), ("Transpose", "Interleave")])
def test_an_unknown_way_to_make_experts_is_refused(steps, monkeypatch):
    names = names_of("qwen3_moe")
    converter = SimpleNamespace(operations=[type(step, (), {})() for step in steps], source_patterns=["own"])
    live = LiveKey("model.layers.0.mlp.experts.gate_up_proj", "own", converter)
    monkeypatch.setattr(names, "_renaming", SimpleNamespace(live=lambda key: live))
    sentence = (
        rf"makes model.layers.0.mlp.experts.gate_up_proj of own.name by {', '.join(steps)}, which GloBE does not know; "
        "load the model in transformers and save it with save_original_format=False."
    )
    with pytest.raises(RequestError, match=sentence):
        names.parse("own.name", (8, 96, 64))


def test_an_export_that_transformers_would_load_elsewhere_is_refused(monkeypatch):
    names, path = names_of("qwen3_moe"), "model.layers.0.mlp.experts"
    assert names.exported_path(path, f"{path}.0.gate_proj.weight") == path
    monkeypatch.setattr(names, "_renaming", SimpleNamespace(live=lambda key: LiveKey(f"elsewhere.{key}")))
    with pytest.raises(RequestError, match=f"loads {path}.down_proj as elsewhere.{path}.down_proj, so an export could"):
        names.exported_path(path, f"{path}.0.gate_proj.weight")
