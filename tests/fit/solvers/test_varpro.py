import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from globe_fit.config import VarProConfig
from globe_fit.data.stream import FamilyWeights
from globe_fit.solvers.base import BankState, code_index
from globe_fit.solvers.objective import eliminated_error
from globe_fit.solvers.start import allowed_atoms, group_of_experts, grouped_svd, initial_codes
from globe_fit.solvers.varpro import VarPro, cycles
from globe_kernels.format.checkpoint import GlobeConfig
from globe_kernels.ops import mixture
from globe_kernels.testing import assert_close
from tests.kernels.cases import needs_kernels


def start_of(source, atoms: int = 4, rank: int = 3, phi: str = "identity", scope: str = "global") -> BankState:
    config = GlobeConfig(source.base, rank=rank, num_atoms=atoms, support=2, phi=phi, scope=scope)
    weights = FamilyWeights.measure(source, "gate", "cpu")
    return BankState(grouped_svd(weights, config), initial_codes(config, torch.Generator().manual_seed(0)), phi)


def solver_of(
    source, start: BankState, support: int = 2, scope: str = "global", palette: int | None = None, **settings
):
    weights = FamilyWeights.measure(source, "gate", "cpu")
    atoms, rank, _ = start.bank.shape
    sizes = GlobeConfig(
        source.base, rank=rank, num_atoms=atoms, support=support, phi=start.phi, scope=scope, palette=palette
    )
    return VarPro(weights, start.copy(), sizes, VarProConfig(**settings))


def run(source, start: BankState, steps: int, **settings):
    """(errors, last state) of a whole run."""
    solver = solver_of(source, start, steps=steps, **settings)
    errors = [solver.evaluate()]
    for _ in range(steps):
        solver.update()
        errors.append(solver.evaluate())
    return errors, solver.state.copy()


@pytest.mark.parametrize("phi", ["identity", "silu", "tanh"])
def test_the_gradient_is_that_of_the_eliminated_objective(noise, phi):
    """Against central differences of min_A ||W - A Bhat||^2 in fp64, where nothing is held constant."""
    weights = FamilyWeights.measure(noise, "gate", "cpu")
    start = start_of(noise, phi=phi)
    state = BankState(start.bank.requires_grad_(), start.codes.requires_grad_(), phi)
    error = eliminated_error(weights, state, code_index(state.codes != 0), ridge=1e-7)
    experts = torch.cat([block.weights for block in weights.normalised()]).double()

    def eliminated(bank: torch.Tensor, codes: torch.Tensor) -> float:
        basis = BankState(bank, codes, phi).basis(slice(None))
        projected = experts @ torch.linalg.pinv(basis) @ basis
        return ((experts - projected).square().sum() / experts.square().sum()).item()

    bank, codes = state.bank.detach().double(), state.codes.detach().double()
    assert abs(error - eliminated(bank, codes)) < 1e-5
    generator = torch.Generator().manual_seed(5)
    for place, gradient in enumerate((state.bank.grad, state.codes.grad)):
        direction = torch.randn(gradient.shape, generator=generator, dtype=torch.float64)
        step = 1e-5
        ends = []
        for sign in (1, -1):
            moved = [bank, codes]
            moved[place] = moved[place] + sign * step * direction
            ends.append(eliminated(*moved))
        slope = (ends[0] - ends[1]) / (2 * step)
        assert math.isclose((gradient.double() * direction).sum().item(), slope, rel_tol=2e-3, abs_tol=1e-7)


def test_zero_steps_return_the_start_with_its_support(noise):
    start = start_of(noise)
    errors, state = run(noise, start, steps=0)
    assert len(errors) == 1
    assert_close(state.bank, start.bank, rms=1e-6, peak=1e-6)
    kept = state.codes != 0
    assert kept.sum(1).tolist() == [2] * 10
    ratio = torch.where(kept, state.codes / start.codes, torch.nan)
    assert_close(ratio.nanmean(1, keepdim=True).expand(-1, 4)[kept], ratio[kept], rms=1e-5, peak=1e-5)  # rescaled


def test_a_planted_bank_is_a_fixed_point(planted):
    errors, state = run(planted.source, BankState(planted.bank, planted.codes, "identity"), steps=10, lr=1e-3)
    assert max(errors) < 1e-3  # what is left is the mean, which lies outside the planted row spaces
    assert torch.equal(state.codes != 0, planted.codes != 0)


