"""Quantised checkpoints, read slice by slice. tests/fit/data/quantizers.py writes them."""

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from globe_fit.data.quantized.tensors import StoredTensors
from globe_fit.data.source import TensorFiles
from globe_kernels.errors import GlobeError, RequestError
from tests.fit.data.quantizers import CASES, compressed_tensors, fp8, integers, mxfp4, nvfp4, stored_names

KEY = "model.layers.0.mlp.experts.0.gate_proj.weight"
FUSED = "model.layers.0.mlp.experts.gate_up_proj"
VARIANTS = [(name, ndim) for name, case in CASES.items() for ndim in case.ndims]


def open_checkpoint(path: Path, tensors: dict[str, torch.Tensor], config: dict | None = None) -> StoredTensors:
    path.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")
    return StoredTensors(TensorFiles(path), config or {})


def random_weight(*shape: int) -> torch.Tensor:
    """Rows and experts of different scale, so that a scale of another place shows."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return weight * torch.logspace(-2, 2, weight[..., 0].numel()).view(*shape[:-1], 1)


@pytest.mark.parametrize(("name", "ndim"), VARIANTS, ids=lambda value: str(value))
def test_every_slice_is_the_slice_of_the_whole(tmp_path, name, ndim):
    case, key = CASES[name], KEY if ndim == 2 else FUSED
    weight = random_weight(96, 64) if ndim == 2 else random_weight(3, 96, 64)
    if name.startswith("fp8 per tensor"):
        weight = weight.sign() + 0.1 * weight / weight.abs().amax(-1, keepdim=True)
    tensors = open_checkpoint(tmp_path, stored_names(key, case.quantize(weight)), case.config)
    whole = tensors.read(key)
    assert list(tensors.keys) == [key] and tensors.is_quantized(key)
    assert (whole.shape, whole.dtype) == (weight.shape, torch.bfloat16) == (tensors.shape(key), tensors.dtype(key))
    # per row or, where rows share a scale, per tensor: 4 bits of a normal distribution lose about a tenth
    error = (whole.float() - weight).norm(dim=(-1, -2)) / weight.norm(dim=(-1, -2))
    assert error.max() < (0.03 if "8" in name.split()[0] else 0.13)
    rows, columns = ((0, 96), (5, 70), (31, 33), (95, 96)), ((0, 64), (3, 50), (15, 17), (16, 32), (63, 64), (1, 64))
    for (top, bottom), (left, right) in itertools.product(rows, columns):
        if ndim == 2:
            assert torch.equal(tensors.read(key, slice(top, bottom), slice(left, right)), whole[top:bottom, left:right])
        else:
            read = tensors.read(key, slice(1, 3), slice(top, bottom), slice(left, right))
            assert torch.equal(read, whole[1:3, top:bottom, left:right])
            assert torch.equal(tensors.read(key, 2, slice(top, bottom)), whole[2, top:bottom])


@pytest.mark.parametrize("name", ["fp8 in blocks", "fp8 in blocks, E8M0", "mxfp8", "fp4 with E8M0", "fp8 per tensor"])
def test_fp8_and_fp4_are_as_transformers_dequantises_them(tmp_path, name):
    parts = CASES[name].quantize(random_weight(96, 64))
    read = open_checkpoint(tmp_path, stored_names(KEY, parts), CASES[name].config).read(KEY)
    codes, scales = parts.values()
    assert torch.equal(read, Fp8Dequantize(None)._dequantize_one(codes, scales, torch.bfloat16))


def test_mxfp4_is_as_transformers_dequantises_it(tmp_path):
    parts = CASES["mxfp4 of gpt-oss"].quantize(random_weight(3, 96, 64))
    read = open_checkpoint(tmp_path, stored_names(FUSED, parts)).read(FUSED)
    assert torch.equal(read, convert_moe_packed_tensors(parts["_blocks"], parts["_scales"]))


# byte 0x_1: the low four bits come first. FP4 1 is 0.5, 7 is 6, 9 is -0.5, 15 is -6. int4 is the code minus 8.
FP4_BYTES = torch.tensor([[0x71, 0xF9] + 6 * [0x20]] * 2, dtype=torch.uint8)
FP4_READ = torch.tensor([[0.5, 6.0, -0.5, -6.0] + 6 * [0.0, 1.0]] * 2)
INT4_READ = torch.tensor([[-7.0, -1.0, 1.0, 7.0] + 2 * [-8.0, -6.0]] * 2)
_NV = {"_scale": torch.tensor([[1.5], [4.0]]).to(torch.float8_e4m3fn)}
_INT4 = compressed_tensors("pack-quantized", num_bits=4, type="int", symmetric=True, group_size=8)
_UNEVEN = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float32)


@pytest.mark.parametrize(
    ("parts", "config", "values"),
    [
        ({"": FP4_BYTES, "_scale_2": torch.tensor(0.5), **_NV}, {}, FP4_READ * torch.tensor([[0.75], [2.0]])),
        (
            {"_packed": FP4_BYTES, "_global_scale": torch.tensor([4.0]), **_NV},
            {},
            FP4_READ * torch.tensor([[0.375], [1]]),
        ),
        (
            {"": FP4_BYTES.repeat(1, 2), ".scale": torch.tensor([[126], [129]], dtype=torch.uint8)},
            {},
            FP4_READ.repeat(1, 2) * torch.tensor([[0.5], [4.0]]),
        ),
        (
            {
                "_packed": FP4_BYTES[:, :4].contiguous().view(torch.int32),
                "_scale": torch.tensor([[0.5], [3.0]]).bfloat16(),
            },
            _INT4,
            INT4_READ * torch.tensor([[0.5], [3.0]]),
        ),
        (
            {"": torch.ones(1, 40).to(torch.float8_e4m3fn), "_scale_inv": _UNEVEN},
            {"weight_block_size": [128, 16]},
            torch.tensor([[1.0] * 16 + [2.0] * 16 + [3.0] * 8]),
        ),
    ],
    ids=["nvfp4 of modelopt", "nvfp4 of compressed-tensors", "fp4 with E8M0", "int4", "fp8, blocks cut at the edge"],
)
def test_values_computed_by_hand(tmp_path, parts, config, values):
    tensors = open_checkpoint(tmp_path, stored_names(KEY, parts), config)
    assert torch.equal(tensors.read(KEY).float(), values)
    assert torch.equal(tensors.read(KEY, slice(None), slice(3, values.shape[1])).float(), values[:, 3:])


def test_fp16_scales_make_fp16_values(tmp_path):
    parts = fp8(random_weight(96, 64), 32, 16, end="_scale_inv", dtype=torch.float16)
    tensors = open_checkpoint(tmp_path, stored_names(KEY, parts), CASES["fp8 in blocks"].config)
    assert tensors.read(KEY).dtype is tensors.dtype(KEY) is torch.float16


def test_formats_may_be_mixed(tmp_path):
    weight = random_weight(96, 64)
    up, down = KEY.replace("gate_proj", "up_proj"), KEY.replace("gate_proj", "down_proj")
    plain = {"norm.weight": torch.ones(4), "tid2eid": torch.arange(6, dtype=torch.int32), down: weight.bfloat16()}
    tensors = open_checkpoint(
        tmp_path,
        plain
        | stored_names(KEY, nvfp4(weight, compressed_tensors=False))
        | stored_names(up, fp8(weight, 32, 16, end="_scale_inv"))
        | {"self_attn.k_proj.k_scale": torch.tensor(1.0)},
        CASES["fp8 in blocks"].config,
    )
    assert {*tensors.keys} == {KEY, up, *plain}
    assert KEY in tensors and f"{KEY}_scale" not in tensors
    assert [tensors.is_quantized(key) for key in (KEY, up, down)] == [True, True, False]
    assert tensors.stored(KEY)[:2] == (KEY, f"{KEY}_scale") and len(tensors.stored(KEY)) == 4
    assert tensors.num_bytes(KEY) == 96 * 32 + 96 * 4 + 4 + 4
    assert tensors.num_bytes(up) == 96 * 64 + 3 * 4 * 4
    assert tensors.dense_bytes(KEY) == tensors.dense_bytes(up) == tensors.num_bytes(down) == 96 * 64 * 2
    for key, value in plain.items():
        assert torch.equal(tensors.read(key), value) and tensors.dtype(key) is value.dtype
    assert torch.equal(tensors.read(down, slice(3, 5), 7), plain[down][3:5, 7])


class Numbers(TorchDispatchMode):
    """Count the bytes of all tensors of numbers that operations make, and of the largest; codes stay in the file."""

    def __init__(self):
        super().__init__()
        self.largest = self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dtype in (torch.bfloat16, torch.float32) and not func.is_view:
            size = out.numel() * out.element_size()
            self.largest, self.total = max(self.largest, size), self.total + size
        return out


@pytest.mark.parametrize("name", ["mxfp4 of gpt-oss", "fp8 in blocks", "mxfp8"])
def test_a_read_takes_the_memory_of_its_slice(tmp_path, name):
    case = CASES[name]
    tensors = open_checkpoint(tmp_path, stored_names(FUSED, case.quantize(random_weight(16, 512, 256))), case.config)
    with Numbers() as of_slice:
        part = tensors.read(FUSED, 3, slice(0, 256), slice(0, 64))
    assert of_slice.largest <= 2 * part.numel() * 4 and of_slice.total <= 16 * part.numel()
    with Numbers() as of_whole:
        whole = tensors.read(FUSED)
    assert of_whole.largest == whole.numel() * 2  # the result alone: few rows at a time are in fp32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("name", "ndim"), VARIANTS, ids=lambda value: str(value))
def test_a_gpu_makes_the_same_values(tmp_path, name, ndim):
    case, key, weight = CASES[name], KEY if ndim == 2 else FUSED, random_weight(*(3, 96, 64)[-ndim:])
    tensors = open_checkpoint(tmp_path, stored_names(key, case.quantize(weight)), case.config)
    part = (slice(None),) * (ndim - 1) + (slice(3, 50),)
    assert torch.equal(tensors.read(key, *part, device="cuda").cpu(), tensors.read(key, *part))


_INT4_PARTS = integers(random_weight(96, 64))
_ASYMMETRIC = compressed_tensors("pack-quantized", num_bits=4, type="int", symmetric=False, group_size=32)
_SCALED = fp8(random_weight(96, 64), 32, 16, end="_scale_inv")
_BLOCKS = CASES["fp8 in blocks"].config
_MXFP4 = mxfp4(random_weight(96, 64))
_NVFP4 = nvfp4(random_weight(96, 64), compressed_tensors=True)


def without(parts: dict, end: str) -> dict:
    return {other: part for other, part in parts.items() if other != end}


@pytest.mark.parametrize(
    ("parts", "config", "sentence"),
    [
        (without(_SCALED, "_scale_inv"), _BLOCKS, "is stored as F8_E4M3 and has no scales beside it"),
        (without(_SCALED, ""), _BLOCKS, r"weight_scale_inv belongs to a quantised weight that the checkpoint lacks"),
        (without(_MXFP4, "_scale"), {}, "is stored as U8 and has no scales beside it"),
        (without(_INT4_PARTS, "_scale"), {}, "weight_packed is stored as I32 and has no scales"),
        (without(_NVFP4, "_global_scale"), {}, r"has scales of F8_E4M3 and no tensor \*_global_scale beside them"),
        (_INT4_PARTS, _ASYMMETRIC, r"and no tensor \*_zero_point beside them"),
        (_INT4_PARTS, {}, r"holds packed integers and .* is \(96, 2\), which fits no config group"),
        (
            _SCALED,
            {"weight_block_size": [128, 128]},
            r"scale_inv is \(3, 4\) and .* holds \(96, 64\) .* of \(128, 128\)",
        ),
        (
            _SCALED | {"_scale_inv": torch.ones(5, 4)},
            {},
            r"\(5, 4\) and .* one per block of a size that config.json lacks",
        ),
        (_MXFP4 | {"_scale": torch.ones(96, 3, dtype=torch.uint8)}, {}, r"is \(96, 3\) .* each 32 columns .*\(96, 2\)"),
        (_NVFP4 | {"_scale": _NVFP4["_scale"][:90]}, {}, r"is \(90, 4\) .* each 16 columns of a row, \(96, 4\)"),
        (_NVFP4 | {"_global_scale": torch.ones(2)}, {}, r"is F32 of shape \(2,\) and must be one float"),
        (_SCALED | {"_scale_inv": torch.ones(3, 4, dtype=torch.int32)}, _BLOCKS, "with scales of I32"),
        (_SCALED | {"": torch.zeros(96, 64).to(torch.float8_e5m2)}, _BLOCKS, "is stored as F8_E5M2 with scales of F32"),
        (_SCALED | {"": torch.zeros(96, 64)}, _BLOCKS, "is stored as F32 and has scales"),
        (_SCALED | {"_scale": torch.ones(1)}, _BLOCKS, "has two tensors of scales"),
        (_NVFP4 | {"": torch.zeros(96, 64)}, {}, "is stored as F32 and has scales"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_a_damaged_checkpoint(tmp_path, parts, config, sentence):
    with pytest.raises(GlobeError, match=sentence):
        open_checkpoint(tmp_path, stored_names(KEY, parts), config)


def test_a_scale_that_is_not_a_number(tmp_path):
    parts = mxfp4(random_weight(96, 64))
    parts["_scale"][5, 1] = 255
    tensors = open_checkpoint(tmp_path, stored_names(KEY, parts))
    tensors.read(KEY, slice(0, 5))
    with pytest.raises(GlobeError, match=r"weight_scale has a scale that is NaN \(the E8M0 code 255\)"):
        tensors.read(KEY)


@pytest.mark.parametrize(
    ("names", "config", "sentence"),
    [
        (["weight", "weight.absmax"], {}, "bitsandbytes, which GloBE does not read; load it .* model.dequantize()"),
        (["weight", "SCB"], {}, r"bitsandbytes, .* save_pretrained\(DIRECTORY, save_original_format=False\)"),
        (["qweight", "qzeros", "scales", "g_idx"], {}, "gptq, which GloBE does not read; download the unquantised"),
        (["qweight", "qzeros", "scales"], {"quant_method": "awq"}, "awq, which GloBE does not read; download the unq"),
        (["weight_packed", "weight_scale", "weight_g_idx"], {}, r"\(actorder\), which GloBE does not read"),
        (["weight"], {"quant_method": "hqq"}, "quantised by hqq, which GloBE does not read"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_formats_that_are_refused_by_name(tmp_path, names, config, sentence):
    tensors = {f"layers.0.self_attn.q_proj.{name}": torch.zeros(4, 4) for name in names}
    with pytest.raises(RequestError, match=sentence):
        open_checkpoint(tmp_path, tensors, config)
