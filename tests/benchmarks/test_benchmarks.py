"""The benchmarks measure what they say: the dense twin computes the layer, the gate refuses, the rows are whole."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from globe_kernels.testing import assert_close
from tests.benchmarks.conftest import BENCHMARKS
from tests.kernels.cases import DEVICE, needs_kernels, same_tiles


@pytest.fixture
def providers(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import providers

    return providers


@needs_kernels
@pytest.mark.parametrize("tokens", [1, 30])
def test_the_dense_twin_computes_the_same_layer(providers, monkeypatch, tokens):
    from shapes import LayerShape

    torch.manual_seed(0)
    monkeypatch.setattr(providers, "choose", lambda *_: same_tiles(16, 16, 16, group_m=2))
    layer = providers.random_layer(
        LayerShape(hidden=40, intermediate=24, experts=6, choices=2), 9, torch.float32, DEVICE
    )
    inputs = providers.random_inputs(layer.shape, tokens, torch.float32, DEVICE)
    expected = providers.reference(layer, inputs)
    for name in ("dense_twin", "globe", "globe_bank_first", "hf_eager"):
        out = providers.PROVIDERS[name].build(layer)(inputs)
        assert_close(out, expected, rms=1e-5, peak=2e-5)


def run(script: str, *arguments: str) -> subprocess.CompletedProcess:
    """In a new interpreter."""
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *arguments], capture_output=True, text=True, timeout=300
    )


def test_ffn_on_a_cpu(ffn_rows):
    assert {row["provider"] for row in ffn_rows} == {
        "globe",
        "globe_bank_first",
        "hf_eager",
        "hf_grouped_mm",
        "hf_batched_mm",
    }
    for row in ffn_rows:
        assert row["op"] == "moe_ffn" and row["shape"]["tokens"] == 4 and row["device"] == "cpu"
        assert 0 < row["p20_us"] <= row["median_us"] <= row["p80_us"]
        assert 0 < row["relative_error"] < 1e-5 and row["gb_per_s"] > 0 and row["tflop_per_s"] > 0
        assert {"commit", "torch", "triton", "date", "copy_gb_per_s", "matmul_tflop_per_s"} <= row.keys()


def test_compose_on_a_cpu(warm_python):
    done = warm_python.run(BENCHMARKS / "compose.py", "--cpu", "--json", "--repeats", "1", "--atoms", "16")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [row["provider"] for row in rows] == ["compose_layer", "compose_basis", "torch_matmul"]
    for row in rows:
        assert row["shape"]["atoms"] <= 16 and row["gb_per_s"] > 0 and 0 <= row["relative_error"] < 1e-6


def test_solves_on_a_cpu(warm_python):
    done = warm_python.run(BENCHMARKS / "spd.py", "--cpu", "--json", "--repeats", "1", "--systems", "3")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert {row["provider"] for row in rows} == {"globe", "torch_cholesky", "torch_solve"} and len(rows) == 24
    for row in rows:
        assert row["shape"]["systems"] == 3 and row["gb_per_s"] > 0 and 0 < row["relative_error"] < 1e-5


def test_a_fit_of_planted_experts_comes_down_to_their_noise(providers, monkeypatch, capsys):
    import fit
    import synthetic
    from shapes import LayerShape

    monkeypatch.setitem(synthetic.SIZES, "qwen3-30b", (8, LayerShape(hidden=64, intermediate=24, experts=8, choices=2)))
    arguments = [
        "--size",
        "qwen3-30b",
        "--steps",
        "150",
        "--support",
        "4",
        "--ratio",
        "0.8",
        "--device",
        "cpu",
        "--json",
    ]
    monkeypatch.setattr(sys, "argv", ["fit.py", *arguments])
    fit.main()
    (row,) = json.loads(capsys.readouterr().out)
    noise = synthetic.NOISE**2 / (1 + synthetic.NOISE**2)
    assert row["provider"] == "globe" and row["model"] == "synthetic_qwen3-30b" and row["shape"]["rank"] == 24
    # not all of the noise stays: adapters and bank follow some of it
    for error in (row["gate_error"], row["up_error"]):
        assert 0.1 * noise < error < noise and error < 0.5 * row["svd_error"]
    assert row["peak_bytes"] > row["estimated_bytes"] > 0


@pytest.fixture
def fitted(providers, monkeypatch, capsys, tmp_path):
    """Runs benchmarks/fit.py on the shipped model, on a few windows of two texts; returns its rows."""
    import fit

    held_out = (fit.shipped_model() / "heldout.txt").read_text()
    texts = [tmp_path / "a.txt", tmp_path / "b.txt"]
    texts[0].write_text(held_out[:2500])
    texts[1].write_text(held_out[30_000:32_500])

    def run(*arguments: str) -> list[dict]:
        files = ["--text", str(texts[0]), "--text2", str(texts[1]), "--calibrate", str(texts[0])]
        monkeypatch.setattr(sys, "argv", ["fit.py", "--device", "cpu", "--json", *files, *arguments])
        fit.main()
        return json.loads(capsys.readouterr().out)

    return run


@pytest.mark.slow
def test_rounding_and_pruning_are_rows_of_a_fit(fitted):
    names = ["int8", "int2_g32", "gptq_int2_g32", "gptq_routed_int2_g32", "reap", "reap_50"]
    rows = {row["provider"]: row for row in fitted("--methods", ",".join(names), "--float32")}
    assert list(rows) == names and not any("seed" in row for row in rows.values())
    int8, nearest, gptq, routed, reap, half = rows.values()
    values = 2 * 120 * 64 * 192
    assert int8["bytes"] == values + 2 * 120 * 64 * 2
    assert nearest["bytes"] == gptq["bytes"] == values // 4 + 2 * 120 * 64 * 6 * 9 // 4
    assert routed["bytes"] == gptq["bytes"] + 2 * 120 * 192
    assert int8["share_of_experts"] == pytest.approx((int8["bytes"] + values) / (3 * values))
    for ending in ("", "2"):
        assert int8[f"kl{ending}"] < 1e-3 < gptq[f"kl{ending}"] and 0.01 < reap[f"kl{ending}"] < half[f"kl{ending}"]
        assert int8[f"perplexity{ending}"] == pytest.approx(int8[f"dense_perplexity{ending}"], rel=0.01)
    assert routed["kl"] < gptq["kl"] < nearest["kl"] and nearest["gate_error"] < gptq["gate_error"] < 1
    assert reap["kept"] == 14 / 20 and reap["share_of_experts"] == pytest.approx(0.7) and half["kept"] == 0.5
    assert half["bytes"] == values and "gate_error" not in half
    assert half["settings"].endswith("quality in float32, calibrated on a.txt, measured on a.txt and b.txt")


def test_methods_with_a_seed_run_once_per_seed(fitted):
    rows = fitted("--methods", "globe,svd", "--seeds", "3", "5", "--steps", "1")
    assert [(row["provider"], row.get("seed")) for row in rows] == [("globe", 3), ("globe", 5), ("svd", None)]
    assert rows[0]["gate_error"] != rows[1]["gate_error"] and rows[0]["bytes"] >= rows[2]["bytes"]


def test_methods_that_cannot_run(fitted, capsys):
    for methods, complaint in (
        ("int8,int9", "--methods has 'int9'; expected some of globe, "),
        ("globe_self", "globe_self is calibrated; give it self with --calibrate."),
    ):
        with pytest.raises(SystemExit):
            fitted("--methods", methods)
        assert complaint in capsys.readouterr().err


def test_planted_experts_are_the_same_at_each_reading(providers):
    from shapes import LayerShape
    from synthetic import SyntheticSource

    shape = LayerShape(hidden=20, intermediate=6, experts=3, choices=2)
    source = SyntheticSource("s", 2, shape, rank=6, atoms=4, support=2, device="cpu")
    first, other = source.layers
    gate = source.read(first, "gate")
    assert not torch.equal(source.read(first, "up"), gate) and not torch.equal(source.read(other, "gate"), gate)
    assert torch.equal(source.read(first, "gate", range(1, 3), slice(5, 9)), gate[1:, :, 5:9])
    assert gate.shape == (3, 6, 20) and 0.3 < gate.square().mean() < 4


def test_a_wrong_provider_stops_the_run(providers, monkeypatch, capsys):
    import ffn

    right = providers.PROVIDERS["globe"]
    wrong = replace(right, build=lambda layer: lambda inputs: 0 * right.build(layer)(inputs))
    monkeypatch.setitem(providers.PROVIDERS, "globe", wrong)
    monkeypatch.setattr(sys, "argv", ["ffn.py", "--cpu", "--tokens", "2", "--repeats", "1"])
    with pytest.raises(SystemExit, match="globe has relative error 1, the gate is .*; nothing was timed"):
        ffn.main()


@pytest.mark.parametrize("script", ["ffn.py", "compose.py", "spd.py"])
@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_without_a_gpu_the_way_out_is_named(script):
    done = run(script)
    assert done.returncode == 2 and "torch sees no CUDA device; use --cpu" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="counts memory as Linux does")
def test_whole_models_on_a_cpu(warm_python):
    sizes = ("--tokens", "8", "--batch", "2", "--cache-share", "50")
    done = warm_python.run(BENCHMARKS / "model.py", "--device", "cpu", "--json", "--repeats", "1", *sizes)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    names = ["dense", "composed", "bank_first", "cached_50%", "scratch", "auto"]
    assert [(row["op"], row["provider"]) for row in rows] == [
        (op, name) for op in ("model_prefill", "model_decode") for name in names
    ]
    for row in rows:
        assert row["model"] == "tiny_moe" and row["shape"]["layers"] == 6 and row["shape"]["tokens"] in (2, 8)
        assert row["tokens_per_s"] == pytest.approx(1e6 * row["shape"]["tokens"] / row["median_us"])
        assert 0 < row["relative_error"] < 1e-5 and row["predicted_us"] > 0 and row["ratio_to_dense"] > 0
        assert row["predicted_as_run_us"] > 0 and 4 <= row["active_experts"] <= 20
        assert row["resident_bytes"] == pytest.approx(row["planned_bytes"], rel=0.05)
    # scratch holds neither bases nor a pool
    resident = {row["provider"]: row["resident_bytes"] for row in rows}
    assert resident["scratch"] < resident["dense"] < resident["composed"]


@pytest.fixture
def subject(providers, monkeypatch, tmp_path):
    """A random model of two tiny layers and its checkpoint, as benchmarks/model.py makes them."""
    import subjects
    from shapes import LayerShape

    monkeypatch.setitem(subjects.MODELS, "tiny", LayerShape(hidden=48, intermediate=32, experts=16, choices=2))
    torch.manual_seed(0)
    return subjects.random("tiny", 2, 16, 14, tmp_path, "cpu")


def test_a_wrong_strategy_stops_the_run(subject):
    import model
    from subjects import build, variants

    chosen = variants(subject.config, 4, [100.0])
    models = {variant.name: build(subject, variant, torch.float32) for variant in chosen}
    runners = {"reference": model.Runner(subject.dense), "dense eager": model.Runner(models["dense"])}
    runners |= {name: model.Runner(own) for name, own in models.items() if name != "dense"}
    with torch.inference_mode():
        cases = [model.prefill(runners, subject, 40), model.decode(runners, subject, 3)]
        errors = model.gate(cases, runners)
        assert max(errors.values()) < 1e-5 and errors["composed"] > 0
        # a layer that runs by another strategy than its model names
        module = models["scratch"].model.layers[1].mlp.experts  # it holds the codes that bank_first takes too
        hooks = (
            module.register_forward_pre_hook(lambda own, _: setattr(own, "strategy", lambda tokens: "bank_first")),
            module.register_forward_hook(lambda own, *_: delattr(own, "strategy")),
        )
        with pytest.raises(SystemExit, match="scratch ran .* expected .*; nothing was timed"):
            model.gate(cases, runners)
        for hook in hooks:
            hook.remove()
        module.down_proj.data[:, 0, 0] += 1e-2
        with pytest.raises(SystemExit, match="logits of scratch are .* off, 0.0001 allowed, and .*; nothing was t"):
            model.gate(cases, runners)


def test_bytes_that_were_not_planned_stop_the_run(subject, monkeypatch):
    import model

    monkeypatch.setattr(model, "measured_bytes", lambda *_: (106, 100))
    with pytest.raises(SystemExit, match="HOLD 106 BYTES AND 100 WERE PLANNED, more than 5% apart"):
        model.check_bytes(subject, [model.Variant("composed", "composed")], torch.float32)


def test_the_order_of_clear_pairs(providers):
    import model

    # median, half of what lies between the quantiles, predicted, predicted as run
    times = {
        "dense": (100, 1, 10, 10),
        "composed": (105, 1, 30, 20),
        "scratch": (200, 1, 20, 30),
        "cached_10%": (260, 70, 1, 1),
        "auto": (500, 1, 1, 1),
    }
    rows = [
        {
            "op": "model_decode",
            "shape": {"tokens": 1},
            "provider": name,
            "median_us": us,
            "p20_us": us - spread,
            "p80_us": us + spread,
            "predicted_us": uniform,
            "predicted_as_run_us": as_run,
        }
        for name, (us, spread, uniform, as_run) in times.items()
    ]
    title, measured, uniform, as_run, *counts = model.orders(rows)
    assert title == "model_decode 1" and measured.endswith(" dense < composed < scratch < cached_10%")
    assert uniform.endswith(" cached_10% < dense < scratch < composed")
    assert as_run.endswith(" cached_10% < dense < composed < scratch")
    # dense and composed are too close, the quantiles of the cache reach those of scratch
    assert [count.split(" pairs")[0] for count in counts] == ["1 of the 4", "2 of the 4"]


def test_a_larger_cache_hits_more(subject, monkeypatch, tmp_path):
    import curve

    monkeypatch.setattr(curve, "_WARM_UP", 24)
    monkeypatch.setattr(curve, "_COUNTED", 24)
    with torch.inference_mode():
        rows = curve.measure_curve(subject, torch.float32)
    assert [row["provider"] for row in rows] == [name for name in ("zipf", "uniform") for _ in curve.SHARES]
    for name in ("zipf", "uniform"):
        hits = [row["hit_rate"] for row in rows if row["provider"] == name]
        assert hits[-1] > hits[-3] > hits[0] and hits[-1] > 0.95
    assert rows[-3]["hit_rate"] < rows[3]["hit_rate"], "skewed routing comes back sooner"
    curve.draw(tmp_path / "curve.png", [row | {"model": "m", "device": "d", "commit": "c"} for row in rows])
    assert (tmp_path / "curve.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
@needs_kernels
@pytest.mark.skipif(DEVICE == "cuda", reason="compute-sanitizer runs it there")
def test_what_the_sanitizer_watches_is_right(providers, monkeypatch):
    import sanitize

    monkeypatch.setattr(providers, "choose", lambda *_: same_tiles(64, 64, 64, group_m=2))
    sanitize.run("cpu", torch.float32, tokens=(1, 30, 200))
