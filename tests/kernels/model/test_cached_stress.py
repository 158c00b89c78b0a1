"""Ten thousand steps at the smallest budget, on routings that are random and on those that are worst for a cache."""

import gc
import random
from collections.abc import Callable

import pytest
import torch

from globe_kernels.model.cache import BasisCache
from globe_kernels.ops.compose_basis import compose_basis_ref
from globe_kernels.ops.compose_slots import Mixtures
from globe_kernels.ops.moe_ffn import ExpertWeights, FromRank, moe_ffn_ref
from globe_kernels.ops.moe_ffn_cached import CachedWeights, moe_ffn_cached_ref

E, D, P, R, M, C, LAYERS, STEPS = 4, 6, 5, 2, 3, 2, 3, 2000


def weights(seed: int) -> CachedWeights:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    codes = [torch.randint(M, (E, C), generator=generator).int() for _ in range(2)]
    values = draw(E, C), draw(E, C)
    shared = torch.Generator().manual_seed(99)
    banks = [torch.randn(M, R, D, generator=shared) for _ in range(2)]
    mixtures = Mixtures(*banks, codes[0], values[0], codes[1], values[1])
    return CachedWeights(mixtures, FromRank(draw(E, P, R), draw(E, P, R), draw(E, D, P)))


# step -> (layer, experts that one token chooses)
def cyclic(step: int, rng: random.Random) -> tuple[int, list[int]]:
    """Every expert of every layer in turn: a pool that holds one less than all never hits."""
    return step // E % LAYERS, [step % E]


def all_on_one(step: int, rng: random.Random) -> tuple[int, list[int]]:
    return 1, [2 if step % 500 else 3]


def alternating(step: int, rng: random.Random) -> tuple[int, list[int]]:
    return step % LAYERS, [0, 1 + step // 100 % 3]


def zipf(step: int, rng: random.Random) -> tuple[int, list[int]]:
    return rng.randrange(LAYERS), rng.choices(range(E), [1 / (1 + expert) ** 2 for expert in range(E)], k=1)


def anything(step: int, rng: random.Random) -> tuple[int, list[int]]:
    """Also sentinels, and one expert twice."""
    return rng.randrange(LAYERS), [rng.randrange(-1, E + 1) for _ in range(rng.choice((1, 1, 2, 3)))]


@pytest.mark.parametrize("routing", [cyclic, all_on_one, alternating, zipf, anything], ids=lambda f: f.__name__)
def test_the_smallest_cache_is_right_step_after_step(routing: Callable):
    layers, rng = [weights(seed) for seed in range(LAYERS)], random.Random(0)
    hidden = torch.randn(1, D, generator=torch.Generator().manual_seed(7))
    composed = [
        ExpertWeights(
            torch.cat(
                [
                    compose_basis_ref(m.gate_index, m.gate_value, m.gate_bank, "tanh"),
                    compose_basis_ref(m.up_index, m.up_value, m.up_bank, "tanh"),
                ],
                1,
            ),
            from_rank,
        )
        for m, from_rank in layers
    ]
    expected: dict[tuple[int, ...], torch.Tensor] = {}
    cache = BasisCache(dict.fromkeys(range(LAYERS), E), 1, R, D, torch.float32)
    active, tensors = 0, None
    for step in range(STEPS):
        layer, experts = routing(step, rng)
        index = torch.tensor([experts])
        scale = torch.arange(1.0, len(experts) + 1)[None]
        out = moe_ffn_cached_ref(hidden, index, scale, layers[layer], cache.state, layer * E, "tanh", "silu")
        if (layer, *experts) not in expected:
            expected[layer, *experts] = moe_ffn_ref(hidden, index, scale, composed[layer], "silu")
        if any(0 <= expert < E for expert in experts):
            assert torch.equal(out, expected[layer, *experts])
        else:
            assert not out.any()
        active += len({expert for expert in experts if 0 <= expert < E})
        owner = int(cache.owner[0])
        assert [e for e, slot in enumerate(cache.slot_of.tolist()) if slot >= 0] == ([owner] if owner >= 0 else [])
        if step in (STEPS // 2, STEPS - 1):
            del out, index, scale
            count = sum(type(thing) is torch.Tensor for thing in gc.get_objects()) - len(expected)
            assert tensors in (None, count)
            tensors = count
    stats = cache.stats()
    assert stats.hits + stats.misses == active > 0
    assert stats.evictions == stats.misses - 1
    assert sum(int(uses.sum()) for uses in stats.uses.values()) == active
    if routing is cyclic:
        assert stats.hits == 0
    elif routing is all_on_one:
        assert stats.misses == 8
