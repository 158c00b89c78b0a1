"""A calibrated fit: the sums over the inputs, the metric that the fit minimises, and a fit that survives a kill."""

import pytest
import torch

from globe_fit import ExpertSource, FitConfig, VarProConfig, fit
from globe_fit.calibration import metric as calibration
from globe_fit.calibration.metric import Calibration, calibrate, identity, metric_root, row_weights
from globe_fit.calibration.moments import Sums
from globe_fit.cli.demo import shipped_model
from globe_fit.data.model import load_model, token_windows
from globe_fit.fitting import open_snapshots
from globe_fit.result import reconstruct
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
    assert_close(calibrated.sums[3].moment, x.mT @ x / len(x), rms=2e-2, peak=4e-2)
    assert sorted(calibrated.sums) == list(range(6))


def test_the_root_is_that_of_the_shrunk_moment():
    x = torch.randn(20, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moment = x.mT @ x
    root = metric_root(moment.float()).double()
    assert_close(root @ root.mT, moment / moment.diagonal().mean() + 0.1 * torch.eye(6), rms=1e-6, peak=1e-6)
    assert torch.equal(root, root.tril())
    assert_close(metric_root(torch.zeros(6, 6)), 0.1**0.5 * torch.eye(6), rms=1e-6, peak=1e-6)


def test_the_weights_of_rows_are_relative_to_their_layer():
    sensitivities = torch.tensor([[1.0, 4.0], [0.0, 3.0]])  # mean 2
    expected = torch.tensor([[0.5**0.5, 2**0.5], [0.0, 1.5**0.5]]) + 0.1
    assert_close(row_weights(sensitivities), expected, rms=1e-6, peak=1e-6)
    assert_close(row_weights(1e-12 * sensitivities), expected, rms=1e-6, peak=1e-6)
    assert torch.equal(row_weights(torch.zeros(2, 2)), torch.ones(2, 2))  # a text that reaches no expert


def planted_metric(source, rows=None) -> Calibration:
    """Inputs that hardly leave three directions, others in each layer; sensitivities `rows` (P,) of every expert."""
    sums = {}
    for layer in source.layers:
        generator = torch.Generator().manual_seed(layer.layer)
        x = torch.randn(200, 3, generator=generator) @ torch.randn(3, 12, generator=generator)
        every = torch.ones(5) if rows is None else rows
        of_experts = every.expand(layer.num_experts, -1)
        sums[layer.layer] = Sums(x.mT @ x / len(x), {"gate": of_experts, "up": of_experts})
    return Calibration("planted", "0", 200, sums)


def errors_in_metric(source, result, family: str, metric: Calibration) -> torch.Tensor:
    """(P,) share that each row loses of the energy of all, in the metric."""
    lost, energy = torch.zeros(source.base.intermediate_size), 0.0
    factors = result.families[family]
    for layer, span in source.layer_spans:
        sums = metric.sums[layer.layer]
        root, weight = metric_root(sums.moment), row_weights(sums.rows[family])[..., None]
        weights = source.read(layer, family)
        residual = weights - reconstruct(factors.at(span), factors.bank, result.config.phi)
        lost += (weight * (residual @ root).square()).sum((0, 2))
        energy += (weight * (weights @ root).square()).sum().item()
    return lost / energy


def test_a_calibrated_fit_is_better_where_the_inputs_are(noise):
    metric = planted_metric(noise)
    free, calibrated = fit(noise, CONFIG), fit(noise, CONFIG, calibration=metric)
    for family in ("gate", "up"):
        report = calibrated.report["families"][family]
        assert free.report["families"][family]["calibrated_error"] is None
        expected = errors_in_metric(noise, calibrated, family, metric).sum().item()
        assert report["calibrated_error"] == pytest.approx(expected, rel=2e-2)
        assert expected < 0.5 * errors_in_metric(noise, free, family, metric).sum().item()
        assert report["relative_error"] > free.report["families"][family]["relative_error"]
    assert calibrated.config.provenance["calibration"] == {"text": "planted", "sha256": "0", "tokens": 200}


def test_rows_that_matter_are_fitted_better(noise):
    """Two of five rows move the output; the others get the least weight there is."""
    matter = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0])
    rows, none = planted_metric(noise, matter), planted_metric(noise)
    by_inputs, by_rows = fit(noise, CONFIG, calibration=none), fit(noise, CONFIG, calibration=rows)
    for family in ("gate", "up"):
        report = by_rows.report["families"][family]
        with_rows, without = (errors_in_metric(noise, result, family, rows) for result in (by_rows, by_inputs))
        assert report["calibrated_error"] == pytest.approx(with_rows.sum().item(), rel=2e-2)
        assert with_rows.sum() < 0.9 * without.sum()
        assert with_rows[:2].sum() < 0.7 * without[:2].sum()
        assert with_rows[2:].sum() > without[2:].sum()
        # of the raw weights, every row alike
        factors, lost, energy = by_rows.families[family], 0.0, 0.0
        for layer, span in noise.layer_spans:
            weights = noise.read(layer, family)
            lost += (weights - reconstruct(factors.at(span), factors.bank, "identity")).square().sum().item()
            energy += weights.square().sum().item()
        assert report["relative_error"] == pytest.approx(lost / energy, rel=1e-3)  # the runtime rounds bases to bf16


