import pytest
import torch

from globe_kernels.ops import compose_layer as ops_compose_layer
from globe_kernels.ops.compose_layer import (
    CONFIGS,
    PALETTE_PADDING,
    ComposeConfig,
    ComposeShape,
    compose_bases,
    compose_family,
    compose_layer_ref,
    default_compose,
    launch_compose_layer,
    layer_code,
)
from globe_kernels.testing import assert_close
from tests.kernels.cases import DEVICE, KERNEL_DTYPES, needs_kernels

PHI = {"identity": lambda x: x, "silu": lambda x: x * torch.sigmoid(x), "tanh": torch.tanh}
# bf16 and fp16: half a unit in the last place of the result; the split of the codes must not show
LIMITS = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
SMALL = ComposeConfig(block_e=16, block_v=32, block_u=16, num_warps=4, num_stages=2)
SHAPES = {
    "smaller than a tile": (5, 3, 7, 4, 5),
    "full tiles": (32, 4, 32, 8, 8),
    "ragged in experts, atoms and values": (19, 3, 70, 5, 13),
    "one expert": (1, 2, 20, 4, 10),
    "one atom": (6, 1, 1, 4, 10),
}


def random_case(shape: str = "smaller than a tile", dtype: torch.dtype = torch.float32):
    experts, support, atoms, rank, width = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    # the bank holds atoms that the layer does not use
    index = torch.stack([torch.randperm(atoms, generator=generator)[:support] for _ in range(experts)]).int() * 2
    value = torch.randn(experts, support, generator=generator)
    bank = torch.randn(2 * atoms, rank, width, generator=generator).to(dtype)
    return index.to(DEVICE), value.to(DEVICE), bank.to(DEVICE)


def expected(index, value, bank, phi) -> torch.Tensor:
    return PHI[phi](torch.einsum("ec,ecrd->erd", value.double(), bank.double()[index.long()]))


def empty(code, bank, dtype) -> torch.Tensor:
    return torch.empty(len(code.value), *bank.shape[1:], dtype=dtype, device=DEVICE)


RUNNERS = [
    pytest.param(
        lambda code, bank, phi, dtype: compose_layer_ref(code, bank, phi, empty(code, bank, dtype)), id="reference"
    ),
    pytest.param(lambda code, bank, phi, dtype: compose_family(code, bank, phi, empty(code, bank, dtype)), id="family"),
    pytest.param(
        lambda code, bank, phi, dtype: launch_compose_layer(code, bank, phi, empty(code, bank, dtype), SMALL),
        id="kernel",
        marks=needs_kernels,
    ),
]


@pytest.mark.parametrize("run", RUNNERS)
@pytest.mark.parametrize("phi", list(PHI))
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("shape", list(SHAPES))
def test_parity(run, phi, dtype, shape):
    index, value, bank = random_case(shape, dtype)
    for out_dtype in (dtype, torch.float32):
        basis = run(layer_code(index, value), bank, phi, out_dtype)
        assert basis.dtype == out_dtype
        # what 22 bits of two fp16 values lose does not show in fp32 sums of a few terms
        assert_close(basis, expected(index, value, bank, phi), rms=LIMITS[out_dtype], peak=LIMITS[out_dtype])


def test_the_code_of_a_layer():
    index = torch.tensor([[7, 2], [2, 0], [7, 7]], dtype=torch.int32)
    value = torch.tensor([[4.0, -1.0], [0.0, 0.0], [1.0, 2.0]])
    code = layer_code(index, value)
    assert code.palette.tolist() == [0, 2, 7] and code.palette.dtype == torch.int32
    assert code.scale.tolist() == [4.0, 0.0, 3.0]
    # a row of zeros stays one; an atom named twice counts twice
    assert code.value[:, :3].tolist() == [[0.0, -0.25, 1.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
    assert code.value.shape[1] % 32 == 0 and not code.value[:, 3:].any()


@pytest.mark.parametrize("run", RUNNERS)
def test_codes_that_fp16_cannot_hold(run):
    index, value, bank = random_case(dtype=torch.float16)
    for scale in (1e-8, 1e8):
        basis = run(layer_code(index, scale * value), bank, "identity", torch.float32)
        assert_close(basis, expected(index, scale * value, bank, "identity"), rms=1e-6, peak=1e-6)


@pytest.mark.parametrize("run", RUNNERS)
def test_saturates_without_overflow(run):
    index, value, bank = random_case()
    for phi in ("tanh", "silu"):
        basis = run(layer_code(index, 1e4 * value), bank, phi, torch.float32)
        assert_close(basis, expected(index, 1e4 * value, bank, phi), rms=1e-5, peak=1e-5)


def test_every_number_of_experts_has_a_configuration():
    assert [default_compose(experts).block_e for experts in (1, 16, 17, 64, 65, 512)] == [16, 16, 64, 64, 128, 128]
    assert CONFIGS[-1][0] is None
    assert all(PALETTE_PADDING % config.block_u == 0 for _, config in CONFIGS)


def test_opcheck():
    index, value, bank = random_case()
    codes = [*layer_code(index, value), *layer_code(index, -value)]
    torch.library.opcheck(compose_bases, (codes, [bank, 2 * bank], "silu", torch.float32))


@pytest.mark.parametrize("kernel", [False, pytest.param(True, marks=needs_kernels)], ids=["reference", "kernel"])
def test_both_families_lie_in_one_tensor(kernel, monkeypatch):
    if kernel:
        monkeypatch.setattr(ops_compose_layer, "use_triton", lambda tensor: True)
        calls = []
        monkeypatch.setattr(ops_compose_layer, "choose_compose", lambda *call: calls.append(call) or SMALL)
    index, value, bank = random_case("ragged in experts, atoms and values")
    other = (index.flip(0), 3 * value, -bank)
    both = compose_bases([*layer_code(index, value), *layer_code(*other[:2])], [bank, other[2]], "tanh", torch.float32)
    rank = bank.shape[1]
    if kernel:
        palette = len(index.unique())
        shape = ComposeShape(len(index), palette, rank * bank.shape[2])
        assert calls == 2 * [(shape, 4, bank.device)]
    assert both.shape == (len(index), 2 * rank, bank.shape[2]) and both.is_contiguous()
    assert_close(both[:, :rank], expected(index, value, bank, "tanh"), rms=1e-6, peak=1e-6)
    assert_close(both[:, rank:], expected(*other, "tanh"), rms=1e-6, peak=1e-6)
