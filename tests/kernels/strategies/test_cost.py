"""The cost model: floors that were worked out by hand, and which strategy a number of tokens takes."""

import math
from dataclasses import replace

import pytest
import torch

from globe_kernels.errors import RequestError
from globe_kernels.strategies import DENSE, STRATEGIES
from globe_kernels.strategies.base import LayerSizes, Pool, Strategy
from globe_kernels.strategies.composed import break_even_rank
from globe_kernels.strategies.cost import (
    Machine,
    Policy,
    Prediction,
    References,
    machine_for,
    machine_named,
    machines,
    predict,
    switch_points,
)
from tests.kernels import cases

H100 = replace(cases.H100, launch_us=0.0)
# a CPU whose bytes and arithmetic take no time
COUNTS = References(1e9, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10)
CALLS = Machine("cpu", "cpu", 1e9, 1e9, launch_us=11.0, memory_gb=1, item_size=4, origin="", references=COUNTS)
QWEN_30B = LayerSizes(128, 8, 2048, 768, 768, 12, 32, "identity", 2)
QWEN_235B = LayerSizes(128, 8, 4096, 1536, 1536, 12, 32, "identity", 2)
DEEPSEEK_V3 = LayerSizes(256, 8, 7168, 2048, 2048, 12, 64, "identity", 2)
DEEPSEEK_LITE = LayerSizes(64, 6, 2048, 1408, 384, 12, 32, "identity", 2)
OLMOE = LayerSizes(64, 8, 2048, 1024, 1024, 12, 16, "identity", 2)


COMPOSED, BANK_FIRST, CACHED, SCRATCH = (STRATEGIES[name] for name in ("composed", "bank_first", "cached", "scratch"))


def us(strategy: Strategy, sizes: LayerSizes, tokens: int, pool: Pool | None = None) -> float:
    return predict(strategy, sizes, tokens, H100, pool).us


def overlapped(prediction: Prediction) -> float:
    """Microseconds where all arithmetic of a layer hides behind all its bytes, or the other way round."""
    return max(prediction.bytes / 3e6, prediction.flops / 8e8)


@pytest.mark.parametrize(
    ("sizes", "tokens", "dense", "composed"),
    [
        (QWEN_30B, 1, 25, {384: 20, 576: 26, 768: 31}),
        (QWEN_30B, 64, 398, {384: 316, 576: 407, 768: 498}),
        (QWEN_30B, 4096, 537, {384: 486, 576: 596, 768: 705}),
        (DEEPSEEK_LITE, 64, 370, {384: 238, 576: 294, 768: 352}),
        (OLMOE, 64, 271, {384: 193, 576: 243, 768: 294}),
    ],
    ids=["one token", "decode", "prefill", "few choices", "64 experts"],
)
def test_floors_of_composed(sizes, tokens, dense, composed):
    assert us(DENSE, sizes, tokens) == pytest.approx(dense, rel=0.03)
    for rank, floor in composed.items():
        assert us(COMPOSED, replace(sizes, rank=rank), tokens) == pytest.approx(floor, rel=0.03)


@pytest.mark.parametrize(
    ("sizes", "speedups"),
    [
        (QWEN_30B, {8: 1.00, 16: 1.18, 64: 1.30, 256: 1.24, 512: 1.17, 1024: 1.04, 4096: 0.37}),
        (QWEN_235B, {8: 1.00, 16: 1.18, 64: 1.32, 256: 1.29, 512: 1.24, 1024: 1.17, 4096: 0.34}),
        (DEEPSEEK_V3, {8: 0.79, 16: 1.06, 64: 1.39, 256: 1.42, 512: 1.39, 1024: 1.34, 4096: 0.36}),
        (OLMOE, {8: 1.08, 16: 1.16, 64: 1.18, 256: 1.11, 512: 1.04, 1024: 0.93, 4096: 0.50}),
    ],
    ids=["qwen3-30b", "qwen3-235b", "deepseek-v3", "olmoe"],
)
def test_floors_of_bank_first(sizes, speedups):
    """From 512 tokens the palette product is bound by arithmetic: stages that follow each other cannot hide it, so
    there the model is slower than the floor, which takes all bytes and all arithmetic of the layer for overlapped."""
    for tokens, speedup in speedups.items():
        dense, bank_first = (predict(strategy, sizes, tokens, H100) for strategy in (DENSE, BANK_FIRST))
        found = dense.us / bank_first.us
        if tokens <= 1024:
            assert overlapped(dense) / overlapped(bank_first) == pytest.approx(speedup, rel=0.02)
            assert found < speedup + 0.01
        if tokens <= 256 or tokens == 4096:
            assert found == pytest.approx(speedup, rel=0.02 if tokens <= 256 else 0.12)


