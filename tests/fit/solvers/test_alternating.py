import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from globe_fit import ExpertSource, fit
from globe_fit.cli.demo import shipped_model
from globe_fit.config import AlternatingConfig, CodingConfig, EntmaxConfig, FitConfig
from globe_fit.data.stream import FamilyWeights
from globe_fit.fitting import open_snapshots
from globe_fit.run.metrics import METRICS
from globe_fit.solvers import coding
from globe_fit.solvers.alternating import Alternating
from globe_fit.solvers.base import BankState, code_index
from globe_fit.solvers.objective import eliminated_error
from globe_fit.solvers.start import allowed_atoms, grouped_svd, initial_codes, separate_svd
from globe_fit.solvers.support import largest_support
from globe_kernels.errors import RequestError
from globe_kernels.format.checkpoint import GlobeConfig
from globe_kernels.testing import assert_close
from tests.fit.conftest import MemorySource

MODES = {
    "exact": AlternatingConfig(),
    "atoms": AlternatingConfig(dictionary="atoms"),
    "mod": AlternatingConfig(dictionary="mod"),
    "simplex": AlternatingConfig(coding=CodingConfig(initial="simplex")),
    "entmax": AlternatingConfig(coding=CodingConfig(method="entmax")),
    "sparsemax, mod": AlternatingConfig(
        dictionary="mod",
        coding=CodingConfig(method="entmax", initial="given", l1=1e-3, prune=1e-3),
        entmax=EntmaxConfig(alpha=2.0),
    ),
    "omp": AlternatingConfig(coding=CodingConfig(method="omp", initial="given")),
    "literal": AlternatingConfig(
        dictionary="mod", targets="svd", coding=CodingConfig(method="omp", initial="given"), support_at=1.0
    ),
}


def changed(config: AlternatingConfig, **settings) -> AlternatingConfig:
    return AlternatingConfig(**{**vars(config), **settings})


def solver_of(source, config: AlternatingConfig, atoms=4, rank=3, support=2, scope="global", palette=None):
    weights = FamilyWeights.measure(source, "gate", "cpu")
    sizes = GlobeConfig(source.base, rank=rank, num_atoms=atoms, support=support, scope=scope, palette=palette)
    if config.targets == "svd":
        start = separate_svd(weights, sizes)
    else:
        start = BankState(
            grouped_svd(weights, sizes), initial_codes(sizes, torch.Generator().manual_seed(0)), "identity"
        )
    return Alternating(weights, start, sizes, config)


@pytest.mark.parametrize("mode", MODES)
def test_without_the_package_entmax_it_is_named(noise, monkeypatch, mode):
    monkeypatch.setattr(coding, "find_spec", lambda name: None)
    if mode in ("simplex", "entmax", "sparsemax, mod"):
        with pytest.raises(RequestError, match=r"need the package entmax; install it \(pip install \"globe-moe\[fit\]"):
            solver_of(noise, MODES[mode])
    else:
        monkeypatch.setitem(sys.modules, "entmax", None)
        run(solver_of(noise, changed(MODES[mode], steps=2)), 2)


def run(solver: Alternating, rounds: int) -> list[float]:
    errors = [solver.evaluate()]
    for _ in range(rounds):
        solver.update()
        errors.append(solver.evaluate())
    return errors


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_ends_with_its_support(noise, mode):
    solver = solver_of(noise, changed(MODES[mode], steps=12), palette=3)
    errors = run(solver, 12)
    assert max(errors) < 1 and (mode in ("mod", "sparsemax, mod", "literal") or errors[-1] < errors[0])
    used = solver.state.codes != 0
    assert int(used.sum(1).max()) <= 2
    assert max(int(used[layer].any(0).sum()) for layer in (slice(0, 6), slice(6, 10))) <= 3
    assert solver.extras.keys() <= METRICS.keys()


@pytest.mark.parametrize("mode", MODES)
def test_scope_layer_keeps_every_code_inside_its_layer(noise, mode):
    solver = solver_of(noise, changed(MODES[mode], steps=8), atoms=5, scope="layer")
    run(solver, 8)
    assert not (solver.state.codes[~allowed_atoms(noise.base, 5, "layer")] != 0).any()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stop", [1, 5, 9], ids=["at first", "before the support", "after it"])
