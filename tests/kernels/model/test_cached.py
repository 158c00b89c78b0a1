"""The FFN from a cache against the FFN on composed bases, and the module that owns the cache."""

import copy

import pytest
import torch

from globe_kernels.errors import RequestError
from globe_kernels.functional import moe_ffn, moe_ffn_cached
from globe_kernels.model.cache import BasisCache
from globe_kernels.ops.compose_basis import compose_basis_ref
from globe_kernels.ops.compose_slots import Mixtures
from globe_kernels.ops.counters import call_counts
from globe_kernels.ops.moe_ffn import ExpertWeights, FromRank
from globe_kernels.ops.moe_ffn_cached import (
    CachedWeights,
    launch_moe_ffn_cached,
    moe_ffn_cached_ref,
    num_passes,
)
from globe_kernels.ops.moe_ffn_cached import moe_ffn_cached as moe_ffn_cached_op
from globe_kernels.testing import assert_close
from tests.kernels.cases import DEVICE, KERNEL_DTYPES, ROUTINGS, E, needs_kernels, same_tiles

P, D, R, M, C = 12, 20, 7, 6, 3
LAYERS = (3, 8)  # ids of the layers that share a pool
LIMITS = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


def layers(dtype: torch.dtype = torch.float32, bias: bool = False) -> dict[int, CachedWeights]:
    """Two layers over one bank."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) / shape[-1] ** 0.5).to(DEVICE, dtype)

    def code() -> tuple[torch.Tensor, torch.Tensor]:
        index = torch.stack([torch.randperm(M, generator=generator)[:C] for _ in range(E)])
        return index.int().to(DEVICE), torch.randn(E, C, generator=generator).to(DEVICE)

    banks = draw(M, R, D), draw(M, R, D)
    return {
        layer: CachedWeights(
            Mixtures(*banks, *code(), *code()),
            FromRank(
                *(draw(E, P, R), draw(E, P, R), draw(E, D, P)),
                *((draw(E, P), draw(E, P), draw(E, D)) if bias else ()),
            ),
        )
        for layer in LAYERS
    }


def composed(w: CachedWeights, phi: str) -> ExpertWeights:
    m = w.mixtures
    gate = compose_basis_ref(m.gate_index, m.gate_value, m.gate_bank, phi)
    up = compose_basis_ref(m.up_index, m.up_value, m.up_bank, phi)
    return ExpertWeights(torch.cat([gate, up], 1), w.from_rank)


def cache(slots: int, dtype: torch.dtype = torch.float32) -> BasisCache:
    return BasisCache(dict.fromkeys(LAYERS, E), slots, R, D, dtype, DEVICE)


def inputs(index: torch.Tensor, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(index.shape[0], D, generator=generator)
    return hidden.to(DEVICE, dtype), index.to(DEVICE), torch.rand(index.shape, generator=generator).to(DEVICE)


def active_experts(index: torch.Tensor) -> int:
    return len({expert for expert in index.flatten().tolist() if 0 <= expert < E})


def consistent(cached: BasisCache) -> None:
    """slot_of and owner are each other's inverse."""
    slot_of, owner = cached.slot_of.tolist(), cached.owner.tolist()
    assert {(e, s) for e, s in enumerate(slot_of) if s >= 0} == {(e, s) for s, e in enumerate(owner) if e >= 0}


def run_kernels(hidden, index, scale, w, cached, first, phi, activation):
    tiles = same_tiles(32, 32, 32, group_m=2)
    return launch_moe_ffn_cached(hidden, index, scale, w, cached.state, first, phi, activation, tiles)


RUNNERS = [
    pytest.param(moe_ffn_cached, id="what runs here"),
    pytest.param(run_kernels, id="kernels", marks=needs_kernels),
]
# of 2 E = 10 experts
SLOTS = {"all experts": 10, "a quarter": 3, "as many as a token chooses": 2, "one": 1}


@pytest.mark.parametrize("run", RUNNERS)
@pytest.mark.parametrize(
    ("slots", "dtype"),
    [(slots, torch.float32) for slots in SLOTS] + [("a quarter", dtype) for dtype in KERNEL_DTYPES[1:]],
    ids=str,
)
def test_the_result_is_that_of_composed_bases(slots, dtype, run):
    bias, phi = SLOTS[slots] != 2, "silu" if SLOTS[slots] == 3 else "tanh"
    weights, cached, expected_active = layers(dtype, bias), cache(SLOTS[slots], dtype), 0
    for index in ROUTINGS.values():
        for layer in LAYERS:
            case, w = inputs(index, dtype), weights[layer]
            out = run(*case, w, cached, cached.first_expert(layer), phi, "silu")
            assert out.dtype == dtype
            assert_close(out, moe_ffn(*case, composed(w, phi), "silu"), rms=LIMITS[dtype], peak=2 * LIMITS[dtype])
            expected_active += active_experts(index)
    stats = cached.stats()
    assert stats.hits + stats.misses == expected_active == sum(int(own.sum()) for own in stats.uses.values())
    assert stats.bytes_composed == stats.misses * 2 * R * D * dtype.itemsize
    if slots == "all experts":
        assert stats.misses == 10 and stats.evictions == 0 and stats.hit_rate > 0.5
    else:
        assert stats.evictions == stats.misses - SLOTS[slots]
    consistent(cached)


