import pytest
import torch

from globe_kernels.ops.compose_basis import _BLOCK, compose_basis_ref, launch_compose_basis
from globe_kernels.testing import assert_close
from tests.kernels.cases import DEVICE, KERNEL_DTYPES, needs_kernels

PHI = {"identity": lambda x: x, "silu": lambda x: x * torch.sigmoid(x), "tanh": torch.tanh}
LIMITS = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}


def random_case(dtype: torch.dtype = torch.float32, rank: int = 4, width: int = 10):
    generator = torch.Generator().manual_seed(0)
    index = torch.stack([torch.randperm(7, generator=generator)[:3] for _ in range(5)]).int()
    value = torch.randn(5, 3, generator=generator)
    bank = torch.randn(7, rank, width, generator=generator).to(dtype)
    return index.to(DEVICE), value.to(DEVICE), bank.to(DEVICE)


def expected(index, value, bank, phi) -> torch.Tensor:
    return PHI[phi](torch.einsum("ec,ecrd->erd", value.double(), bank.double()[index.long()]))


@pytest.mark.parametrize("phi", list(PHI))
@pytest.mark.parametrize("dtype", list(LIMITS), ids=str)
def test_the_reference_is_phi_of_the_mixture(phi, dtype):
    case = random_case(dtype)
    basis = compose_basis_ref(*case, phi, dtype)
    assert basis.dtype == dtype
    assert_close(basis, expected(*case, phi), rms=LIMITS[dtype], peak=LIMITS[dtype])


@needs_kernels
@pytest.mark.parametrize("phi", list(PHI))
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rank", "width"), [(4, 10), (2, _BLOCK // 2), (3, _BLOCK - 1)], ids=["small", "full", "ragged"]
)
def test_the_kernel_is_phi_of_the_mixture(phi, dtype, rank, width):
    case = random_case(dtype, rank, width)
    for out_dtype in (dtype, torch.float32):
        basis = launch_compose_basis(*case, phi, out_dtype)
        assert basis.dtype == out_dtype
        limit = LIMITS[out_dtype]
        assert_close(basis, expected(*case, phi), rms=limit, peak=limit)


@needs_kernels
def test_the_kernel_saturates_without_overflow():
    index, value, bank = random_case()
    for phi in ("tanh", "silu"):
        basis = launch_compose_basis(index, 1e4 * value, bank, phi, torch.float32)
        assert_close(basis, expected(index, 1e4 * value, bank, phi), rms=1e-5, peak=1e-5)


def test_unused_places_of_a_code_add_nothing():
    index, value, bank = random_case()
    value[:, 2], index[:, 2] = 0.0, 0
    shorter = compose_basis_ref(index[:, :2], value[:, :2], bank, "identity", torch.float32)
    assert_close(compose_basis_ref(index, value, bank, "identity", torch.float32), shorter, rms=1e-6, peak=1e-6)


@pytest.mark.parametrize("compose", [compose_basis_ref, pytest.param(launch_compose_basis, marks=needs_kernels)])
def test_accumulates_in_fp32(compose):
    # 64 terms of 1 + 2^-8 cannot be summed in bf16
    bank = torch.ones(64, 1, 1, dtype=torch.bfloat16, device=DEVICE)
    value = torch.full((1, 64), 1 + 2**-8, device=DEVICE)
    basis = compose(torch.arange(64, device=DEVICE).int()[None], value, bank, "identity", torch.float32)
    assert basis.item() == 64 * (1 + 2**-8)