def test_finds_a_planted_structure_better_than_any_start(planted):
    start = start_of(planted.source, atoms=5, rank=6)
    errors, _ = run(planted.source, start, steps=150, warmup_steps=10)
    assert errors[-1] < 0.4 * errors[0]


@pytest.mark.parametrize("phi", ["identity", "silu", "tanh"])
def test_lowers_the_error(noise, phi):
    errors, state = run(noise, start_of(noise, phi=phi), steps=60, warmup_steps=5)
    assert errors[-1] < 0.8 * errors[0]
    assert int((state.codes != 0).sum(1).max()) <= 2


def test_one_seed_twice_is_bitwise_equal(noise):
    first, second = (run(noise, start_of(noise), steps=20)[1] for _ in range(2))
    assert torch.equal(first.bank, second.bank) and torch.equal(first.codes, second.codes)


def test_permuting_the_experts_of_a_layer_permutes_the_codes(noise):
    order = torch.tensor([3, 0, 5, 1, 4, 2, 6, 7, 8, 9])
    start = start_of(noise)
    errors, state = run(noise, start, steps=15)
    noise.weights[0] = noise.weights[0][order[:6]]
    moved = BankState(start.bank, start.codes[order], "identity")
    permuted_errors, permuted = run(noise, moved, steps=15)
    assert permuted_errors == pytest.approx(errors, rel=1e-4)
    assert_close(permuted.codes, state.codes[order], rms=1e-2, peak=2e-2)


def test_scope_layer_keeps_every_code_inside_its_layer(noise):
    start = start_of(noise, atoms=5, scope="layer")
    _, state = run(noise, start, scope="layer", steps=20)
    assert not (state.codes[~allowed_atoms(noise.base, 5, "layer")] != 0).any()


def test_the_support_is_fixed_once(noise):
    solver, supports = solver_of(noise, start_of(noise), steps=60, first_cycle=20), []
    for _ in range(60):
        solver.evaluate()
        supports.append(solver.state.codes.detach() != 0)
        solver.update()
    assert int(supports[3].sum(1).min()) == 4, "dense in the first warm-up"
    for support in supports[4:]:
        assert torch.equal(support, supports[4])
    assert int(supports[4].sum(1).max()) == 2


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (0, [0]),
        (5, [5]),
        (100, [100]),
        (299, [299]),
        (300, [100, 200]),
        (699, [100, 599]),
        (1500, [100, 200, 400, 800]),
    ],
)
def test_a_cycle_is_twice_as_long_as_the_cycle_before(steps, expected):
    assert cycles(steps, 100) == expected and sum(expected) == steps


def test_the_fit_ends_when_a_cycle_gains_less_than_the_plateau(noise):
    """This start comes to its end in some hundred steps; a plateau of 0 lets the fit take all its steps."""
    start, ends = start_of(noise), {}
    for plateau in (0.0, 0.2):
        solver, taken = solver_of(noise, start, steps=630, first_cycle=10, plateau=plateau), 0
        errors = [solver.evaluate()]
        while taken < 630 and not solver.finished:
            solver.update()
            taken += 1
            errors.append(solver.evaluate())
        ends[plateau] = (taken, errors)
    assert ends[0.0][0] == 630
    taken, errors = ends[0.2]
    assert taken in (30, 70, 150, 310)
    gains = [1 - errors[end] / errors[before] for before, end in pairwise((10, 30, 70, 150, 310)) if end <= taken]
    assert gains[-1] < 0.2 and all(gain >= 0.2 for gain in gains[:-1])
    assert solver.extras["cycle_gain"] == pytest.approx(gains[-1])


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_steps_depend_neither_on_the_scale_of_the_bank_nor_on_the_scale_of_the_codes(noise, scale):
    start = start_of(noise)
    scaled = BankState(scale * start.bank, start.codes * torch.linspace(1, 100, 10)[:, None], "identity")
    errors, scaled_errors = (run(noise, state, steps=40, candidates=2)[0] for state in (start, scaled))
    assert scaled_errors[0] == pytest.approx(errors[0], rel=1e-4)
    assert scaled_errors[-1] == pytest.approx(errors[-1], rel=0.05) and errors[-1] < 0.9 * errors[0]


def test_steps_do_not_depend_on_the_number_of_weights(noise):
    """The gradient of an entry falls with the number of weights: here as if they were 1e12 times as many."""
    start, found = start_of(noise), []
    for factor in (1.0, 2.0**40):
        solver = solver_of(noise, start, steps=30)
        solver._weights = replace(solver._weights, normalised_energy=factor * solver._weights.normalised_energy)
        for _ in range(30):
            solver.evaluate()
            solver.update()
        found.append(solver.state)
    assert torch.equal(found[0].bank, found[1].bank) and not torch.equal(found[0].bank, start.bank)