def test_a_restored_solver_goes_on_bitwise(noise, mode, stop):
    config = changed(MODES[mode], steps=12, support_at=0.5)
    straight = solver_of(noise, config, palette=3)
    expected = run(straight, 12)
    first, other = solver_of(noise, config, palette=3), solver_of(noise, config, palette=3)
    run(first, stop - 1)
    first.update()
    other.restore({name: tensor.clone() for name, tensor in first.tensors().items()})
    assert run(other, 12 - stop) == expected[stop:]
    for one, two in ((other.state.bank, straight.state.bank), (other.state.codes, straight.state.codes)):
        assert torch.equal(one, two)
    assert other.extras == straight.extras and other.finished == straight.finished


def test_a_planted_bank_is_a_fixed_point(planted):
    sizes = GlobeConfig(planted.source.base, rank=6, num_atoms=5, support=2)
    start = BankState(planted.bank.clone(), planted.codes.clone(), "identity")
    config = AlternatingConfig(steps=5, coding=CodingConfig(initial="given"))
    assert max(run(Alternating(planted.family(), start, sizes, config), 5)) < 1e-3


def test_a_start_that_is_given_keeps_its_codes(planted):
    """Negative ones, which coding.initial = "nnls" cannot find."""
    start = dict.fromkeys(("gate", "up"), BankState(planted.bank.clone(), -planted.codes, "identity"))
    alternating = AlternatingConfig(steps=2)
    assert alternating.coding.initial == "nnls"
    config = FitConfig(rank=6, atoms=5, support=2, solver="alternating", alternating=alternating, device="cpu")
    errors: list[float] = []
    fit(planted.source, config, start=start, on_step=lambda record: errors.append(record["relative_error"]))
    assert len(errors) == 6 and max(errors) < 1e-3


def test_the_support_is_fixed_once(noise):
    solver, supports = solver_of(noise, AlternatingConfig(steps=10, support_at=0.5), atoms=6), []
    for _ in range(10):
        solver.evaluate()
        supports.append(solver.state.codes != 0)
        solver.update()
    for support in supports[5:]:
        assert torch.equal(support, supports[5])


FLAWS = ["expert of zeros", "equal experts", "expert of rank 1", "zero column"]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), flaws=st.sets(st.sampled_from(FLAWS)), rank=st.integers(1, 5))
def test_codes_and_bank_never_raise_the_objective(seed, flaws, rank):
    weights = torch.randn(7, 5, 9, generator=torch.Generator().manual_seed(seed))
    if "expert of zeros" in flaws:
        weights[0] = 0
    if "equal experts" in flaws:
        weights[1] = weights[2]
    if "expert of rank 1" in flaws:
        weights[3] = weights[3, :, :1] * weights[3, :1]
    if "zero column" in flaws:
        weights[:, :, 0] = 0
    config = AlternatingConfig(steps=100, support_at=0.02, coding=CodingConfig(initial="given"))
    solver = solver_of(MemorySource({0: weights[:4], 1: weights[4:]}), config, rank=rank)
    run(solver, 2)  # from here on the support is fixed
    before = solver.evaluate()
    for _ in range(3):
        with torch.no_grad():
            for seen in solver._metric_passes():
                solver._code_in_the_metric(seen)
        coded = eliminated_error(solver._weights, solver.state, code_index(solver.state.codes != 0), 1e-6)
        assert coded <= before + 1e-5
        solver.update()
        before, previous = solver.evaluate(), coded
        assert before <= previous + 1e-5


def test_aligned_targets_do_not_depend_on_the_coordinates_of_an_expert(noise):
    """A rotation of an expert's rows is one of its adapters: targets, and so codes, must not see it."""
    first = solver_of(noise, AlternatingConfig())
    before = torch.cat([targets for _, targets in first._target_passes()])
    rotation = torch.linalg.qr(torch.randn(10, 5, 5, generator=torch.Generator().manual_seed(3)))[0]
    start = first.state
    # about the mean, which the normalisation takes away and a rotation does not keep
    statistics = first._weights.statistics
    for layer, span in noise.layer_spans:
        centred = noise.weights[layer.layer] - statistics.mean
        noise.weights[layer.layer] = rotation[span] @ centred + statistics.mean
    second = Alternating(first._weights, start, first._sizes, AlternatingConfig())
    after = torch.cat([targets for _, targets in second._target_passes()])
    assert_close(after, before, rms=1e-4, peak=1e-3)


