"""Registered ops: written lists are seen by compilers, and a gradient that does not exist is an error."""

import pytest
import torch

from globe_kernels.ops.registration import register_op


def run(x: torch.Tensor, totals: list[torch.Tensor], factors: list[torch.Tensor | None]) -> torch.Tensor:
    for total in totals:
        total += x.sum()
    return x * (1 if factors[0] is None else factors[0])


OP = register_op(
    "registered_in_a_test(Tensor x, Tensor(a!)[] totals, Tensor?[] factors) -> Tensor",
    run,
    lambda x, totals, factors: torch.empty_like(x),
)


def case(requires_grad: bool = False):
    return torch.arange(3.0, requires_grad=requires_grad), [torch.zeros(()), torch.ones(1)], [None, torch.ones(3)]


def test_opcheck():
    torch.library.opcheck(OP, case())


def test_a_compiled_call_writes_the_lists():
    x, totals, factors = case()
    out = torch.compile(lambda *args: OP(*args), fullgraph=True, backend="aot_eager")(x, totals, factors)
    assert torch.equal(out, x) and [total.item() for total in totals] == [3, 4]


@pytest.mark.parametrize("where", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_runs_in_every_mode_of_autograd(where):
    with where():
        x, totals, factors = case()
        assert torch.equal(OP(x, totals, factors), x) and totals[0] == 3


@pytest.mark.parametrize("where", ["argument", "list"])
def test_a_backward_is_an_error_and_no_silent_zero(where):
    x, totals, factors = case(requires_grad=where == "argument")
    if where == "list":
        factors[1].requires_grad_()
    out = OP(x, totals, factors)
    assert out.requires_grad and totals[0] == 3
    with pytest.raises(RuntimeError, match="globe::registered_in_a_test has no gradient"):
        (x + out).sum().backward()
    with torch.no_grad():
        assert not OP(x, totals, factors).requires_grad