def test_a_metric_without_directions_changes_nothing(noise):
    rows = {layer.layer: torch.full((layer.num_experts, 5), 3.0) for layer in noise.layers}
    sums = {layer: Sums(7.0 * torch.eye(12), {"gate": same, "up": same}) for layer, same in rows.items()}
    flat = Calibration("flat", "0", 1, sums)
    free, calibrated = fit(noise, CONFIG), fit(noise, CONFIG, calibration=flat)
    for family in ("gate", "up"):
        report = calibrated.report["families"][family]
        assert report["relative_error"] == pytest.approx(free.report["families"][family]["relative_error"], rel=1e-2)
        assert report["calibrated_error"] == pytest.approx(report["relative_error"], rel=1e-5)


def test_the_text_is_read_once(text, calibrated, tmp_path, monkeypatch):
    source, config = ExpertSource(shipped_model()), FitConfig(varpro=VarProConfig(steps=2))
    monkeypatch.setattr(calibration, "_run", lambda *_: calibrated.sums)
    first = calibrate(source, text, snapshots=open_snapshots(tmp_path, source, config, calibrated_on=identity(text)))
    monkeypatch.setattr(calibration, "_run", lambda *_: pytest.fail("the model ran again"))
    second = calibrate(source, text, snapshots=open_snapshots(tmp_path, source, config, calibrated_on=identity(text)))
    assert second.facts == first.facts
    for layer in range(6):
        assert torch.equal(second.sums[layer].moment, first.sums[layer].moment)
        for family in ("gate", "up"):
            assert torch.equal(second.sums[layer].rows[family], first.sums[layer].rows[family])
            assert torch.equal(second.metrics("cpu")[family].row_scales, first.metrics("cpu")[family].row_scales)
    with pytest.raises(RequestError, match="calibration was [0-9a-f]+ and is None"):
        open_snapshots(tmp_path, source, config)


def test_inputs_that_are_not_finite_are_named(text, calibrated, monkeypatch):
    whole = calibrated.sums[4]
    spoiled = Sums(whole.moment, {**whole.rows, "up": whole.rows["up"] * torch.nan})
    monkeypatch.setattr(calibration, "_run", lambda *_: {**calibrated.sums, 4: spoiled})
    with pytest.raises(GlobeError, match="The inputs of the experts of layer 4 are not finite on"):
        calibrate(ExpertSource(shipped_model()), text)


def test_only_varpro_fits_to_a_text(noise):
    with pytest.raises(RequestError, match="solver is alternating and a text to calibrate on is given"):
        fit(noise, FitConfig(rank=4, atoms=5, support=2, solver="alternating"), calibration=planted_metric(noise))


def test_an_interrupted_calibrated_fit_goes_on_bitwise(text, calibrated, tmp_path):
    source, config = ExpertSource(shipped_model()), FitConfig(varpro=VarProConfig(steps=6, warmup_steps=2))
    expected = fit(source, config, calibration=calibrated)

    def stop_late(record):
        if record["family"] == "up" and record["step"] == 4:
            raise RuntimeError("stopped")

    def run(on_step=None):
        snapshots = open_snapshots(tmp_path, source, config, 0, identity(text))
        metric = calibrate(source, text, snapshots=snapshots)
        return fit(source, config, on_step=on_step, snapshots=snapshots, calibration=metric)

    with pytest.raises(RuntimeError, match="stopped"):
        run(stop_late)
    result = run()
    for family in ("gate", "up"):
        assert torch.equal(result.families[family].adapter, expected.families[family].adapter)
        assert torch.equal(result.families[family].bank, expected.families[family].bank)
        assert result.report["families"][family] == expected.report["families"][family]
