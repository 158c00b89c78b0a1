import pytest
import torch

from globe_fit.measure.baselines.errors import relative_errors
from globe_fit.measure.baselines.rounding import FORMATS, CodeFormat, rounded
from globe_kernels.format.checkpoint import BaseModel
from globe_kernels.testing import assert_close


def reference(row: list[float], codes: CodeFormat) -> list[float]:
    """The nearest values of one row, one weight at a time in float64."""
    width, values = codes.group or len(row), []
    for start in range(0, len(row), width):
        group = row[start : start + width]
        if codes.group is None:
            low, high = -(2 ** (codes.bits - 1)) + 1, 2 ** (codes.bits - 1) - 1
            scale, zero = max(map(abs, group)) / high, 0
        else:
            low, high = 0, 2**codes.bits - 1
            least, most = min(0.0, *group), max(0.0, *group)
            scale, zero = (most - least) / high, None
        scale = torch.tensor(scale).half().double().item()  # as it is stored
        if zero is None:
            zero = round(-least / scale)
        values += [scale * (min(max(round(weight / scale) + zero, low), high) - zero) for weight in group]
    return values


@pytest.mark.parametrize("name", FORMATS)
def test_every_weight_takes_the_nearest_code(name):
    codes = FORMATS[name]
    weights = torch.randn(2, 3, 200, generator=torch.Generator().manual_seed(0))  # the last group is shorter
    expected = [[reference(row, codes) for row in expert] for expert in weights.tolist()]
    values = rounded(weights, codes)
    assert_close(values, torch.tensor(expected), rms=1e-5, peak=1e-4)
    for group in codes.split(values.flatten(0, 1)):
        assert max(len(row.unique()) for row in group) <= 2**codes.bits


def test_fewer_bits_and_larger_groups_lose_more(noise):
    errors = {
        name: relative_errors(noise, lambda layer, family, codes=codes: rounded(noise.read(layer, family), codes))
        for name, codes in FORMATS.items()
    }
    assert list(errors) == ["int8", "int4_g128", "int4_g32", "int3_g64", "int2_g32"]
    assert 0 < errors["int8"]["gate"] < 1e-4 < 0.002 < errors["int4_g32"]["gate"] < errors["int3_g64"]["gate"] < 0.1
    assert 0.05 < errors["int2_g32"]["gate"] < 0.5
    layer = noise.layers[0]
    assert relative_errors(noise, lambda layer, family: 0 * noise.read(layer, family)) == {"gate": 1.0, "up": 1.0}
    fine, coarse = (rounded(noise.read(layer, "gate"), CodeFormat(4, group)) for group in (4, 12))
    assert (fine - noise.read(layer, "gate")).norm() < (coarse - noise.read(layer, "gate")).norm()


@pytest.mark.parametrize("name", FORMATS)
def test_weights_without_a_scale(name):
    """Zeros stay zeros, weights of one sign keep it, and what fp16 scales cannot hold is finite."""
    codes = FORMATS[name]
    assert not rounded(torch.zeros(1, 2, 40), codes).any()
    positive = torch.linspace(1, 2, 40).expand(1, 2, 40)
    values = rounded(positive, codes)
    assert (values - positive).abs().max() <= 2 / (2**codes.bits - 1) and values.min() > 0
    assert (
        torch.isfinite(rounded(1e30 * positive, codes)).all() and torch.isfinite(rounded(1e-30 * positive, codes)).all()
    )


def test_bytes_count_codes_scales_and_zero_points():
    base = BaseModel("planned", "qwen3_moe", 200, 8, {0: 3, 1: 2})
    matrices, rows = 2 * 5, 8
    expected = {
        "int8": rows * (200 + 2),
        "int4_g128": rows * (100 + 2 * 2.5),
        "int4_g32": rows * (100 + 7 * 2.5),
        "int3_g64": rows * (75 + 4 * (2 + 3 / 8)),
        "int2_g32": rows * (50 + 7 * 2.25),
    }
    assert {name: codes.bytes_of(base) for name, codes in FORMATS.items()} == {
        name: matrices * each for name, each in expected.items()
    }
    assert CodeFormat(3, 64).num_bytes(1, 1) == 3  # 22 bits
