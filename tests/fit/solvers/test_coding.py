import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from globe_fit.solvers.base import support_index
from globe_fit.solvers.coding import (
    entmax,
    entmax_scores,
    masked_least_squares,
    matching_pursuit,
    next_temperature,
    non_negative,
    on_simplex,
)
from globe_kernels.testing import assert_close


@settings(max_examples=60, deadline=None)
@given(
    alpha=st.sampled_from([1.1, 1.25, 1.5, 1.75, 2.0, 2.5]),
    atoms=st.integers(1, 200),
    size=st.sampled_from([1e-3, 1.0, 1e3, 1e8]),
    tied=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_entmax_meets_its_optimality_conditions(alpha, atoms, size, tied, seed):
    """Of max p^T z + H_alpha(p): (alpha - 1) z_j - p_j^(alpha - 1) is one tau on the support, at most tau off it."""
    scores = size * torch.randn(3, atoms, generator=torch.Generator().manual_seed(seed))
    if tied:
        scores[:, ::2] = scores[:, :1].clone()
    p = entmax(scores, alpha)
    assert p.dtype == torch.float32 and (p >= 0).all()
    assert_close(p.sum(1), torch.ones(3), rms=5e-6, peak=5e-6)  # many equal probabilities round alike
    x = (alpha - 1) * (scores - scores.amax(1, keepdim=True)).double()
    used = p > 0
    level = x - p.double().pow(alpha - 1)
    high = level.masked_fill(~used, -torch.inf).amax(1)
    low = level.masked_fill(~used, torch.inf).amin(1)
    assert (high - low).max() < 2e-4
    assert (x.masked_fill(used, -torch.inf).amax(1) <= high + 2e-4).all()


@pytest.mark.parametrize("alpha", [1.5, 2.0])
def test_sorting_and_bisection_agree(alpha):
    scores = torch.randn(5, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert_close(entmax(scores, alpha), entmax(scores, alpha + 1e-7), rms=1e-5, peak=1e-5)


@pytest.mark.parametrize("alpha", [1.3, 1.5, 2.0, 2.5])
def test_the_gradient_of_entmax(alpha):
    scores = torch.randn(4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: entmax(z, alpha), (scores,), eps=1e-7, atol=1e-4)


def test_excluded_atoms_get_nothing():
    scores = torch.tensor([[5.0, -torch.inf, 4.9, -torch.inf]])
    for alpha in (1.3, 1.5, 2.0):
        p = entmax(scores, alpha)
        assert p[0, 1] == p[0, 3] == 0 and p[0, 0] > p[0, 2] > 0


@pytest.mark.parametrize("alpha", [1.3, 1.5, 2.0])
def test_scores_of_codes_give_the_codes_and_an_order_of_the_rest(alpha):
    codes = torch.tensor([[0.6, 0.0, 1.4, 0.0]])
    scores = entmax_scores(codes, torch.tensor([[0.0, 2.0, 0.0, 1.0]]), alpha)
    assert_close(entmax(scores, alpha), codes / 2, rms=1e-5, peak=1e-5)
    assert scores[0, 1] < scores[0, 3] < 0


def problem(seed: int, dependent: bool, experts: int = 4, atoms: int = 7, size: int = 20):
    """(atoms (M, D), targets (E, D), Gram, cross, allowed) with, if asked, equal atoms and one of zeros."""
    generator = torch.Generator().manual_seed(seed)
    bank = torch.randn(atoms, size, generator=generator)
    if dependent:
        bank[1], bank[2] = bank[0], 0
    targets = torch.randn(experts, size, generator=generator)
    allowed = torch.rand(experts, atoms, generator=generator) < 0.8
    allowed[:, 0] = allowed[:, 3] = True
    return bank, targets, bank @ bank.mT, targets @ bank.mT, allowed


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), dependent=st.booleans(), l1=st.sampled_from([0.0, 0.5]))
def test_non_negative_least_squares_meets_its_optimality_conditions(seed, dependent, l1):
    _, _, gram, cross, allowed = problem(seed, dependent)
    codes, slack = non_negative(gram, cross, allowed, l1)
    gradient = (codes @ gram - cross + l1) * allowed
    assert (codes >= 0).all() and not (codes * ~allowed).any()
    assert gradient.min() > -1e-3 and (gradient * codes).abs().max() < 1e-3
    assert (slack >= 0).all() and not (slack * codes).any()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), dependent=st.booleans())