def test_passes_follow_from_sizes_alone():
    sizes = ((8, 8), (8, 100), (9, 8), (1000, 8), (0, 8))
    assert [num_passes(rows, 128, slots) for rows, slots in sizes] == [1, 1, 2, 16, 0]


@pytest.mark.parametrize("run", RUNNERS)
def test_no_tokens_touch_nothing(run):
    cached, empty = cache(3), torch.zeros(0, 2, device=DEVICE)
    before = [tensor.clone() for tensor in cached.state.maps]
    out = run(torch.zeros(0, D, device=DEVICE), empty.long(), empty, layers()[3], cached, 0, "tanh", "silu")
    assert out.shape == (0, D)
    assert all(torch.equal(*pair) for pair in zip(cached.state.maps, before, strict=True))


@pytest.mark.skipif(DEVICE == "cuda", reason="of the reference")
def test_the_reference_composes_only_what_is_missing(monkeypatch):
    import globe_kernels.ops.compose_slots as module

    count = 0

    def counted(*args):
        nonlocal count
        count += 1
        return compose_basis_ref(*args)

    monkeypatch.setattr(module, "compose_basis_ref", counted)
    cached, w = cache(4), layers()[3]
    for index, expected in (([[0, 1]], 4), ([[0, 1]], 4), ([[1, 2]], 6), ([[2, 0], [1, 1]], 6)):
        moe_ffn_cached_ref(*inputs(torch.tensor(index)), w, cached.state, 0, "tanh", "silu")
        assert count == expected  # gate and up of every expert that was not there


def test_opcheck():
    cached, w = cache(2), layers(bias=True)[8]
    torch.library.opcheck(
        moe_ffn_cached_op,
        (
            *inputs(ROUTINGS["one token"]),
            cached.number,
            list(w.mixtures),
            list(w.from_rank),
            E,
            "tanh",
            "silu",
            True,
        ),
    )


@pytest.mark.parametrize("slots", [1, 4])
def test_compiles_into_one_graph(slots):
    weights, eager, compiled = layers(), cache(slots), cache(slots)

    def both(hidden, index, scale, cached):
        for number, layer in enumerate(LAYERS):
            hidden = hidden + moe_ffn_cached(hidden, index, scale, weights[layer], cached, number * E, "tanh", "silu")
        return hidden

    graph = torch.compile(both, fullgraph=True, backend="aot_eager")
    for routing in ("one token", "ragged tails, expert 3 empty"):
        case = inputs(ROUTINGS[routing])
        assert torch.equal(graph(*case, compiled), both(*case, eager))
        assert all(torch.equal(*pair) for pair in zip(eager.state.maps, compiled.state.maps, strict=True))


def test_counts_its_calls():
    name = "moe_ffn_cached" if DEVICE == "cuda" else "moe_ffn_cached_ref"
    before = call_counts().get(name, 0)
    moe_ffn_cached(*inputs(ROUTINGS["one token"]), layers()[3], cache(2), 0, "tanh", "silu")
    assert call_counts()[name] == before + 1


def test_refuses_what_does_not_fit():
    hidden, index, scale = inputs(ROUTINGS["one token"])
    w, rest = layers()[3], ("tanh", "silu")
    with pytest.raises(ValueError, match=r"hidden_states has shape \(1, 19\)"):
        moe_ffn_cached(hidden[:, 1:], index, scale, w, cache(2), 0, *rest)
    with pytest.raises(
        ValueError, match=r"torch.float16 \(14, 20\) and the bases of the layer torch.float32 \(14, 20\)"
    ):
        moe_ffn_cached(hidden, index, scale, w, cache(2, torch.float16), 0, *rest)
    with pytest.raises(ValueError, match="first_expert is 6 with 5 experts in the layer and 10 in the cache"):
        moe_ffn_cached(hidden, index, scale, w, cache(2), 6, *rest)


def filled(slots: int = 6) -> tuple[BasisCache, dict[int, CachedWeights]]:
    """A cache after some calls of both layers."""
    cached, weights = cache(slots), layers()
    for index in ([[0, 1]], [[0, 4], [0, 2]]):
        for layer in LAYERS:
            first = cached.first_expert(layer)
            moe_ffn_cached(*inputs(torch.tensor(index)), weights[layer], cached, first, "tanh", "silu")
    return cached, weights


