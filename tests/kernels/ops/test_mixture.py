import pytest
import torch

from globe_kernels.ops import mixture as op
from globe_kernels.ops.mixture import launch_mixture_backward, mixture, mixture_ref
from globe_kernels.testing import assert_close
from tests.kernels.cases import DEVICE, needs_kernels

RUNS = [pytest.param(mixture_ref, id="reference"), pytest.param(mixture, id="kernel", marks=needs_kernels)]


@pytest.fixture(autouse=True)
def kernels_everywhere(monkeypatch):
    """`mixture` runs its kernels in the interpreter, where there is no GPU."""
    monkeypatch.setattr(op, "use_triton", lambda _: True)


def random_case(experts: int = 5, entries: int = 3, atoms: int = 7, rank: int = 4, width: int = 10):
    generator = torch.Generator().manual_seed(0)
    index = torch.stack([torch.randperm(atoms, generator=generator)[:entries] for _ in range(experts)]).int()
    value = torch.randn(experts, entries, generator=generator)
    bank = torch.randn(atoms, rank, width, generator=generator)
    gradient = torch.randn(experts, rank, width, generator=generator)
    return tuple(tensor.to(DEVICE) for tensor in (index, value, bank, gradient))


def compare(run, index, value, bank, gradient) -> None:
    """With autograd in float64; the gradient of the bank is added to what is there."""
    exact_value, exact_bank = value.double().requires_grad_(), bank.double().requires_grad_()
    exact = torch.einsum("ec,ecrd->erd", exact_value, exact_bank[index.long()])
    exact.backward(gradient.double())
    before = torch.randn_like(bank)
    bank_gradient = before.clone()
    found, backward = run(index, value, bank)
    value_gradient = backward(gradient, bank_gradient)
    assert exact_value.grad is not None and exact_bank.grad is not None
    assert_close(found, exact.detach(), rms=1e-6, peak=1e-6)
    assert_close(value_gradient, exact_value.grad, rms=1e-6, peak=1e-6)
    assert_close(bank_gradient - before, exact_bank.grad, rms=1e-6, peak=1e-6)
    assert torch.equal(backward(gradient, None), value_gradient)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"rank": 2, "width": op._BLOCK // 2},
        {"rank": 3, "width": op._BLOCK - 1},
        {"experts": 1, "entries": 1},
        {"experts": 2, "entries": 2, "atoms": 40},
    ],
    ids=["small", "full", "ragged", "an entry each", "most atoms unused"],
)
def test_is_that_of_autograd(run, sizes):
    compare(run, *random_case(**sizes))


@pytest.mark.parametrize("run", RUNS)
def test_an_atom_twice_in_an_expert_counts_twice(run):
    index, value, bank, gradient = random_case()
    index[1] = index[1, 0]
    index[3, 2] = index[3, 0]
    compare(run, index, value, bank, gradient)


@pytest.mark.parametrize("run", RUNS)
def test_unused_entries_cost_nothing(run):
    """They hold atom 0 and value 0: no other gradient changes, and atom 0 gets none where it has no other value."""
    index, value, bank, gradient = random_case(atoms=40)
    index[index == 0] = 39
    padded_index = torch.nn.functional.pad(index, (0, 2))
    padded_value = torch.nn.functional.pad(value, (0, 2))
    shorter, backward = run(index, value, bank)
    expected_bank = torch.zeros_like(bank)
    expected = backward(gradient, expected_bank)
    found, padded_backward = run(padded_index, padded_value, bank)
    bank_gradient = torch.zeros_like(bank)
    value_gradient = padded_backward(gradient, bank_gradient)
    assert_close(found, shorter, rms=1e-6, peak=1e-6)
    assert_close(value_gradient[:, :3], expected, rms=1e-6, peak=1e-6)
    assert_close(bank_gradient, expected_bank, rms=1e-6, peak=1e-6)
    assert not value_gradient[:, 3:].any() and not bank_gradient[0].any()


@pytest.mark.parametrize("run", RUNS)
def test_a_value_of_zero_has_a_gradient_where_others_use_its_atom(run):
    index, value, bank, gradient = random_case()
    value[2, 1] = 0.0
    assert (value[index == index[2, 1]] != 0).any()
    compare(run, index, value, bank, gradient)


@needs_kernels
def test_the_kernel_gives_the_same_bits_twice():
    index, value, bank, gradient = random_case(experts=9)
    first, second = (torch.zeros_like(bank) for _ in range(2))
    once, twice = (launch_mixture_backward(index, value, bank, gradient, into) for into in (first, second))
    assert torch.equal(first, second) and torch.equal(once, twice) and first.any()
