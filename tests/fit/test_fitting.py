import json
import re
from dataclasses import replace

import pytest
import torch

from globe_fit import ExpertSource, FitConfig, VarProConfig, fit, save_fit
from globe_fit.fitting import _Run
from globe_fit.result import reconstruct
from globe_fit.run.metrics import METRICS, check_names
from globe_fit.solvers.base import BankState
from globe_fit.solvers.varpro import VarPro
from globe_kernels.errors import GlobeError
from globe_kernels.format.checkpoint import GlobeCheckpoint, GlobeConfig
from tests.conftest import TINY_FIT


@pytest.fixture
def source(save_tiny) -> ExpertSource:
    return ExpertSource(save_tiny("qwen3_moe"))


def test_reported_errors_are_those_of_the_saved_factors(source, fit_tiny):
    path, result = fit_tiny("qwen3_moe")
    checkpoint = GlobeCheckpoint(path, verify=True)
    for family in ("gate", "up"):
        bank, lost, energy = checkpoint.bank(family), 0.0, 0.0
        for layer in source.layers:
            weights = source.read(layer, family)
            residual = weights - reconstruct(checkpoint.layer(layer.layer, family), bank, checkpoint.config.phi)
            assert residual.square().sum() / weights.square().sum() == pytest.approx(
                result.report["families"][family]["relative_error_by_layer"][str(layer.layer)], rel=2e-3
            )
            lost += residual.square().sum().item()
            energy += weights.square().sum().item()
        assert result.report["families"][family]["relative_error"] == pytest.approx(lost / energy, rel=2e-3)
        assert 0 < lost / energy < 0.5


def test_what_is_stored_honours_the_request(fit_tiny):
    path, result = fit_tiny("qwen3_moe")
    checkpoint = GlobeCheckpoint(path)
    assert checkpoint.config == result.config
    assert checkpoint.config.support == TINY_FIT.support
    assert checkpoint.config.tensor_bytes <= TINY_FIT.ratio * checkpoint.config.base.dense_bytes
    assert checkpoint.config.provenance["fit"]["varpro"]["steps"] == TINY_FIT.varpro.steps
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert lines == result.history
    assert {line["family"] for line in lines} == {"gate", "up"}


def test_one_seed_twice_writes_the_same_bytes(source, fit_tiny, tmp_path):
    save_fit(fit(source, TINY_FIT), source, tmp_path)
    first, second = ((path / "globe.safetensors").read_bytes() for path in (fit_tiny("qwen3_moe")[0], tmp_path))
    assert first == second


def test_another_seed_gives_another_fit(source, fit_tiny):
    other = fit(source, replace(TINY_FIT, seed=1))
    assert not torch.equal(other.families["gate"].bank, fit_tiny("qwen3_moe")[1].families["gate"].bank)


@pytest.mark.parametrize("config", [replace(TINY_FIT, phi="tanh"), replace(TINY_FIT, phi="silu")], ids=["tanh", "silu"])
def test_every_phi_fits(source, config):
    result = fit(source, config)
    for family in ("gate", "up"):
        assert result.report["families"][family]["relative_error"] < 0.5
    assert result.config.phi == config.phi


def test_scope_layer(source):
    result = fit(source, FitConfig(rank=48, atoms=15, support=4, scope="layer", varpro=VarProConfig(steps=2)))
    used = [set(result.families["gate"].at(span).code.index.flatten().tolist()) for _, span in source.layer_spans]
    assert not used[0] & used[1] and not used[1] & used[2]


def test_a_fit_reports_its_steps(source):
    records = []
    fit(source, TINY_FIT, on_step=records.append)
    assert [record["step"] for record in records] == 2 * list(range(TINY_FIT.varpro.steps + 1))
    for record in records:
        assert set(record) <= set(METRICS)


def test_a_metric_without_a_definition_is_refused():
    with pytest.raises(KeyError, match="'loss' is not in"):
        check_names({"step": 1, "loss": 2.0})


