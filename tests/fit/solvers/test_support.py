import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from globe_fit.solvers.support import largest_support, layer_palettes, pack_codes
from globe_kernels.format.checkpoint import BaseModel


def test_keeps_the_atoms_that_contribute_most():
    weight = torch.tensor([[10.0, 3.0, 2.0], [2.0, 0.0, 3.0]])
    assert largest_support(weight, 1).tolist() == [[True, False, False], [False, False, True]]
    assert largest_support(weight, 2).tolist() == [[True, True, False], [True, False, True]]
    assert largest_support(weight, 9).all()


def test_a_palette_is_chosen_by_layer():
    base = BaseModel("two layers", "qwen3_moe", 8, 4, {0: 2, 5: 3})
    weight = torch.zeros(5, 4)
    weight[:2] = torch.tensor([[0.0, 1.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.3]])
    weight[2:, 0], weight[4, 2] = 0.1, 0.5
    palettes = layer_palettes(weight, base, 2)
    assert palettes[:2].tolist() == [[False, True, False, True]] * 2
    assert palettes[2:].tolist() == [[True, False, True, False]] * 3


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 8), st.integers(1, 8), st.integers(0, 100))
def test_packing_loses_nothing(experts, atoms, support, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randn(experts, atoms, generator=generator)
    codes *= largest_support(codes.abs(), support)
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