def test_composing_in_numbers():
    """12 atom reads and a write take 6.8 us per family at rank 384: 5 % of misses undo what composed gains at T = 1."""
    sizes = replace(QWEN_30B, rank=384)
    composed, dense = us(COMPOSED, sizes, 1), us(DENSE, sizes, 1)
    one_miss = (us(CACHED, sizes, 1, Pool(6144, 6144, miss_rate=1 / 8)) - composed) / 2
    assert one_miss == pytest.approx(6.8, rel=0.01)
    assert us(CACHED, sizes, 1, Pool(600, 6144, miss_rate=0.045)) < dense
    assert us(CACHED, sizes, 1, Pool(600, 6144, miss_rate=0.055)) > dense
    assert us(CACHED, sizes, 64, Pool(6144, 6144)) == us(COMPOSED, sizes, 64), "a pool of all experts"
    layer, of_1000_atoms = (
        us(SCRATCH, whole, 4096) - us(COMPOSED, whole, 4096) for whole in (sizes, replace(sizes, palette=1000))
    )
    assert layer == pytest.approx(168, rel=0.01), "128 bases written, 32 atoms read"
    assert of_1000_atoms > 1000, "without a palette the product is bound by arithmetic"


def test_expected_experts_and_misses():
    assert QWEN_30B.active_experts(1) == pytest.approx(8)
    assert QWEN_30B.active_experts(64) == pytest.approx(125.9, abs=0.1)
    everyone = replace(QWEN_30B, top_k=128)
    assert everyone.active_experts(1) == 128
    assert replace(QWEN_30B, active=3.0).active_experts(64) == 3, "as measured"
    pool = Pool(slots=25, experts=100)
    assert pool.misses(0.1) == 0.75
    assert pool.misses(0.5) == 1.0, "one step over all layers pushes out what the next one needs"
    assert replace(pool, miss_rate=0.2).misses(0.5) == 0.2


def test_what_a_stage_counts():
    """T = 2, E = 4 = K, so that every expert is active; by hand."""
    sizes = LayerSizes(4, 4, 10, 6, 5, 2, 3, "identity", 2)
    plan, product, mix, adapters, down, summed = BANK_FIRST.stages(sizes, 2, None)
    assert plan.values == 8
    z = 2 * 2 * 3 * 5
    assert (product.values, product.flops) == (2 * 3 * 5 * 10 + 2 * 10 + z, 2 * z * 10)
    assert mix.values == z + 8 * 10
    assert (adapters.values, adapters.flops) == (4 * 2 * 6 * 5 + 8 * 10 + 8 * 6, 8 * 2 * 2 * 6 * 5)
    assert (down.values, down.flops) == (4 * 60 + 8 * 6 + 8 * 10, 8 * 2 * 60)
    assert summed.values == 8 * 10 + 2 * 10
    total = predict(BANK_FIRST, sizes, 2, H100)
    assert total.bytes == 2 * sum(stage.values for stage in BANK_FIRST.stages(sizes, 2, None))
    few_slots = CACHED.stages(sizes, 2, Pool(3, 4))
    assert [stage.launches for stage in few_slots] == [1, 4, 2, 1, 1, 1], "4 experts in 3 slots are two passes"


def test_a_cpu_counts_calls_of_torch_and_a_gpu_launches():
    """T = 1: 8 experts are active; U = 32 in both families."""

    def calls(strategy, pool=None):
        return predict(strategy, QWEN_30B, 1, CALLS, pool).us

    assert calls(COMPOSED) == pytest.approx(1 + 8 * 2, abs=1e-3)
    assert calls(BANK_FIRST) == pytest.approx(3 + 8 * 4 + 64 * 5, abs=1e-3)
    assert calls(DENSE) == pytest.approx(6 + 8 * 7, abs=1e-3)
    assert calls(SCRATCH) - calls(COMPOSED) == pytest.approx(10, abs=1e-2)
    all_hit, one_in_four = (calls(CACHED, Pool(16, 128, rate)) for rate in (0.0, 0.25))
    assert all_hit - calls(COMPOSED) == pytest.approx(8, abs=1e-3)
    assert one_in_four - all_hit == pytest.approx(2 * 9, abs=1e-3)
    assert calls(CACHED, Pool(3, 128, 0.0)) - calls(COMPOSED) == pytest.approx(3 * 8, abs=1e-3), "three passes"
    assert predict(COMPOSED, QWEN_30B, 1, replace(CALLS, references=None)).us == pytest.approx(5 * 11, abs=1e-3)