def test_least_squares_on_the_simplex_meets_its_optimality_conditions(seed, dependent):
    _, _, gram, cross, allowed = problem(seed, dependent)
    codes, slack = on_simplex(gram, cross, allowed)
    assert_close(codes.sum(1), torch.ones(4), rms=1e-6, peak=1e-6)
    assert (codes >= 0).all() and not (codes * ~allowed).any()
    gradient = codes @ gram - cross
    level = (gradient * codes).sum(1, keepdim=True)
    assert (gradient - level).masked_fill(~allowed, 0).min() > -2e-2
    assert ((gradient - level) * codes).abs().max() < 2e-2
    assert (slack >= 0).all() and not (slack * codes).any()


def test_pursuit_finds_a_planted_support():
    bank = torch.randn(20, 300, generator=torch.Generator().manual_seed(0))
    planted = torch.zeros(3, 20)
    planted[0, [2, 5]], planted[1, [0, 19]], planted[2, 7] = 1.5, -2.0, 1.0
    found = matching_pursuit(bank @ bank.mT, planted @ bank @ bank.mT, torch.ones(3, 20, dtype=torch.bool), 2)
    assert_close(found, planted, rms=1e-4, peak=1e-4)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), dependent=st.booleans(), support=st.integers(1, 4))
def test_pursuit_keeps_its_support_and_is_least_squares_on_it(seed, dependent, support):
    bank, targets, gram, cross, allowed = problem(seed, dependent)
    codes = matching_pursuit(gram, cross, allowed, support)
    used = codes != 0
    assert int(used.sum(1).max()) <= support and not (used & ~allowed).any()
    assert ((codes @ gram - cross) * used).abs().max() < 1e-2
    if support > 1:
        fewer = matching_pursuit(gram, cross, allowed, support - 1)
        lost, before = ((targets - kept @ bank).square().sum(1) for kept in (codes, fewer))
        assert (lost <= before + 1e-3).all()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), dependent=st.booleans())
def test_masked_least_squares_is_the_best_on_its_support_and_never_worse(seed, dependent):
    bank, targets, gram, cross, allowed = problem(seed, dependent)
    index, valid = support_index(allowed)
    before = allowed * torch.randn(allowed.shape, generator=torch.Generator().manual_seed(seed))
    of_support = gram[index[:, :, None], index[:, None, :]]
    codes, _ = masked_least_squares(of_support, cross.gather(1, index), before, index, valid)
    assert not (codes * ~allowed).any()
    for expert in range(len(targets)):
        atoms = bank[allowed[expert]].double()
        best = targets[expert].double() - targets[expert].double() @ torch.linalg.pinv(atoms) @ atoms
        lost = (targets[expert] - codes[expert] @ bank).square().sum()
        assert lost == pytest.approx(best.square().sum().item(), rel=1e-3, abs=1e-3)
        assert lost <= (targets[expert] - before[expert] @ bank).square().sum() + 1e-4


@pytest.mark.parametrize("support_at_start", [2, 34])
@pytest.mark.parametrize("eta", [0.02, 0.1])
def test_the_temperature_brings_the_support_to_its_target(support_at_start, eta):
    scores = torch.randn(120, 34, generator=torch.Generator().manual_seed(0))

    def median(temperature: float) -> float:
        return (entmax(scores / temperature, 1.5) > 0).sum(1).median().item()

    temperature = {2: 0.05, 34: 100.0}[support_at_start]
    assert abs(median(temperature) - support_at_start) <= 1
    supports = []
    for _ in range(round(20 / eta)):
        temperature = next_temperature(temperature, median(temperature), 12, eta)
        supports.append(median(temperature))
    assert all(abs(support - 12) <= 1 for support in supports[-20:])