@pytest.mark.parametrize("atoms_at_first", [2, 34], ids=["from 2", "from all"])
def test_the_temperature_brings_the_median_support_to_its_target(atoms_at_first):
    """Half of the shipped model, 60 experts of 64 x 192, with the default settings: 12 +- 1, and it stays there."""
    shipped = ExpertSource(shipped_model())
    source = MemorySource({layer.layer: shipped.read(layer, "gate") for layer in shipped.layers[:3]})
    weights = FamilyWeights.measure(source, "gate", "cpu")
    sizes = GlobeConfig(source.base, rank=24, num_atoms=34, support=12)
    codes = initial_codes(sizes, torch.Generator().manual_seed(0)).abs()
    codes *= largest_support(codes, atoms_at_first)
    config = AlternatingConfig(
        steps=45, support_at=1.0, cg_steps=1, coding=CodingConfig(method="entmax", initial="given")
    )
    solver = Alternating(weights, BankState(grouped_svd(weights, sizes), codes, "identity"), sizes, config)
    medians = []
    for _ in range(44):
        solver.evaluate()
        medians.append((solver.state.codes != 0).sum(1).median().item())
        solver.update()
    assert medians[0] == atoms_at_first
    assert all(abs(median - 12) <= 1 for median in medians[-15:]), medians


@pytest.mark.parametrize(("dictionary", "steps"), [("exact", 3), ("mod", 1)], ids=["a Gram matrix", "an SVD"])
def test_a_singular_state_ends_the_fit_with_the_best_one(noise, dictionary, steps):
    """Entmax scores that overflow: codes, and so bases, are NaN in the middle of a round."""
    entmax = EntmaxConfig(lr=1e38, alpha=1.2, steps=steps)
    alternating = AlternatingConfig(
        steps=5, support_at=1.0, dictionary=dictionary, coding=CodingConfig("entmax"), entmax=entmax
    )
    config, records = FitConfig(rank=3, atoms=4, support=2, solver="alternating", alternating=alternating), []
    sizes = GlobeConfig(noise.base, rank=3, num_atoms=4, support=2)
    start = {f: separate_svd(FamilyWeights.measure(noise, f, "cpu"), sizes) for f in ("gate", "up")}
    result = fit(noise, config, start=start, on_step=records.append)
    assert not result.status.completed
    assert "gate and up diverged and its best state is kept; lower entmax.lr" in result.status.advice
    assert len(records) < 2 * 6
    best = min(record["relative_error"] for record in records if record["family"] == "gate")
    assert result.report["families"]["gate"]["relative_error"] == pytest.approx(best, rel=0.05)
    assert torch.isfinite(result.families["gate"].bank).all()


def test_a_plateau_ends_the_fit_and_every_record_has_the_metrics(save_tiny):
    source = ExpertSource(save_tiny("qwen3_moe"))
    records = []
    config = AlternatingConfig(steps=150, dictionary="mod", support_at=0.02, patience=2, coding=CodingConfig("entmax"))
    result = fit(
        source, FitConfig(ratio=0.8, support=4, solver="alternating", alternating=config), on_step=records.append
    )
    assert result.status.completed and result.report["families"]["gate"]["relative_error"] < 0.5
    assert len(records) < 2 * 151
    assert {"temperature", "dictionary_condition", "ridge_raised"} < records[-1].keys()
    ends = [record for record in result.history if record["family"] == "gate"]
    assert ends[-1]["step"] < 150 and ends[-1] in records


@pytest.mark.parametrize("mode", ["exact", "entmax", "literal"])
def test_an_interrupted_fit_goes_on_with_the_same_result(save_tiny, tmp_path, mode):
    source = ExpertSource(save_tiny("qwen3_moe"))
    alternating = changed(MODES[mode], steps=6, cg_steps=2)
    config = FitConfig(ratio=0.8, support=4, solver="alternating", alternating=alternating)
    expected = fit(source, config)

    def stop(record: dict) -> None:
        if record["family"] == "up" and record["step"] == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(source, config, on_step=stop, snapshots=open_snapshots(tmp_path, source, config, minutes=0))
    result = fit(source, config, snapshots=open_snapshots(tmp_path, source, config, minutes=0))
    for family in ("gate", "up"):
        assert torch.equal(result.families[family].bank, expected.families[family].bank)
        assert torch.equal(result.families[family].code.value, expected.families[family].code.value)
        assert result.report["families"][family] == expected.report["families"][family]
