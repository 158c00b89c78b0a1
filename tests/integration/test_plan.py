"""`globe plan`: from the numbers of real configurations, without a weight."""

import json
from pathlib import Path

import pytest

from globe_fit.plan.serving import TOKENS, read_model
from globe_kernels import GlobeCheckpoint
from globe_kernels.strategies import DENSE, STRATEGIES
from globe_kernels.strategies import cost as strategy
from globe_kernels.strategies.budget import AUTO, palettes_of, resident
from tests.integration.conftest import assert_refused
from tests.kernels.cases import H100

CONFIGS = Path(__file__).parent.parent / "fit" / "configs"
QWEN = CONFIGS / "qwen3-30b-a3b.json"


@pytest.fixture(autouse=True)
def known_h100(monkeypatch):
    listed = strategy.machines() | {"h100": H100}
    monkeypatch.setattr(strategy, "machines", lambda: listed)


def planned(globe, *arguments) -> dict:
    code, stdout, stderr = globe("plan", *arguments, "--json")
    assert (code, stderr) == (0, "")
    return json.loads(stdout)


@pytest.mark.parametrize(
    ("name", "layers", "experts", "billions", "kv_bytes"),
    [
        ("qwen3-30b-a3b", range(48), 128, 30.53, 2 * 48 * 4 * 128 * 2),
        ("qwen3-235b-a22b", range(94), 128, 235.09, 2 * 94 * 4 * 128 * 2),
        ("deepseek-v3", range(3, 61), 256, 671.03, 61 * (512 + 64) * 2),
        ("mixtral-8x7b", range(32), 8, 46.70, 2 * 32 * 8 * 128 * 2),
        ("olmoe-1b-7b", range(16), 64, 6.92, 2 * 16 * 16 * 128 * 2),
        ("glm-4.5", range(3, 92), 160, 352.80, 2 * 92 * 8 * 128 * 2),
        ("glm-4.5-air", range(1, 46), 128, 106.85, 2 * 46 * 8 * 128 * 2),
    ],
)
def test_every_model_is_planned_from_its_numbers(globe, name, layers, experts, billions, kv_bytes):
    path = CONFIGS / f"{name}.json"
    model = read_model(path)
    inner, width = model.base.intermediate_size, model.base.hidden_size
    assert model.base.num_experts == dict.fromkeys(layers, experts)
    assert (model.outside_values + 3 * model.base.total_experts * inner * width) / 1e9 == pytest.approx(
        billions, abs=6e-3
    )
    found = planned(globe, path, "--palette", "32" if experts > 8 else "none")
    assert (found["model"], found["layers"], found["kv_bytes_per_token"]) == (name, len(layers), kv_bytes)
    (point,) = found["points"]
    strategies = point["strategies"]
    assert list(strategies) == [DENSE.name, *STRATEGIES, AUTO]
    assert all(set(one["tokens_per_s"]) == {str(tokens) for tokens in TOKENS} for one in strategies.values())
    assert strategies["auto"]["resident"] <= strategies["dense"]["resident"] == point["budget"]
    assert (point["cards"] - 1) * 80e9 < found["outside_bytes"] + strategies["dense"]["peak"] <= point["cards"] * 80e9
    assert strategies["bank_first"]["kv_tokens"] > strategies["dense"]["kv_tokens"] >= 0
    taken = set(strategies["auto"]["path"].values())
    assert taken == {"composed"} if name == "mixtral-8x7b" else "bank_first" in taken <= {"bank_first", "scratch"}


