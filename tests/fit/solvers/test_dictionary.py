"""An exact step that raises the objective is a bug."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from globe_fit.data.stream import Block
from globe_fit.linalg import solve_adapters
from globe_fit.solvers.base import BankState
from globe_fit.solvers.dictionary import (
    RIDGE,
    OptimalDirections,
    atom_by_atom,
    exact_step,
    independent,
    normalise_atoms,
    project,
)
from globe_kernels.testing import assert_close

EXPERTS, INNER, RANK, WIDTH, ATOMS = 8, 5, 4, 10, 6


class Problem:
    """Random weights, bank and codes in two blocks; `flaws` make them rank-deficient."""

    def __init__(self, seed: int, flaws: frozenset[str] = frozenset()):
        generator = torch.Generator().manual_seed(seed)
        self.weights = torch.randn(EXPERTS, INNER, WIDTH, generator=generator)
        bank = torch.randn(ATOMS, RANK, WIDTH, generator=generator)
        codes = torch.randn(EXPERTS, ATOMS, generator=generator)
        codes *= torch.rand(EXPERTS, ATOMS, generator=generator) < 0.5
        codes[:, 0] += 1
        if "zero expert" in flaws:
            self.weights[0] = 0
        if "expert of rank 1" in flaws:
            self.weights[1] = self.weights[1, :, :1] * self.weights[1, :1]
        if "equal atoms" in flaws:
            bank[1] = bank[0]
        if "atom of zeros" in flaws:
            bank[2] = 0
        if "equal rows" in flaws:
            bank[:, 1] = bank[:, 0]
        if "unused atom" in flaws:
            codes[:, 3] = 0
        if "expert without atoms" in flaws:
            codes[2] = 0
        self.state = BankState(bank, codes, "identity")

    def blocks(self):
        for span in (slice(0, 5), slice(5, EXPERTS)):
            yield Block(None, range(0), span, self.weights[span])  # type: ignore[arg-type]

    def passes(self):
        return [project(block, self.state) for block in self.blocks()]

    def adapters(self) -> torch.Tensor:
        """As the passes have them: for a singular basis rounding decides, and that depends on the block."""
        solved = [solve_adapters(block.weights, self.state.basis(block.span), RIDGE) for block in self.blocks()]
        return torch.cat(solved)

    def error(self, adapters: torch.Tensor | None = None) -> float:
        """At the given adapters, or at the best ones, over the energy."""
        basis = self.state.basis(slice(None)).double()
        adapters = self.adapters() if adapters is None else adapters
        lost = (self.weights.double() - adapters.double() @ basis).square().sum()
        return (lost / self.weights.double().square().sum()).item()


FLAWS = ["zero expert", "expert of rank 1", "equal atoms", "atom of zeros", "equal rows", "unused atom"]
problems = st.builds(
    Problem, st.integers(0, 2**31), st.frozensets(st.sampled_from([*FLAWS, "expert without atoms"]), max_size=3)
)


@settings(max_examples=60, deadline=None)
@given(problem=problems, iterations=st.integers(1, 40))
def test_the_exact_step_never_raises_the_objective(problem, iterations):
    adapters, before = problem.adapters(), problem.error()
    exact_step(problem.state, problem.passes, iterations)
    assert torch.isfinite(problem.state.bank).all()
    assert problem.error(adapters) <= before + 1e-6
    assert problem.error() <= before + 1e-5


@settings(max_examples=40, deadline=None)
@given(problem=problems)
def test_atom_by_atom_never_raises_the_objective(problem):
    before = problem.error()
    atom_by_atom(problem.state, problem.passes)
    assert problem.error() <= before + 1e-5


@settings(max_examples=40, deadline=None)
@given(problem=problems, seed=st.integers(0, 2**31))
def test_adapters_never_raise_the_objective(problem, seed):
    other = torch.randn(EXPERTS, INNER, RANK, generator=torch.Generator().manual_seed(seed))
    for adapters in (other, torch.zeros_like(other)):
        assert problem.error() <= problem.error(adapters) + 1e-5


@settings(max_examples=40, deadline=None)
@given(problem=problems)
def test_optimal_directions_never_raise_the_error_of_their_targets(problem):
    targets = torch.randn(EXPERTS, RANK, WIDTH, generator=torch.Generator().manual_seed(0))
    before, codes = (targets - problem.state.basis(slice(None))).square().sum(), problem.state.codes
    unused = problem.state.bank[(codes == 0).all(0)].clone()
    directions = OptimalDirections(problem.state)
    for span in (slice(0, 5), slice(5, EXPERTS)):
        directions.add(span, targets[span])
    _, condition = directions.step()
    assert (targets - problem.state.basis(slice(None))).square().sum() <= before * (1 + 1e-5)
    assert condition >= 1
    assert torch.equal(problem.state.bank[(codes == 0).all(0)], unused)


def test_the_exact_step_solves_its_normal_equations():
    problem = Problem(0)
    adapters = problem.adapters().double()
    # vec(W_i) = sum_j (a_ij A_i kron I) vec(B_j)
    design = torch.einsum("nm,npr->npmr", problem.state.codes.double(), adapters).reshape(EXPERTS * INNER, -1)
    expected = torch.linalg.lstsq(design, problem.weights.double().flatten(0, 1)).solution.view(ATOMS, RANK, WIDTH)
    exact_step(problem.state, problem.passes, 200)
    assert_close(problem.state.bank, expected, rms=1e-2, peak=1e-2)


def test_atom_by_atom_at_fixed_adapters_comes_to_the_exact_step():
    exact, slow = Problem(0), Problem(0)
    adapters = exact.adapters()
    seen = exact.passes()
    exact_step(exact.state, lambda: seen, 200)
    for _ in range(300):
        atom_by_atom(slow.state, lambda: seen)
    assert slow.error(adapters) == pytest.approx(exact.error(adapters), rel=1e-3)


def test_optimal_directions_are_the_least_squares_solution():
    problem = Problem(1)
    targets = torch.randn(EXPERTS, RANK, WIDTH, generator=torch.Generator().manual_seed(0))
    directions = OptimalDirections(problem.state)
    directions.add(slice(0, EXPERTS), targets)
    raised, condition = directions.step()
    codes = problem.state.codes.double()
    expected = torch.linalg.lstsq(codes, targets.double().flatten(1)).solution.view(ATOMS, RANK, WIDTH)
    assert_close(problem.state.bank, expected, rms=1e-2, peak=1e-2)
    assert raised == 0 and condition == pytest.approx(torch.linalg.cond(codes.mT @ codes).item(), rel=1e-2)


def test_batches_hold_atoms_that_no_expert_uses_together():
    used = torch.rand(20, 15, generator=torch.Generator().manual_seed(0)) < 0.15
    used[:, 4] = False
    batches = independent(used)
    assert torch.stack(batches).sum(0).tolist() == [int(column.any()) for column in used.mT]
    assert len(batches) < 15
    for batch in batches:
        assert int((used & batch).sum(1).max()) == 1


def test_atoms_are_normalised_without_a_change_of_products():
    problem = Problem(3, frozenset({"atom of zeros"}))
    before = problem.state.basis(slice(None))
    factors = normalise_atoms(problem.state)
    assert_close(problem.state.basis(slice(None)), before, rms=1e-6, peak=1e-6)
    rms = problem.state.bank.flatten(1).square().mean(1).sqrt()
    assert_close(rms, torch.tensor([1.0, 1, 0, 1, 1, 1]), rms=1e-6, peak=1e-6)
    assert factors[2] == 1