def test_the_best_state_is_kept(planted):
    """From a fixed point, a step size that is far too large only makes things worse."""
    start = BankState(planted.bank, planted.codes, "identity").copy()
    config = FitConfig(support=2, varpro=VarProConfig(steps=8, lr=5.0, warmup_steps=0))
    sizes = GlobeConfig(planted.source.base, rank=6, num_atoms=5, support=2)
    run = _Run(planted.family(), VarPro(planted.family(), start, sizes, config.varpro), config, torch.float32)
    assert run.to_the_end(None, None)
    assert run.history[-1]["relative_error"] > run.history[0]["relative_error"]
    assert run.best is not None and torch.equal(run.best.bank, planted.bank)


def test_a_start_can_be_given(source):
    config = replace(TINY_FIT, varpro=VarProConfig(steps=0))
    sizes = fit(source, config).config
    bank = torch.randn(sizes.bank_shape(), generator=torch.Generator().manual_seed(0))
    codes = torch.zeros(sizes.base.total_experts, sizes.num_atoms)
    codes[:, 2] = 1.0
    result = fit(source, config, start=dict.fromkeys(("gate", "up"), BankState(bank, codes, "identity")))
    assert torch.equal(result.families["gate"].bank, bank.bfloat16())
    assert result.families["up"].code.index[:, 0].unique().tolist() == [2]


def test_the_refit_folds_the_normalisation(noise, monkeypatch):
    """Weights of another scale and mean: the stored factors stand for the raw ones, the mean as far as it goes."""
    for layer in noise.weights:
        noise.weights[layer] = 100 * noise.weights[layer] + 20
    result = fit(noise, FitConfig(rank=5, atoms=10, support=2, varpro=VarProConfig(steps=0)))
    report, factors = result.report["families"]["up"], result.families["up"]
    residuals = [
        noise.weights[layer.layer] - reconstruct(factors.at(span), factors.bank, "identity")
        for layer, span in noise.layer_spans
    ]
    everything = torch.cat(list(noise.weights.values()))
    assert report["mean"] == pytest.approx(everything.mean().item(), rel=1e-5)
    assert report["scale"] == pytest.approx(everything.std(correction=0).item(), rel=1e-5)
    assert report["relative_error"] < 0.1
    left = (torch.cat(residuals).double().mean() / everything.mean()).square().item()
    assert report["mean_energy_left"] == pytest.approx(left, rel=0.2, abs=1e-6)


def test_a_fit_that_diverges_keeps_the_best_state_or_says_so(source):
    wild = replace(TINY_FIT, varpro=VarProConfig(steps=12, lr=1e30, warmup_steps=0))
    result = fit(source, wild)
    assert not result.status.completed and "diverged and its best state is kept; lower the lr" in result.status.advice
    assert result.report["families"]["gate"]["relative_error"] < 1
    with pytest.raises(GlobeError, match="diverged at step .* before its support was fixed; lower the lr"):
        fit(source, replace(wild, varpro=replace(wild.varpro, warmup_steps=20)))


def test_a_layer_of_zeros_fits_exactly(noise):
    noise.weights[3].zero_()
    report = fit(noise, FitConfig(rank=3, atoms=4, support=2, varpro=VarProConfig(steps=3))).report
    assert report["families"]["gate"]["relative_error_by_layer"]["3"] == 0
    assert 0 < report["families"]["gate"]["relative_error"] < 1


def test_the_advice_follows_the_run(source):
    assert "No step was taken" in fit(source, replace(TINY_FIT, varpro=VarProConfig(steps=0))).status.advice

    def ends(**settings) -> tuple[str, str]:
        status = fit(source, replace(TINY_FIT, varpro=VarProConfig(**settings))).status
        return status.level, status.advice

    level, advice = ends(steps=4)
    assert level == "unsettled" and "took 4 steps and 1500 are the default" in advice
    level, advice = ends(steps=6, first_cycle=2)
    assert level == "unsettled" and re.search(
        r"The last cycle of steps lowered the error by \d+\.\d %: more steps", advice
    )
    level, advice = ends(steps=6, first_cycle=2, plateau=1.0)
    assert level == "settled" and "The error has settled: the last cycle of steps lowered it by" in advice