def test_a_cpu_reads_and_then_multiplies():
    slow = Machine("cpu", "cpu", 40, 0.1, 0.0, 1, 4, "", References(10, *[0] * 10))
    found = predict(BANK_FIRST, QWEN_30B, 64, slow)
    reading, multiplying = found.bytes / 10e3, found.flops / 0.1e6
    assert min(reading, multiplying) > 1000
    assert found.us == pytest.approx(reading + multiplying, rel=1e-6)


def test_a_cpu_copies_the_atoms_of_a_basis_and_not_those_of_a_layer():
    """A miss reads 12 atoms and writes a basis in each family: at half of the rate of a copy."""
    sizes = replace(QWEN_30B, item_size=4)
    machine = replace(CALLS, copy_gb_per_s=40, references=replace(COUNTS, read_gb_per_s=10))
    pools = [Pool(128, 128, rate) for rate in (0.0, 1 / 8)]
    all_hit, one_miss = (predict(CACHED, sizes, 1, machine, pool).us for pool in pools)
    basis = 4 * sizes.rank * sizes.hidden
    assert one_miss - all_hit == pytest.approx(2 * 13 * basis / 20e3 + 9, rel=1e-5)
    composed, scratch = (predict(strategy, sizes, 1, machine).us for strategy in (COMPOSED, SCRATCH))
    assert scratch - composed == pytest.approx(2 * (32 + 128) * basis / 10e3 + 10, rel=1e-4)


def test_the_policy_takes_the_cheapest_strategy():
    strategies, pool = (BANK_FIRST, CACHED, SCRATCH), Pool(5530, 6144)
    points = switch_points(strategies, QWEN_30B, H100, pool)
    assert [name for _, name in points] == ["cached", "bank_first", "scratch"]
    policy = Policy(points)
    for power in range(15):
        tokens = 2**power
        times = {strategy.name: us(strategy, QWEN_30B, tokens, pool) for strategy in strategies}
        assert times[policy.strategy(tokens)] == min(times.values())
    first = points[0][0]
    assert first is not None and (policy.strategy(first), policy.strategy(first + 1)) == ("cached", "bank_first")
    assert policy.strategy(10**9) == "scratch" and points[-1][0] is None
    assert switch_points([COMPOSED], QWEN_30B, H100) == ((None, "composed"),)
    assert Policy(((None, "composed"),)).strategy(1) == "composed"


@pytest.mark.parametrize("name", STRATEGIES)
def test_more_tokens_take_longer(name):
    pool = Pool(1000, 6144)
    times = [us(STRATEGIES[name], QWEN_30B, 2**power, pool) for power in range(16)]
    assert all(0 < fewer < more < math.inf for fewer, more in zip(times, times[1:], strict=False))


def test_break_even_rank():
    for inner, width, rank in ((768, 2048, 558), (14336, 4096, 3185), (1408, 2048, 834), (1024, 2048, 682)):
        assert break_even_rank(inner, width) == rank
        sizes = LayerSizes(8, 2, width, inner, rank, 4, 4.0, "identity", 2)
        weights = [sum(stage.values for stage in strategy.stages(sizes, 1, None)) for strategy in (COMPOSED, DENSE)]
        assert weights[0] == pytest.approx(weights[1], rel=0.01)


def test_machines():
    names = {
        "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA H200": "h200",
        "NVIDIA A100-SXM4-80GB": "a100",
        "NVIDIA GeForce RTX 4090": "rtx4090",
        "cpu": "cpu",
        "NVIDIA A1000": "NVIDIA A1000, taken for a100",
        "NVIDIA XH100": "NVIDIA XH100, taken for a100",
    }
    for device, name in names.items():
        assert machine_for(device).name == name
    assert machine_for(torch.device("cpu")) == machine_named("cpu")
    for machine in machines().values():
        assert "measured" in machine.origin or "data sheet" in machine.origin
        assert machine.copy_gb_per_s > 0 and machine.matmul_tflop_per_s > 0 and machine.memory_gb > 0
    with pytest.raises(RequestError, match="machine 'tpu' is not known; expected one of h100,"):
        machine_named("tpu")