def test_the_figures_of_one_model_by_hand(globe):
    """Qwen3-30B at rank 768 with 1536 atoms and palettes of 32: n = 6144 experts."""
    options = ("--rank", "768", "--atoms", "1536", "--palette", "32")
    (point,) = planned(globe, QWEN, *options)["points"]
    down = 6144 * 768 * 2048 * 2
    adapters, bank, codes = 2 * 6144 * 768 * 768 * 2, 2 * 1536 * 768 * 2048 * 2, 2 * 6144 * 12 * 8
    strategies = point["strategies"]
    assert point["bytes_on_disk"] == {"dense": 3 * down, "globe": down + adapters + bank + codes}
    assert strategies["dense"]["resident"] == 3 * down and strategies["dense"]["host"] == 0
    assert strategies["composed"]["resident"] == down + adapters + codes + 2 * 6144 * 768 * 2048 * 2
    assert strategies["composed"]["host"] == bank
    palette_codes = 2 * 48 * (4 * 32 + 128 * 4 * (32 + 1))
    assert strategies["bank_first"]["resident"] == down + adapters + codes + bank + palette_codes
    assert strategies["scratch"]["resident"] == strategies["bank_first"]["resident"]
    assert strategies["dense"]["us_per_layer"]["64"] == pytest.approx(398 + 4 * 2, rel=0.01)
    assert strategies["bank_first"]["us_per_layer"]["64"] == pytest.approx(398 / 1.30 + 7 * 2, rel=0.01)
    assert strategies["dense"]["tokens_per_s"]["64"] == pytest.approx(
        64e6 / (48 * strategies["dense"]["us_per_layer"]["64"])
    )
    assert strategies["auto"]["path"] == dict.fromkeys(("1", "8", "64", "512"), "bank_first") | {"4096": "scratch"}
    outside = 2 * (2 * 151936 * 2048 + 48 * (2048 * (32 + 4 + 4 + 32) * 128 + 2 * 128 + 2 * 2048 + 128 * 2048) + 2048)
    room = 80e9 - outside - strategies["dense"]["peak"]
    assert strategies["dense"]["kv_tokens"] == int(room / 98304)
    assert strategies["dense"]["batch"] == strategies["dense"]["kv_tokens"] // 4096 < strategies["bank_first"]["batch"]


def test_the_tables_a_person_reads(globe):
    code, stdout, _ = globe("plan", QWEN, "--palette", "32")
    assert code == 0
    for text in (
        "48 MoE layers of 128 experts of 768 x 2048, 8 per token",
        "Predictions, not measurements: h100 copies 3000 GB/s",
        "not measured by this project",
        "gate and up 0.625 of dense; at most 58.0 GB of experts on the device",
        "room for the KV cache on 1 x h100",
        "us per MoE layer",
        "tokens/s of all layers",
        "whole model on disk                61.1 GB  46.6 GB  0.763",
        "auto takes bank_first at T = 1, 8, 64, 512; scratch at T = 4096.",
        "it saves nothing above rank 558, so auto does not take it.",
    ):
        assert " ".join(text.split()) in " ".join(stdout.split())


def test_lists_are_a_sweep_and_a_plot_shows_it(globe, tmp_path):
    plot = tmp_path / "plan.png"
    options = ("--rank", "384,768", "--support", "6,12", "--palette", "none,32", "--phi", "tanh", "--plot", plot)
    points = planned(globe, QWEN, *options)["points"]
    sizes = [(point["rank"], point["support"], point["palette"]) for point in points]
    assert sizes == [(r, s, u) for r in (384, 768) for s in (6, 12) for u in (None, 32)]
    assert all(point["ratio"] == pytest.approx(0.625, abs=1e-3) for point in points)
    assert all("bank_first" not in point["strategies"] for point in points)
    assert {point["strategies"]["auto"]["path"]["64"] for point in points[:4]} == {"composed"}
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_checkpoint_is_planned_with_its_own_palettes(globe, fit_tiny, save_tiny):
    path, base = fit_tiny()[0], save_tiny("qwen3_moe")
    checkpoint = GlobeCheckpoint(path)
    found = planned(globe, path, "--base", base, "--on", "cpu")
    (point,) = found["points"]
    palettes = palettes_of(checkpoint)
    assert point["palettes_known"] and found["machine"]["name"] == "cpu"
    held = resident(checkpoint.config, ("bank_first",), item_size=4, palettes=palettes)
    assert point["strategies"]["bank_first"]["parts"] == held.parts
    assert_refused(
        globe("plan", path), 2, "is a GloBE checkpoint without the rest of its model; give --base MODEL_DIR."
    )
    assert_refused(
        globe("plan", path, "--base", base, "--rank", "8"), 2, "is a GloBE checkpoint, which fixes its sizes"
    )
    other = globe("plan", path, "--base", save_tiny("olmoe"))
    assert_refused(other, 2, "with model_type qwen3_moe and")
    assert_refused(other, 2, "has olmoe; give the model on which it was fitted.")