def test_no_layer_uses_more_atoms_than_its_palette(noise):
    start = start_of(noise, atoms=6)
    free, limited = (run(noise, start, steps=20, palette=palette)[1].codes != 0 for palette in (None, 3))
    layers = (slice(0, 6), slice(6, 10))
    assert max(int(free[layer].any(0).sum()) for layer in layers) > 3
    for layer in layers:
        assert 2 <= int(limited[layer].any(0).sum()) <= 3
        assert limited[layer].sum(1).tolist() == [2] * (layer.stop - layer.start)


@pytest.mark.parametrize("more", [{"palette": 3}, {"candidates": 3}], ids=["palette", "candidates"])
@pytest.mark.parametrize(
    "stop", [1, 2, 10, 20, 25], ids=["at first", "at the support", "a cycle later", "at a rescaling", "late"]
)
def test_a_restored_solver_goes_on_bitwise(noise, stop, more):
    settings = {"steps": 30, "first_cycle": 10, **more}
    _, expected = run(noise, start_of(noise, atoms=6), **settings)
    solver = solver_of(noise, start_of(noise, atoms=6), **settings)
    for _ in range(stop):
        solver.evaluate()
        solver.update()
    saved = {name: tensor.clone() for name, tensor in solver.tensors().items()}
    other = solver_of(noise, BankState(saved["bank"], saved["codes"], "identity"), **settings)
    other.restore(saved)
    for _ in range(stop, 30):
        other.evaluate()
        other.update()
    assert torch.equal(other.state.bank, expected.bank) and torch.equal(other.state.codes, expected.codes)


@needs_kernels
@pytest.mark.parametrize("phi", ["identity", "tanh"])
def test_the_kernels_take_the_steps_of_the_reference(noise, phi, monkeypatch):
    """In the interpreter; while the support is free and when it is fixed, with layers of their own atoms."""
    start = start_of(noise, atoms=5, phi=phi, scope="layer")
    settings = {"scope": "layer", "steps": 10}
    errors, expected = run(noise, start, **settings)
    monkeypatch.setattr(mixture, "use_triton", lambda _: True)
    found_errors, found = run(noise, start, **settings)
    assert found_errors == pytest.approx(errors, rel=1e-4) and errors[-1] < 0.95 * errors[0]
    # another order of a sum can round a moment the other way, by 1/256
    assert_close(found.bank, expected.bank, rms=3e-3, peak=1e-2)
    assert_close(found.codes, expected.codes, rms=3e-3, peak=1e-2)


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_an_expert_begins_with_its_candidates(noise, scope):
    start = start_of(noise, atoms=9, scope=scope)
    solver = solver_of(noise, start, scope=scope, steps=20, candidates=3)
    seen = solver.state.codes.detach() != 0
    assert seen.sum(1).tolist() == [3] * 10 and torch.equal(solver.state.codes[seen], start.codes[seen])
    assert not (seen & ~allowed_atoms(noise.base, 9, scope)).any()
    assert seen[torch.arange(10), group_of_experts(noise.base, 9, scope)].all()
    assert seen.any(0).sum() > 5, "not the same for all"
    for _ in range(20):
        solver.evaluate()
        assert not (solver.state.codes[~seen] != 0).any()
        solver.update()
    assert (solver.state.codes != 0).sum(1).tolist() == [2] * 10


def test_with_a_palette_the_experts_of_a_layer_have_the_same_candidates(noise):
    solver = solver_of(noise, start_of(noise, atoms=9), palette=3, steps=20, candidates=5)
    seen = solver.state.codes.detach() != 0
    for layer in (slice(0, 6), slice(6, 10)):
        assert seen[layer].all(0).sum() == seen[layer].any(0).sum() == 5
    for _ in range(20):
        solver.evaluate()
        solver.update()
    used = solver.state.codes != 0
    assert used.sum(1).tolist() == [2] * 10 and max(int(used[:6].any(0).sum()), int(used[6:].any(0).sum())) <= 3


def test_as_many_candidates_as_atoms_change_nothing(noise):
    start = start_of(noise)
    default, every = (run(noise, start, steps=20, **more)[1] for more in ({}, {"candidates": 4}))
    assert torch.equal(default.bank, every.bank) and torch.equal(default.codes, every.codes)
