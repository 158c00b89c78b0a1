"""The prediction of a fit's seconds: each solver counts its passes, and a block tells how long each takes."""

import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from globe_fit import ExpertSource, FitConfig, VarProConfig, fit
from globe_fit.cli.demo import shipped_model
from globe_fit.config import AlternatingConfig, CodingConfig
from globe_fit.data.stream import FamilyWeights
from globe_fit.plan.timing import time_fit
from globe_fit.sizes import resolve_sizes
from globe_fit.solvers.base import BankState
from globe_fit.solvers.registry import make_solver
from globe_fit.solvers.start import initial_codes
from tests.conftest import TINY_FIT


def alternating(**settings) -> FitConfig:
    return replace(TINY_FIT, solver="alternating", alternating=AlternatingConfig(patience=99, **settings))


CONFIGS = {
    "varpro": replace(TINY_FIT, varpro=VarProConfig(steps=5)),
    "varpro, never free": replace(TINY_FIT, varpro=VarProConfig(steps=3, warmup_steps=0)),
    "exact": alternating(steps=4, support_at=0.5, cg_steps=3),
    "always free": alternating(steps=3, support_at=1.0),
    "no steps": alternating(steps=0),
    "codes as given": alternating(steps=3, coding=CodingConfig(initial="given")),
    "mod": alternating(steps=4, support_at=0.3, dictionary="mod"),
    "mod, svd": alternating(steps=3, dictionary="mod", targets="svd", coding=CodingConfig(initial="given")),
    "omp": alternating(steps=4, support_at=0.5, coding=CodingConfig(method="omp")),
    "entmax": alternating(steps=4, support_at=0.5, coding=CodingConfig(method="entmax")),
    "simplex": alternating(steps=2, coding=CodingConfig(initial="simplex")),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_solver_counts_the_passes_that_it_takes(save_tiny, monkeypatch, config):
    source = ExpertSource(save_tiny("qwen3_moe"))
    sizes, weights = resolve_sizes(source.base, config), FamilyWeights.measure(source, "gate", "cpu")
    codes = initial_codes(sizes, torch.Generator().manual_seed(0))
    bank = torch.randn(sizes.bank_shape(), generator=torch.Generator().manual_seed(0))
    state = BankState(bank, codes, sizes.phi)

    expected, block = 0, next(weights.normalised())
    for kind in make_solver(weights, state.copy(), sizes, config).passes():
        expected += kind.count
        kind.visit(block)

    taken = 0
    normalised = FamilyWeights.normalised

    def counted(self, *arguments):
        nonlocal taken
        taken += 1
        return normalised(self, *arguments)

    monkeypatch.setattr(FamilyWeights, "normalised", counted)
    solver = make_solver(weights, state, sizes, config)
    for _ in range(config.steps):
        solver.evaluate()
        solver.update()
    assert torch.isfinite(torch.tensor(solver.evaluate()))
    assert taken == expected


STEPS = {
    "varpro": FitConfig(varpro=VarProConfig(steps=12)),
    "exact": FitConfig(solver="alternating", alternating=AlternatingConfig(steps=3)),
    "entmax": FitConfig(
        solver="alternating",
        alternating=AlternatingConfig(steps=3, support_at=0.6, coding=CodingConfig(method="entmax")),
    ),
    "mod": FitConfig(solver="alternating", alternating=AlternatingConfig(steps=4, dictionary="mod")),
    "atoms": FitConfig(solver="alternating", alternating=AlternatingConfig(steps=1, dictionary="atoms")),
}


@pytest.mark.parametrize("config", STEPS.values(), ids=STEPS)
def test_the_prediction_is_within_a_factor_of_two(monkeypatch, config):
    """By the processor time of this process, which other processes hardly change; of three trials the best."""
    source, config = ExpertSource(shipped_model()), replace(config, device="cpu")
    sizes = resolve_sizes(source.base, config)
    monkeypatch.setattr("globe_fit.plan.timing.time", SimpleNamespace(perf_counter=time.process_time))
    ratios = []
    for _ in range(3):
        predicted, began = time_fit(source, sizes, config), time.process_time()
        assert predicted is not None
        fit(source, config)
        ratios.append(predicted.seconds / (time.process_time() - began))
        if 0.5 < ratios[-1] < 2:
            return
    raise AssertionError(f"predicted / taken: {ratios}")
