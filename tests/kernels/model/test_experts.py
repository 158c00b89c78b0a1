import copy

import pytest
import torch

from globe_kernels.format.checkpoint import BaseModel, GlobeConfig
from globe_kernels.model.bank import DeviceBank, GlobeBank
from globe_kernels.model.experts import GlobeMoEFFN
from globe_kernels.testing import assert_close

CONFIG = GlobeConfig(
    base=BaseModel("planted", "qwen3_moe", hidden_size=16, intermediate_size=10, num_experts={2: 4}),
    rank=6,
    num_atoms=5,
    support=2,
    dtype="float32",
)


@pytest.fixture
def bank() -> GlobeBank:
    bank = GlobeBank(CONFIG)
    for atoms in bank.parameters():
        torch.nn.init.normal_(atoms)
    return bank


@pytest.fixture
def module(bank) -> GlobeMoEFFN:
    module = GlobeMoEFFN(CONFIG, 2, "silu", torch.float32)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    for family in ("gate", "up"):
        code = module.code(family)
        code.index.copy_(torch.randint(CONFIG.num_atoms, code.index.shape))
        torch.nn.init.normal_(code.value)
    module.hold(DeviceBank(bank), ("composed",), 2)
    return module


INPUTS = (torch.randn(3, 16), torch.tensor([[0, 1], [3, 2], [1, 1]]), torch.rand(3, 2))


def test_forward_needs_an_arrangement():
    with pytest.raises(RuntimeError, match=r"hold\(device_bank, strategies, top_k\)"):
        GlobeMoEFFN(CONFIG, 2, "silu", torch.float32)(*INPUTS)


def test_state_dict_holds_factors_and_not_what_is_composed_from_them(module):
    families = [f"{family}_{part}" for family in ("gate", "up") for part in ("adapter", "code_index", "code_value")]
    assert set(module.state_dict()) == {*families, "down_proj"}


def test_casting_keeps_the_codes(module):
    before = module.code("gate").value.clone()
    module.half()
    assert module.gate_adapter.dtype == module.basis.dtype == torch.float16
    assert module.code("gate").index.dtype == torch.int32
    assert torch.equal(module.code("gate").value, before)
    assert module(INPUTS[0].half(), *INPUTS[1:]).dtype == torch.float16


def test_a_deep_copy_gives_the_same_output_and_shares_nothing(module):
    twin = copy.deepcopy(module)
    expected = module(*INPUTS)
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.zero_()
    assert torch.equal(twin(*INPUTS), expected)
    assert expected.abs().max() > 0


def test_cast_to_bf16_stays_close(module):
    expected = module(*INPUTS)
    out = module.bfloat16()(INPUTS[0].bfloat16(), *INPUTS[1:])
    assert_close(out, expected, rms=2e-2, peak=4e-2)


def test_a_parked_bank_stays_where_it_is(bank):
    bank.park()
    assert bank.to("meta").gate.device.type == "cpu"
    assert bank.half().gate.dtype == torch.float32
    assert set(bank.state_dict()) == {"gate", "up"}
