"""Metrics against values worked out by hand, and that measuring leaves a fit as it is."""

import math

import pytest
import torch

from globe_fit import ExpertSource, finish, fit, save_fit
from globe_fit import fitting as solver
from globe_fit.measure.diagnostics import (
    SAMPLED_EXPERTS,
    atom_gram,
    coherence,
    compare,
    condition,
    dense_codes,
    effective_rank,
    histogram,
    measure,
    palette_sizes,
    sampled_experts,
    sparsity,
    spectrum,
    support_overlap,
)
from globe_fit.run.metrics import METRICS
from globe_fit.solvers.base import BankState
from globe_fit.solvers.support import pack_codes
from globe_kernels.format.checkpoint import BaseModel
from tests.conftest import TINY_FIT

BASE = BaseModel("by hand", "qwen3_moe", 2, 2, {0: 2, 3: 2})
CODES = torch.tensor(
    [
        [1.0, 1.0, 0.0, 0.0],  # layer 0
        [0.0, 2.0, 0.0, 0.0],
        [3.0, -1.0, 0.001, 0.0],  # layer 3
        [-1.0, 0.0, 1.0, 0.0],
    ]
)


def test_sparsity_by_hand():
    found = sparsity(CODES, BASE)
    assert (found["support_min"], found["support_median"], found["support_max"]) == (1, 2, 3)
    assert found["support_mean"] == 2
    assert found["support_histogram"] == {"counts": [1, 2, 1], "edges": [0.5, 1.5, 2.5, 3.5]}
    assert (found["atom_use_min"], found["atom_use_median"], found["atom_use_max"]) == (0, 2, 3)  # 3, 3, 2, 0
    assert found["atom_use_histogram"]["counts"] == [1, 0, 1, 2]
    assert found["dead_atoms"] == 1
    assert found["small_codes"] == pytest.approx(1 / 8)
    parts = [3 / 4.001, 1 / 4.001, 0.001 / 4.001]
    third = -sum(part * math.log(part) for part in parts) / math.log(3)
    assert found["code_entropy"] == pytest.approx((1 + 0 + third + 1) / 4, rel=1e-6)
    assert palette_sizes(CODES, BASE) == {"0": 2, "3": 3}
    assert found["largest_palette"] == 3


def test_overlap_of_supports_by_hand():
    other = torch.tensor([[5.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1], [1, 0, 1, 1]])
    assert support_overlap(CODES, other) == pytest.approx((1 / 2 + 1 + 0 + 2 / 3) / 4)
    assert support_overlap(CODES, CODES) == 1


def test_stored_codes_are_the_dense_ones():
    assert torch.equal(dense_codes(pack_codes(CODES, 3), 4), CODES)


def test_atoms_by_hand(monkeypatch):
    bank = torch.tensor([[[3.0, 0], [0, 4]], [[0, 2], [0, 0]], [[3, 0], [0, 0]]])
    assert BankState(bank, torch.zeros(1, len(bank)), "identity").atom_norms().tolist() == [5, 2, 3]
    gram = torch.tensor([[25.0, 0, 9], [0, 4, 0], [9, 0, 9]], dtype=torch.float64)
    assert torch.equal(atom_gram(bank), gram)
    monkeypatch.setattr("globe_fit.measure.diagnostics._CHUNK_BYTES", 12)  # one column at a time
    assert torch.equal(atom_gram(bank), gram)
    found = coherence(gram)
    assert found["coherence_max"] == pytest.approx(9 / 15) and found["coherence_mean"] == pytest.approx(9 / 45)
    assert sum(found["coherence_histogram"]["counts"]) == 3
    assert coherence(gram[:1, :1]) == {}


def test_spectra_by_hand():
    tall = torch.tensor([[0.0, 2.0], [4.0, 0.0], [0.0, 0.0]])
    assert spectrum(tall).tolist() == pytest.approx([4, 2])
    assert effective_rank(torch.tensor([4.0, 2.0])) == 2 and effective_rank(torch.tensor([10.0, 2.0])) == 1
    assert condition(torch.diag(torch.tensor([8.0, 2.0], dtype=torch.float64))) == pytest.approx(4)
    assert condition(torch.zeros(2, 2, dtype=torch.float64) + 1) == pytest.approx(2**52)
    assert histogram(torch.arange(100))["counts"] == 25 * [4]