def test_a_budget_bounds_what_auto_and_cached_hold(globe):
    options = ("--palette", "32", "--memory-budget", "60GB", "--cache-bytes", "4GB")
    (point,) = planned(globe, QWEN, *options)["points"]
    strategies = point["strategies"]
    assert "cached" in {path for _, path in strategies["cached"]["switch_points"]}
    slot = 2 * 768 * 2048 * 2
    assert 4e9 - slot - 16 < strategies["cached"]["parts"]["pool"] <= 4e9
    assert strategies["auto"]["parts"]["pool"] == strategies["cached"]["parts"]["pool"]
    assert strategies["auto"]["resident"] <= point["budget"] == 60e9
    assert not strategies["composed"]["fits"] and strategies["auto"]["fits"]


def without_layers(tmp_path: Path) -> Path:
    config = json.loads(QWEN.read_text()) | {"mlp_only_layers": list(range(48))}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def not_a_moe(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    return tmp_path / "config.json"


@pytest.mark.parametrize(
    ("path", "options", "sentence"),
    [
        (Path("nowhere"), (), "nowhere does not exist; give the local directory of a Hugging Face model, or its id"),
        (CONFIGS, (), "; give the local directory of a Hugging Face model."),
        (
            not_a_moe,
            (),
            "LlamaForCausalLM has no routed experts; give a Mixture-of-Experts model.",
        ),
        (without_layers, (), "Qwen3MoeForCausalLM has no routed experts; give a Mixture-of-Experts model."),
        (QWEN, ("--on", "tpu"), "machine 'tpu' is not known; expected one of h100, h200, "),
        (
            QWEN,
            ("--memory-budget", "1GB"),
            "The memory budget is 1.00 GB and the smallest arrangement of this checkpoint",
        ),
        (QWEN, ("--memory-budget", "much"), "'much' is no size; give a number with a unit, such as 20GB"),
        (QWEN, ("--cache-bytes", "1kB"), "The cache is given 1.00 kB and one basis of this checkpoint takes"),
        (
            QWEN,
            ("--ratio", "0.0001"),
            "ratio 0.0001 cannot be reached on qwen3-30b-a3b with support 12; give a ratio from",
        ),
        (QWEN, ("--rank", "9x"), "rank is '9x'; expected numbers separated by commas, such as 12,24."),
        (QWEN, ("--phi", "relu"), "phi is 'relu'; expected one of identity, silu, tanh."),
    ],
    ids=lambda part: part if isinstance(part, str) else "",
)
def test_what_cannot_be_planned(globe, tmp_path, path, options, sentence):
    path = path(tmp_path) if callable(path) else path
    assert_refused(globe("plan", path, *options), 2, sentence)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"num_experts": 4},
            "num_experts_per_tok is 8 and model.layers.0.mlp.experts has 4 experts; restore its config.json.",
        ),
        # transformers knows no part of this name for this model, and leaves it a dict
        (
            {"text_config": {"num_experts": 8}},
            "has a part for the language model that transformers does not know; download it again.",
        ),
    ],
    ids=["numbers", "a part"],
)
def test_a_damaged_configuration_is_a_failure(globe, tmp_path, settings, sentence):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_moe"} | settings))
    assert_refused(globe("plan", tmp_path), 1, sentence)
