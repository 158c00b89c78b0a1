import pytest
import torch

from globe_kernels.ops.compose_basis import compose_basis_ref
from globe_kernels.testing import assert_close

PHI = {"identity": lambda x: x, "silu": lambda x: x * torch.sigmoid(x), "tanh": torch.tanh}


def random_case(dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(0)
    index = torch.stack([torch.randperm(7, generator=generator)[:3] for _ in range(5)]).int()
    value = torch.randn(5, 3, generator=generator)
    bank = torch.randn(7, 4, 10, generator=generator).to(dtype)
    return index, value, bank


@pytest.mark.parametrize("phi", list(PHI))
@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3), (torch.float16, 5e-4)], ids=str
)
def test_is_phi_of_the_mixture(phi, dtype, limit):
    index, value, bank = random_case(dtype)
    expected = PHI[phi](torch.einsum("ec,ecrd->erd", value.double(), bank.double()[index.long()]))
    basis = compose_basis_ref(index, value, bank, phi)
    assert basis.dtype == dtype
    assert_close(basis, expected, rms=limit, peak=limit)


def test_unused_places_of_a_code_add_nothing():
    index, value, bank = random_case()
    value[:, 2], index[:, 2] = 0.0, 0
    shorter = compose_basis_ref(index[:, :2], value[:, :2], bank, "identity")
    assert_close(compose_basis_ref(index, value, bank, "identity"), shorter, rms=1e-6, peak=1e-6)


def test_accumulates_in_fp32():
    # 64 terms of 1 + 2^-8 cannot be summed in bf16
    bank = torch.ones(64, 1, 1, dtype=torch.bfloat16)
    value = torch.full((1, 64), 1 + 2**-8)
    basis = compose_basis_ref(torch.arange(64).int()[None], value, bank, "identity", torch.float32)
    assert basis.item() == 64 * (1 + 2**-8)
