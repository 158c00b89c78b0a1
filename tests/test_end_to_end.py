"""The main job on the model that ships with the project."""

import json
import sys
from dataclasses import replace

import pytest

from globe_fit.__main__ import main
from globe_fit.cli.demo import DEMO_CONFIG, shipped_model
from globe_fit.data.source import ExpertSource

# A quarter of the steps of the demo: with these the figures already hold, with all they are better.
CONFIG = replace(DEMO_CONFIG, varpro=replace(DEMO_CONFIG.varpro, steps=75))


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    patch = pytest.MonkeyPatch()
    written: list[str] = []
    with patch.context() as patched:
        patched.setattr("globe_fit.cli.demo.DEMO_CONFIG", CONFIG)
        patched.setattr(sys, "argv", ["globe", "demo", "--json", "-o", str(out)])
        patched.setattr("builtins.print", lambda *words, **_: written.append(" ".join(map(str, words))))
        with pytest.raises(SystemExit) as stopped:
            main()
    assert stopped.value.code == 0
    assert (out / "globe" / "globe.safetensors").is_file() and (out / "globe-hf" / "config.json").is_file()
    (text,) = written
    return json.loads(text)


def test_the_shipped_model_is_a_real_mixture_of_experts():
    base = ExpertSource(shipped_model()).base
    assert len(base.num_experts) >= 4 and min(base.num_experts.values()) >= 16
    assert base.intermediate_size < base.hidden_size
    assert sum(path.stat().st_size for path in shipped_model().iterdir() if path.is_file()) <= 12e6


def test_the_shipped_model_learned_its_language(figures):
    training = json.loads((shipped_model() / "training.json").read_text())
    assert figures["perplexity"]["dense"] < 0.1 * training["unigram_perplexity"]
    assert figures["perplexity"]["dense"] == pytest.approx(training["best_float32_perplexity"], rel=0.02)


@pytest.mark.parametrize("family", ["gate", "up"])
def test_error_is_at_most_half_of_the_equal_byte_svd(figures, family):
    error, svd = figures["relative_error"][family], figures["baseline"]["svd"][family]
    assert 0 < error <= 0.5 * svd


def test_the_compressed_model_stays_closer_to_the_dense_one_than_svd_does(figures):
    assert 0 < figures["kl"]["globe"] < figures["kl"]["svd"]
    assert figures["top1"]["globe"] > figures["top1"]["svd"]
    assert figures["perplexity"]["globe"] < 1.05 * figures["perplexity"]["dense"]


def test_bytes(figures):
    sizes = figures["bytes"]
    assert sizes["dense_experts"] == ExpertSource(shipped_model()).base.dense_bytes
    assert 0.6 < sizes["globe_on_disk"] / sizes["dense_experts"] < 0.64
    assert sizes["globe_on_disk"] < sizes["resident"] < sizes["peak"] and sizes["dense_peak"] > sizes["dense_experts"]


def test_plain_rounding_takes_fewer_bytes_at_less_loss(figures):
    for family, error in figures["relative_error"].items():
        assert 0 < figures["baseline"]["int8"][family] < figures["baseline"]["int4_g32"][family] < error
    sizes = figures["bytes"]
    assert sizes["int4_g32"] < sizes["int8"] < sizes["globe_on_disk"] and figures["kl"]["int8"] < figures["kl"]["globe"]


def test_every_figure_has_its_key(figures):
    expected = {
        "relative_error": {"gate", "up"},
        "perplexity": {"dense", "globe", "svd", "int8", "int4_g32"},
        "kl": {"globe", "svd", "int8", "int4_g32"},
        "top1": {"globe", "svd", "int8", "int4_g32"},
        "bytes": {"dense_experts", "dense_peak", "globe_on_disk", "resident", "peak", "int8", "int4_g32"},
        "tokens_per_s": {"dense", "globe"},
    }
    for name, keys in expected.items():
        assert set(figures[name]) == keys
    assert min(figures["tokens_per_s"].values()) > 0
    assert {"dense", "globe", "svd", "prompt"} == set(figures["continuation"])
    assert all(figures["continuation"].values())