def test_two_experts_are_compared():
    dense = torch.diag(torch.tensor([4.0, 3.0, 0.0]))[:2]
    same = compare(dense, 0.5 * dense)
    assert same["relative_error"] == pytest.approx(0.25)
    assert same["number"] == [1, 2]
    assert same["spectrum_dense"] == pytest.approx([4, 3]) and same["spectrum_stored"] == pytest.approx([2, 1.5])
    assert same["angles_degrees"] == pytest.approx([0, 0], abs=1e-5)
    turned = compare(dense, torch.tensor([[4.0, 0, 0], [0, 0, 3]]))
    assert turned["angles_degrees"] == pytest.approx([0, 90], abs=1e-5)


def test_a_planted_bank_holds_everything(planted):
    """Weights that the bank makes exactly: nothing of a sampled expert is outside its composed basis."""
    state = BankState(planted.bank.requires_grad_(), planted.codes, "identity")
    found = measure(planted.family(), state, expensive=True)
    assert found["energy_captured"] == pytest.approx(1, abs=1e-3)  # the mean is outside
    assert found["energy_at_rank"] == pytest.approx(1)
    assert found["effective_rank_fit"] == found["effective_rank_dense"]
    assert found["gram_condition"] > 1 and found["codes_condition"] > 1
    worse = BankState(torch.randn_like(planted.bank), planted.codes, "identity")
    assert measure(planted.family(), worse, expensive=True)["energy_captured"] < 0.9


def test_a_state_that_is_about_to_diverge_can_be_measured(planted):
    found = measure(planted.family(), BankState(1e30 * planted.bank, 1e30 * planted.codes, "tanh"), expensive=True)
    assert found["atom_norm_max"] is None and found["dead_atoms"] == 0


def test_the_sample_is_the_same_each_time():
    assert sampled_experts(100) == sampled_experts(100) and len(set(sampled_experts(100))) == SAMPLED_EXPERTS
    assert sampled_experts(2) == [0, 1]


def test_every_name_of_a_fit_is_in_the_table(fit_tiny):
    _, result = fit_tiny()
    emitted = {name for record in result.history for name in record}
    emitted |= {name for report in result.report["families"].values() for name in report}
    emitted |= set(result.report) - {"families", "status", "left_dense"}
    missing = {"peak_device_bytes"} if not torch.cuda.is_available() else set()
    of_the_other_solver = {"temperature", "dictionary_condition", "ridge_raised"}
    of_longer_fits = {"cycle_gain"}
    assert emitted == METRICS.keys() - missing - of_the_other_solver - of_longer_fits


def test_the_report_agrees_with_itself(fit_tiny):
    report = fit_tiny()[1].report
    gate, up = (report["families"][family] for family in ("gate", "up"))
    assert min(gate["relative_error"], up["relative_error"]) <= report["relative_error"]
    assert report["relative_error"] <= max(gate["relative_error"], up["relative_error"])
    assert 0 < report["support_overlap"] <= 1
    count = sum(fit_tiny()[1].config.base.num_experts.values()) * 48 * 64
    assert gate["mse"] == pytest.approx(gate["relative_error"] * gate["energy"] / count)
    for check in gate["spot_checks"]:
        assert check["relative_error"] == pytest.approx(gate["relative_error"], rel=0.5)
        assert len(check["number"]) == len(check["spectrum_dense"]) == len(check["spectrum_stored"])


def test_measuring_changes_nothing(save_tiny, fit_tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(solver, "_LOG_EVERY", 10**9)
    for module, name in ((solver, "measure"), (solver, "run_time"), (finish, "measure")):
        monkeypatch.setattr(module, name, lambda *args, **kwargs: {})
    monkeypatch.setattr(finish, "spot_checks", lambda *args: [])
    source = ExpertSource(save_tiny("qwen3_moe"))
    save_fit(fit(source, TINY_FIT), source, tmp_path)
    first, second = ((path / "globe.safetensors").read_bytes() for path in (fit_tiny()[0], tmp_path))
    assert first == second
