"""The work of a step, counted; and the fit of a large model on a card that is not here."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from globe_fit import ExpertSource, FitConfig
from globe_fit.data.stream import ErrorMetric, FamilyWeights
from globe_fit.plan import timing
from globe_fit.plan.fitting import estimate, step_bytes
from globe_fit.plan.serving import read_model
from globe_fit.plan.work import on_machine, step_seconds, step_work
from globe_fit.run.distributed import ALONE
from globe_fit.sizes import resolve_sizes
from globe_fit.solvers.base import BankState, code_index
from globe_fit.solvers.objective import eliminated_error
from globe_fit.solvers.start import initial_codes
from globe_kernels.strategies.cost import machine_named
from tests.conftest import TINY_FIT

CONFIG = Path(__file__).parents[1] / "configs" / "qwen3-30b-a3b.json"


@pytest.mark.parametrize("calibrated", [False, True])
def test_the_products_of_a_step_are_those_that_are_counted(save_tiny, calibrated):
    source = ExpertSource(save_tiny("qwen3_moe"))
    sizes = resolve_sizes(source.base, TINY_FIT)
    base = sizes.base
    metric = None
    if calibrated:
        roots = {layer: torch.eye(base.hidden_size) for layer in base.num_experts}
        metric = ErrorMetric(roots, torch.ones(base.total_experts, base.intermediate_size))
    weights = FamilyWeights.measure(source, "gate", "cpu", metric)
    codes = initial_codes(sizes, torch.Generator().manual_seed(0)).requires_grad_()
    state = BankState(torch.randn(sizes.bank_shape()).requires_grad_(), codes, sizes.phi)
    with FlopCounterMode(display=False) as counter:
        eliminated_error(weights, state, code_index(codes != 0), 1e-6)
    # the mixtures of a CPU are dense products with the atoms in use, here all: forward, and twice backward
    mixtures = 3 * 2 * base.total_experts * sizes.num_atoms * sizes.rank * base.hidden_size
    work = step_work(sizes, calibrated=calibrated)
    values = base.total_experts * base.intermediate_size * base.hidden_size
    products = sum(work[name].flops for name in work if name not in ("read", "mixture", "mixture gradient", "solve"))
    products -= work["optimiser"].flops + 5 * values  # elementwise
    solved = counter.get_total_flops() - mixtures - products
    assert 0 <= solved <= work["solve"].flops


@pytest.fixture(scope="module")
def large():
    """A plan of the default fit of Qwen3-30B-A3B, as far as `on_machine` reads it."""
    sizes = resolve_sizes(read_model(CONFIG).base, FitConfig())
    stored = sizes.base.dense_bytes // 2
    source = SimpleNamespace(stored_bytes=lambda family: stored)
    return SimpleNamespace(sizes=sizes, calibrated=True, ranks=ALONE, source=source, config=FitConfig())


def test_a_large_fit_on_a_card_that_is_not_here(large):
    found = on_machine(large, machine_named("h100"))
    assert found["fits"] and found["host_bytes"] < 16e9 and found["device_bytes"] - found["kept_bytes"] < 40e9
    assert found["kept_bytes"] == large.source.stored_bytes("gate")
    smaller = on_machine(large, replace(machine_named("h100"), memory_gb=48))
    assert smaller["fits"] and smaller["kept_bytes"] == 0
    assert smaller["device_bytes"] < estimate(large.sizes, calibrated=True).device_bytes, "kernels add in place"
    assert not on_machine(large, machine_named("rtx4090"))["fits"]
    alternating = replace(large.config, solver="alternating")
    assert on_machine(SimpleNamespace(**vars(large) | {"config": alternating}), machine_named("h100"))["work"] is None


def test_a_step_is_never_faster_than_a_stage_of_it(large):
    h100 = machine_named("h100")
    work = step_work(large.sizes)
    n, rank, inner, width = 6144, large.sizes.rank, 768, 2048
    assert work["gram"].flops == 2 * n * rank**2 * width and work["cross"].flops == 2 * n * inner * rank * width
    seconds = step_seconds(work, h100)
    assert seconds > work["gram"].flops / 67e12 + work["cross"].flops / 67e12
    assert seconds < step_seconds(step_work(large.sizes, calibrated=True), h100)
    halves = step_work(large.sizes, ranks=2)
    assert halves["gram"].flops == work["gram"].flops / 2 and halves["solve"].flops == work["solve"].flops


def test_the_timing_takes_the_block_that_has_room(save_tiny, monkeypatch):
    source = ExpertSource(save_tiny("qwen3_moe"))
    sizes = resolve_sizes(source.base, TINY_FIT)
    whole = timing.time_fit(source, sizes, TINY_FIT)
    assert whole is not None and whole.experts > 1 and whole.seconds > TINY_FIT.steps * whole.step_seconds > 0
    rooms = [2 * sum(step_bytes(timing._of_block(sizes, TINY_FIT, experts), experts)) for experts in (1, whole.experts)]
    monkeypatch.setattr(timing, "available_bytes", lambda device: rooms[1] - 2)
    less = timing.time_fit(source, sizes, TINY_FIT)
    assert less is not None and less.experts == whole.experts // 2
    monkeypatch.setattr(timing, "available_bytes", lambda device: rooms[0] - 2)
    assert timing.time_fit(source, sizes, TINY_FIT) is None
