"""A calibrated fit: the moments are those of the inputs, the metric is what is minimised, and it survives a kill."""

import pytest
import torch

from globe_fit import ExpertSource, FitConfig, VarProConfig, calibration, fit
from globe_fit.calibration import Calibration, calibrate, metric_root
from globe_fit.demo import shipped_model
from globe_fit.evaluate import load_model, token_windows
from globe_fit.factors import reconstruct
from globe_fit.solver import open_snapshots
from globe_kernels.errors import GlobeError, RequestError
from globe_kernels.testing import assert_close

CONFIG = FitConfig(rank=4, atoms=5, support=2, varpro=VarProConfig(steps=40, warmup_steps=5))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text((shipped_model() / "heldout.txt").read_text(encoding="utf-8")[:9000], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def calibrated(text) -> Calibration:
    return calibrate(ExpertSource(shipped_model()), text)


def test_the_moments_are_those_of_the_inputs_of_the_experts(text, calibrated):
    model = load_model(shipped_model(), dtype=torch.float32)
    windows = token_windows(shipped_model(), text)
    seen: list[torch.Tensor] = []
    experts = model.get_submodule("model.layers.3.mlp.experts")
    hook = experts.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().double()))
    with torch.no_grad():
        for window in windows:
            model(window[None])
    hook.remove()
    x = torch.cat(seen)
    assert len(x) == windows.numel() == calibrated.tokens
    # the model runs in bf16
    assert_close(calibrated.moments[3], x.mT @ x / len(x), rms=2e-2, peak=4e-2)
    assert sorted(calibrated.moments) == list(range(6))


def test_the_root_is_that_of_the_shrunk_moment():
    x = torch.randn(20, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moment = x.mT @ x
    root = metric_root(moment.float()).double()
    assert_close(root @ root.mT, moment / moment.diagonal().mean() + 0.1 * torch.eye(6), rms=1e-6, peak=1e-6)
    assert torch.equal(root, root.tril())
    assert_close(metric_root(torch.zeros(6, 6)), 0.1**0.5 * torch.eye(6), rms=1e-6, peak=1e-6)


def planted_metric(source) -> Calibration:
    """Inputs that hardly leave three directions, others in each layer."""
    moments = {}
    for layer in source.layers:
        generator = torch.Generator().manual_seed(layer.layer)
        x = torch.randn(200, 3, generator=generator) @ torch.randn(3, 12, generator=generator)
        moments[layer.layer] = x.mT @ x / len(x)
    return Calibration("planted", "0", 200, moments)


def error_in_metric(source, result, family: str, roots) -> float:
    lost = energy = 0.0
    for layer, places in source.blocks:
        weights = source.read(layer, family)
        factors = result.families[family]
        residual = weights - reconstruct(factors.at(places), factors.bank, result.config.phi)
        lost += (residual @ roots[layer.layer]).square().sum().item()
        energy += (weights @ roots[layer.layer]).square().sum().item()
    return lost / energy


def test_a_calibrated_fit_is_better_where_the_inputs_are(noise):
    metric = planted_metric(noise)
    free, calibrated = fit(noise, CONFIG), fit(noise, CONFIG, calibration=metric)
    for family in ("gate", "up"):
        report = calibrated.report["families"][family]
        assert free.report["families"][family]["calibrated_error"] is None
        own = error_in_metric(noise, calibrated, family, metric.roots())
        assert report["calibrated_error"] == pytest.approx(own, rel=2e-2)
        assert own < 0.5 * error_in_metric(noise, free, family, metric.roots())
        assert report["relative_error"] > free.report["families"][family]["relative_error"]
    assert calibrated.config.provenance["calibration"] == {"text": "planted", "sha256": "0", "tokens": 200}


def test_a_metric_without_directions_changes_nothing(noise):
    moments = {layer.layer: 7.0 * torch.eye(12) for layer in noise.layers}
    free, calibrated = fit(noise, CONFIG), fit(noise, CONFIG, calibration=Calibration("flat", "0", 1, moments))
    for family in ("gate", "up"):
        report = calibrated.report["families"][family]
        assert report["relative_error"] == pytest.approx(free.report["families"][family]["relative_error"], rel=1e-2)
        assert report["calibrated_error"] == pytest.approx(report["relative_error"], rel=1e-5)


def test_the_text_is_read_once(text, calibrated, tmp_path, monkeypatch):
    source, config = ExpertSource(shipped_model()), FitConfig(varpro=VarProConfig(steps=2))
    monkeypatch.setattr(calibration, "_second_moments", lambda *_: calibrated.moments)
    first = calibrate(source, text, snapshots=open_snapshots(tmp_path, source, config, text=text))
    monkeypatch.setattr(calibration, "_second_moments", lambda *_: pytest.fail("the model ran again"))
    second = calibrate(source, text, snapshots=open_snapshots(tmp_path, source, config, text=text))
    assert second.facts == first.facts
    assert all(torch.equal(second.moments[layer], first.moments[layer]) for layer in range(6))
    with pytest.raises(RequestError, match="calibration was [0-9a-f]+ and is None"):
        open_snapshots(tmp_path, source, config)


def test_inputs_that_are_not_finite_are_named(text, calibrated, monkeypatch):
    broken = {**calibrated.moments, 4: calibrated.moments[4] * torch.nan}
    monkeypatch.setattr(calibration, "_second_moments", lambda *_: broken)
    with pytest.raises(GlobeError, match="The inputs of the experts of layer 4 are not finite on"):
        calibrate(ExpertSource(shipped_model()), text)


def test_only_varpro_fits_to_a_text(noise):
    with pytest.raises(RequestError, match="solver is alternating and a text to calibrate on is given"):
        fit(noise, FitConfig(rank=4, atoms=5, support=2, solver="alternating"), calibration=planted_metric(noise))