def test_clear_forgets_bases_and_keeps_statistics():
    cached, weights = filled()
    before = cached.stats()
    doubled = {
        layer: w._replace(mixtures=w.mixtures._replace(gate_value=2 * w.mixtures.gate_value))
        for layer, w in weights.items()
    }
    cached.clear()
    case = inputs(torch.tensor([[0, 4]]))
    out = moe_ffn_cached(*case, doubled[8], cached, E, "tanh", "silu")
    assert_close(out, moe_ffn(*case, composed(doubled[8], "tanh"), "silu"), rms=2e-6, peak=4e-6)
    after = cached.stats()
    assert (after.hits, after.misses, after.evictions) == (before.hits, before.misses + 2, before.evictions)
    cached.reset_stats()
    after = cached.stats()
    assert after.hits == after.misses == after.bytes_composed == after.hit_rate == 0
    assert not any(own.any() for own in after.uses.values())
    consistent(cached)


def test_a_cast_keeps_the_contents():
    cached, weights = filled(slots=10)
    dtypes = [tensor.dtype for tensor in cached.state.maps]
    cached.half()
    assert cached.pool.dtype == torch.float16 and [tensor.dtype for tensor in cached.state.maps] == dtypes
    mixtures, from_rank = weights[8]
    banks = {"gate_bank": mixtures.gate_bank.half(), "up_bank": mixtures.up_bank.half()}
    halves = CachedWeights(mixtures._replace(**banks), FromRank(*(w if w is None else w.half() for w in from_rank)))
    case = inputs(torch.tensor([[0, 4]]), torch.float16)
    misses = cached.stats().misses
    out = moe_ffn_cached(*case, halves, cached, E, "tanh", "silu")
    assert cached.stats().misses == misses
    assert_close(out, moe_ffn(*case, composed(halves, "tanh"), "silu"), rms=4e-3, peak=8e-3)


def test_a_copy_is_on_its_own_and_nothing_is_saved():
    cached, weights = filled()
    twin, before = copy.deepcopy(cached), [tensor.clone() for tensor in cached.state]
    moe_ffn_cached(*inputs(torch.tensor([[3, 4]])), weights[3], twin, 0, "tanh", "silu")
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(cached.state, before, strict=True))
    assert twin.stats().hits + twin.stats().misses == cached.stats().hits + cached.stats().misses + 2
    assert not cached.state_dict()


def test_a_cache_from_the_meta_device_starts_empty():
    cached = BasisCache(dict.fromkeys(LAYERS, E), 3, R, D, torch.float32, "meta").to_empty(device=DEVICE)
    fresh = cache(3)
    assert all(torch.equal(*pair) for pair in zip(cached.state.maps, fresh.state.maps, strict=True))


@pytest.mark.parametrize("slots", [4, 10])
def test_a_warm_cache_holds_the_most_used(slots):
    cached, weights = filled()
    uses = cached.stats().uses | {8: torch.tensor([9, 0, 1, 0, 8], device=DEVICE)}
    cached = cache(slots)
    cached.warm(weights, uses, "tanh")
    counts = torch.cat([own.cpu() for own in uses.values()]).tolist()
    held = [expert for expert, slot in enumerate(cached.slot_of.tolist()) if slot >= 0]
    assert len(held) == min(slots, sum(count > 0 for count in counts))
    assert min(counts[expert] for expert in held) >= max(c for e, c in enumerate(counts) if e not in held)
    consistent(cached)
    assert not cached.registers.any() and not cached.uses.any()
    case = inputs(torch.tensor([[0, 4]]))
    out = moe_ffn_cached(*case, weights[8], cached, E, "tanh", "silu")
    assert_close(out, moe_ffn(*case, composed(weights[8], "tanh"), "silu"), rms=2e-6, peak=4e-6)
    assert (cached.stats().hits, cached.stats().misses) == (2, 0)
    # the first to go is an empty slot, or the least used expert
    moe_ffn_cached(*inputs(torch.tensor([[1]])), weights[8], cached, E, "tanh", "silu")
    least = min(held, key=lambda expert: (counts[expert], -expert))
    assert (cached.slot_of[least] < 0) == (len(held) == slots)
    assert cached.stats().evictions == (len(held) == slots)


def test_refuses_uses_of_another_model():
    with pytest.raises(RequestError, match=r"layer 4 have shape \(5,\) and the model has no experts there"):
        cache(3).warm(layers(), {4: torch.ones(5)}, "tanh")
    with pytest.raises(RequestError, match=r"layer 8 have shape \(6,\) and the model has 5 experts there"):
        cache(3).warm(layers(), {8: torch.ones(6)}, "tanh")


def test_refuses_to_hold_nothing():
    with pytest.raises(RequestError, match="rank 7, hidden size 20 and torch.float32 would have 0 slots"):
        cache(0)
