"""The plan of a run over a text: from disk or in memory, the size of the batches, and the refusals."""

from dataclasses import replace

import pytest
import torch

from globe_fit import ExpertSource
from globe_fit.calibration import offload
from globe_fit.calibration.metric import calibrate
from globe_fit.calibration.moments import collect
from globe_fit.calibration.offload import plan_run
from globe_fit.calibration.self_text import sample_windows
from globe_fit.cli.demo import shipped_model
from globe_fit.data.model import load_model
from globe_fit.measure.evaluate import evaluate
from globe_fit.run.snapshots import Snapshots
from globe_kernels.errors import GlobeError, RequestError
from globe_kernels.format import writing
from globe_kernels.model.discovery import routed_experts
from globe_kernels.testing import assert_close, tiny_model

LIMIT = 20e6  # the model has 10.9 MB, and less than a window is left beside it


@pytest.fixture(scope="module")
def source():
    return ExpertSource(shipped_model())


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text((shipped_model() / "heldout.txt").read_text(encoding="utf-8")[:9000], encoding="utf-8")
    return path


def test_a_model_that_fits_stays_in_memory(source):
    plan = plan_run(source, "cpu")
    weights = sum(map(source.files.dense_bytes, source.files.keys))
    assert (plan.offload, plan.windows, plan.rewritten_bytes) == (False, 8, 0)
    assert weights < plan.in_memory_bytes < plan.peak_bytes < weights + 2e8
    least = plan_run(source, "cpu", plan.in_memory_bytes)
    assert least == replace(plan, windows=1, peak_bytes=plan.in_memory_bytes, available_bytes=plan.in_memory_bytes)


def test_a_model_that_does_not_fit_is_run_from_disk(source):
    fits = plan_run(source, "cpu").in_memory_bytes
    plan = plan_run(source, "cpu", fits - 1)
    assert plan.offload and plan.peak_bytes <= plan.available_bytes == fits - 1
    experts = 6 * 20 * 3 * 64 * 192 * 2  # bf16, a tensor each
    assert plan.rewritten_bytes == experts
    with pytest.raises(
        RequestError, match=r"layer by layer needs [\d.]+ MB and [\d.]+ \wB may be used; raise the limit"
    ):
        plan_run(source, "cpu", 1e6)


def test_the_more_memory_the_larger_the_batches(monkeypatch):
    source = ExpertSource(shipped_model())
    small = source.files.dense_bytes
    monkeypatch.setattr(source.files, "dense_bytes", lambda key: 100 * small(key))
    plans = [plan_run(source, "cpu", limit) for limit in (5e8, 8e8)]
    assert all(plan.offload and 0.9 * plan.available_bytes < plan.peak_bytes < plan.available_bytes for plan in plans)
    assert 1 < plans[0].windows < plans[1].windows


def test_without_accelerate_it_is_named(source, monkeypatch):
    monkeypatch.setattr(offload, "find_spec", lambda name: None)
    assert not plan_run(source, "cpu").offload
    with pytest.raises(RequestError, match=r"install accelerate \(pip install \"globe-moe\[fit\]\"\)"):
        plan_run(source, "cpu", LIMIT)


def test_from_disk_a_text_says_the_same(source, text, tmp_path):
    expected, said = calibrate(source, text), []
    snapshots = Snapshots(tmp_path, {})
    stale = tmp_path / ".snapshot" / "offload-killed"
    stale.mkdir(parents=True)
    found = calibrate(source, text, memory_limit=LIMIT, snapshots=snapshots, say=said.append)
    assert [path.name for path in (tmp_path / ".snapshot").iterdir()] == ["calibration-0-0.safetensors"]
    assert len(said) == 1 and "may be used; its layers are read from" in said[0]
    assert found.facts == expected.facts
    for layer, sums in expected.sums.items():  # in bf16, which batches of other sizes round differently
        assert_close(found.sums[layer].moment, sums.moment, rms=1e-2, peak=2e-2)
        for family, rows in sums.rows.items():
            assert_close(found.sums[layer].rows[family], rows, rms=2e-2, peak=5e-2)


def test_a_disk_that_is_full_is_refused_before(source, text, tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "_free", lambda target: 1000)
    with pytest.raises(GlobeError, match="needs 8.85 MB and 1.00 kB are free"):
        calibrate(source, text, memory_limit=LIMIT)


# A model for text and images, layers of two widths of a head with a tied head, a model whose part runs over text.
@pytest.mark.parametrize("model_type", ["qwen3_5_moe", "gemma4", "qwen3_omni_moe"])
def test_nested_models_run_over_text_in_memory_and_from_disk(model_type, tmp_path):
    tiny_model(model_type).save_pretrained(tmp_path / "model")
    source = ExpertSource(tmp_path / "model")
    over_a_text, writing = plan_run(source, "cpu"), plan_run(source, "cpu", writes=True)
    assert not over_a_text.offload and over_a_text.in_memory_bytes < writing.in_memory_bytes
    windows = torch.randint(1, 120, (2, 32), generator=torch.Generator().manual_seed(0))
    whole = load_model(source.model_dir)
    assert sample_windows(whole, 4, "cpu", count=2).shape == (2, 4)
    assert 1 < evaluate({"model": whole}, windows)["model"].perplexity < 1000
    from_disk = load_model(source.model_dir, offload_folder=tmp_path)
    first = next(iter(routed_experts(from_disk).values()))
    assert first.module.down_proj.is_meta and first.module.gate_up_proj.is_meta
    expected, found = (collect(model, source, windows.split(1), "cpu") for model in (whole, from_disk))
    assert expected.keys() == found.keys() == set(source.base.num_experts)
    for layer, sums in expected.items():
        assert_close(found[layer].moment, sums.moment, rms=1e-5, peak=1e-5)
        for family, rows in sums.rows.items():
            assert_close(found[layer].rows[family], rows, rms=1e-5, peak=1e-5)


def test_a_model_that_predicts_no_tokens_writes_no_text(tmp_path):
    model = tiny_model("openai_privacy_filter")
    for refused in (
        lambda: sample_windows(model, 4, "cpu", count=2),
        lambda: evaluate({"model": model}, torch.ones(1, 4).long()),
    ):
        with pytest.raises(RequestError, match="ForTokenClassification predicts no next token, so it neither writes"):
            refused()
    model.save_pretrained(tmp_path)
    assert collect(model, ExpertSource(tmp_path), [torch.ones(1, 4).long()], "cpu")[0].moment.any()
