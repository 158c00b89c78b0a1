import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from globe_fit.codes import largest_support, pack_codes


def test_keeps_the_atoms_that_contribute_most():
    codes = torch.tensor([[0.1, -3.0, 1.0], [2.0, 0.0, 1.0]])
    norms = torch.tensor([100.0, 1.0, 2.0])
    assert largest_support(codes, norms, 1).tolist() == [[True, False, False], [True, False, False]]
    assert largest_support(codes, norms, 2).tolist() == [[True, True, False], [True, False, True]]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 8), st.integers(1, 8), st.integers(0, 100))
def test_packing_loses_nothing(experts, atoms, support, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randn(experts, atoms, generator=generator)
    codes *= largest_support(codes, torch.ones(atoms), support)
    codes[0] = 0  # an expert may end without atoms
    support = max(support, 1)
    code = pack_codes(codes, support)
    assert code.index.dtype == torch.int32 and code.value.dtype == torch.float32
    unpacked = torch.zeros_like(codes).scatter_add_(1, code.index.long(), code.value)
    assert torch.equal(unpacked, codes)
    assert (code.index[code.value == 0] == 0).all()


def test_more_codes_than_the_support_are_a_bug():
    with pytest.raises(AssertionError, match="not pruned"):
        pack_codes(torch.ones(1, 3), 2)
