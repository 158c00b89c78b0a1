"""A fit on a GPU, without a GPU: the copies stand still, and the reads, the kept blocks and the counts are the same."""

from dataclasses import replace

import pytest
import torch

from globe_fit import ExpertSource, FitConfig
from globe_fit.data import stream as objective
from globe_fit.data.stream import FamilyWeights
from globe_fit.plan import fitting as estimate
from globe_fit.run.distributed import Ranks
from globe_fit.sizes import resolve_sizes
from globe_kernels.testing import tiny_model


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> ExpertSource:
    """Stored in bf16."""
    path = tmp_path_factory.mktemp("bf16")
    tiny_model("qwen3_moe").bfloat16().save_pretrained(path, max_shard_size="100KB")
    return ExpertSource(path)


class OnTheHost:
    """An Upload that stays in host memory."""

    reads = 0

    def __init__(self, source: ExpertSource, device: str):
        self._source = source

    def read(self, layer, family, experts, columns) -> torch.Tensor:
        OnTheHost.reads += 1
        out = torch.empty(
            len(experts), 48, columns.stop - columns.start, dtype=self._source.stored_dtype(layer, family)
        )
        return self._source.read(layer, family, experts, columns, out=out)

    def arrived(self, weights: torch.Tensor) -> torch.Tensor:
        return weights


@pytest.fixture
def weights(source, monkeypatch) -> tuple[FamilyWeights, FamilyWeights]:
    """Of a CPU and of a GPU."""
    monkeypatch.setattr(objective, "Upload", OnTheHost)
    monkeypatch.setattr(OnTheHost, "reads", 0)
    monkeypatch.setattr(objective, "_MIN_BLOCK_BYTES", 4 * 48 * 64 * 4)
    measured = FamilyWeights.measure(source, "up", "cpu")
    return measured, replace(measured, device="cuda")


def all_equal(one, other) -> bool:
    pairs = list(zip(one, other, strict=True))
    return len(pairs) == 6 and all(a.span == b.span and torch.equal(a.weights, b.weights) for a, b in pairs)


def test_the_experts_are_read_as_they_are_stored(source, save_tiny):
    layer = source.layers[0]
    assert source.stored_dtype(layer, "gate") == torch.bfloat16
    assert source.stored_bytes("gate") == 24 * 48 * 64 * 2
    out = torch.empty(3, 48, 10, dtype=torch.bfloat16)
    read = source.read(layer, "gate", range(2, 5), slice(20, 30), out=out)
    assert read is out and torch.equal(read.float(), source.read(layer, "gate")[2:5, :, 20:30])
    fused = ExpertSource(save_tiny("qwen3_moe", fused=True))
    assert fused.stored_dtype(fused.layers[0], "up") == torch.float32


@pytest.mark.parametrize("ranks", [Ranks(), Ranks(1, 2, "cuda")], ids=["alone", "columns of a rank"])
def test_a_pass_is_that_of_a_cpu(weights, ranks):
    on_cpu, on_gpu = (replace(one, ranks=ranks) for one in weights)
    assert all_equal(on_cpu.raw(), on_gpu.raw())
    assert all_equal(on_cpu.normalised(), on_gpu.normalised())


def test_what_is_kept_is_read_once(weights):
    on_cpu, on_gpu = weights
    keeping = replace(on_gpu, kept=[])
    next(keeping.raw())  # a pass that is given up
    assert keeping.kept == []
    before = OnTheHost.reads
    for _ in range(3):  # nothing that a pass does to its blocks comes back
        assert all_equal(on_cpu.normalised(), keeping.normalised())
    assert all_equal(on_cpu.raw(), keeping.raw())
    assert OnTheHost.reads == before + 6
    assert {block.weights.dtype for block in keeping.kept} == {torch.bfloat16}
    (one,) = keeping.raw(slice(5, 6))
    assert one.weights.shape == (1, 48, 64) and OnTheHost.reads == before + 7


@pytest.mark.parametrize(("room", "kept"), [(1.01, True), (0.99, False)])
def test_experts_are_kept_where_they_fit(source, monkeypatch, room, kept):
    sizes, stored = resolve_sizes(source.base, FitConfig(ratio=0.8, support=4)), source.stored_bytes("gate")
    monkeypatch.setattr(estimate, "_memory_of", lambda _: 10**12)
    most = estimate.estimate(sizes, device="cuda", stored_bytes=stored)
    assert most.solver_bytes == estimate.estimate(sizes).solver_bytes
    assert most.kept_bytes == stored and most.peak_bytes == most.least_bytes + stored
    monkeypatch.setattr(estimate, "_memory_of", lambda _: room * most.device_bytes / estimate._GPU_SHARE)
    assert bool(estimate.estimate(sizes, device="cuda", stored_bytes=stored).kept_bytes) == kept
    assert estimate.estimate(sizes, stored_bytes=stored).kept_bytes == 0, "a CPU reads again"
