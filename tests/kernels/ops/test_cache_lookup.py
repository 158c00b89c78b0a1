"""The steps of a cached layer on their own: lookup against CLOCK one expert at a time, composition, S1 from a pool."""

import pytest
import torch

from globe_kernels.ops import cache_lookup as module
from globe_kernels.ops.cache_lookup import CacheMaps, cache_lookup_ref, launch_cache_lookup
from globe_kernels.ops.compose_basis import compose_basis_ref
from globe_kernels.ops.compose_slots import Mixtures, compose_slots, compose_slots_ref, launch_compose_slots
from globe_kernels.ops.low_rank_in import launch_low_rank_in, low_rank_in_ref
from globe_kernels.ops.routing import routing_plan_ref
from globe_kernels.ops.tuning import GemmConfig
from globe_kernels.testing import assert_close
from tests.kernels.cases import DEVICE, KERNEL_DTYPES, ROUTINGS, E, needs_kernels

LOOKUPS = [
    pytest.param(cache_lookup_ref, id="reference"),
    pytest.param(launch_cache_lookup, id="kernel", marks=needs_kernels),
]
# experts of a layer, layers, slots
SIZES = {
    "fewer slots than experts": (7, 3, 5),
    "more slots than experts of a layer": (6, 4, 15),
    "a slot for every expert": (6, 2, 12),
    "one slot": (5, 2, 1),
    "one layer, one slot less": (16, 1, 15),
    "blocks of slots, the last ragged": (20, 4, 43),
}


def empty_maps(n: int, slots: int) -> CacheMaps:
    def full(size: int, value: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.full((size,), value, dtype=dtype, device=DEVICE)

    integers = torch.int32, torch.int64
    maps = (full(n, -1, integers[0]), full(slots, -1, integers[0]), full(slots, 0, integers[0]))
    return CacheMaps(*maps, full(slots, 0, integers[1]), full(n, 0, integers[1]), full(5, 0, integers[1]))


class Clock:
    """CLOCK as in a textbook: the hand moves by one slot at a time, for one miss at a time."""

    def __init__(self, n: int, slots: int):
        self.slot_of, self.owner, self.referenced, self.pinned = [-1] * n, [-1] * slots, [0] * slots, [0] * slots
        self.uses = [0] * n
        self.tick = self.hand = self.hits = self.misses = self.evictions = 0

    def use(self, slot: int) -> None:
        self.referenced[slot], self.pinned[slot] = 1, self.tick

    def victim(self) -> int:
        while True:
            slot, self.hand = self.hand, (self.hand + 1) % len(self.owner)
            if self.pinned[slot] == self.tick:
                continue
            if not self.referenced[slot]:
                return slot
            self.referenced[slot] = 0

    def lookup(self, active: list[int], first_expert: int, pass_number: int) -> dict[int, tuple[int, bool]]:
        """{expert: (its slot, whether it was there)} of the experts of this pass."""
        size = len(self.owner)
        chosen = active[pass_number * size : (pass_number + 1) * size]
        self.tick += 1
        found = {}
        for expert in chosen:
            self.uses[first_expert + expert] += 1
            slot = self.slot_of[first_expert + expert]
            if slot >= 0:
                self.use(slot)
                found[expert] = (slot, True)
                self.hits += 1
        for expert in chosen:
            if expert not in found:
                slot = self.victim()
                if self.owner[slot] >= 0:
                    self.slot_of[self.owner[slot]] = -1
                    self.evictions += 1
                self.owner[slot], self.slot_of[first_expert + expert] = first_expert + expert, slot
                self.use(slot)
                found[expert] = (slot, False)
                self.misses += 1
        return found

    def tensors(self) -> list[list[int]]:
        registers = [self.tick, self.hand, self.hits, self.misses, self.evictions]
        return [self.slot_of, self.owner, self.referenced, self.pinned, self.uses, registers]


@pytest.mark.parametrize("lookup", LOOKUPS)
@pytest.mark.parametrize("size", list(SIZES))
def test_a_lookup_is_clock(size, lookup, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 16)
    experts, layers, slots = SIZES[size]
    clock, maps = Clock(experts * layers, slots), empty_maps(experts * layers, slots)
    generator = torch.Generator().manual_seed(0)
    popular = torch.rand(layers, experts, generator=generator)
    for step in range(60 if lookup is launch_cache_lookup and DEVICE == "cpu" else 700):
        layer = int(torch.randint(layers, (), generator=generator))
        density = (0.0, 0.2, 0.5, 2.0)[step % 4]
        counts = 3 * (torch.rand(experts, generator=generator) < density * popular[layer]).int()
        active = counts.nonzero().flatten().tolist()
        starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int().to(DEVICE)
        for number in range(-(-experts // slots)):
            expected = clock.lookup(active, layer * experts, number)
            found = lookup(starts, layer * experts, number, maps)
            assert found.slots.tolist() == [expected.get(expert, (-1,))[0] for expert in range(experts)]
            misses = [(expert, slot) for expert, (slot, hit) in expected.items() if not hit]
            misses += [(-1, -1)] * (min(experts, slots) - len(misses))
            assert list(zip(found.miss_expert.tolist(), found.miss_slot.tolist(), strict=True)) == misses
            assert [tensor.tolist() for tensor in maps] == clock.tensors()
    assert clock.hits and clock.misses and (clock.evictions or slots == experts * layers)


def random_mixtures(dtype: torch.dtype = torch.float32, rank: int = 3, width: int = 10) -> Mixtures:
    generator = torch.Generator().manual_seed(0)
    banks = [torch.randn(7, rank, width, generator=generator).to(DEVICE, dtype) for _ in range(2)]
    codes = []
    for _ in range(2):
        codes.append(torch.stack([torch.randperm(7, generator=generator)[:3] for _ in range(E)]).int().to(DEVICE))
        codes.append(torch.randn(E, 3, generator=generator).to(DEVICE))
    return Mixtures(*banks, *codes)


def worklist(*pairs: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    experts, slots = torch.tensor([*pairs, (-1, -1)], dtype=torch.int32, device=DEVICE).T.contiguous()
    return experts, slots


@pytest.mark.parametrize(
    "compose",
    [
        pytest.param(compose_slots_ref, id="reference"),
        pytest.param(lambda *case: compose_slots(*case[:3], list(case[3]), case[4]), id="op"),
        pytest.param(launch_compose_slots, id="kernel", marks=needs_kernels),
    ],
)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rank", "width", "phi"),
    [(3, 10, "tanh"), (2, 1024, "silu"), (3, 1500, "identity")],
    ids=["small", "full", "ragged"],
)
def test_the_worklist_is_composed_and_nothing_else(rank, width, phi, dtype, compose):
    mixtures = random_mixtures(dtype, rank, width)
    pool = torch.full((4, 2 * rank, width), 7.0, dtype=dtype, device=DEVICE)
    compose(*worklist((3, 2), (0, 0)), pool, mixtures, phi)
    limit = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}[dtype]
    for family, (bank, index, value) in enumerate(
        ((mixtures[0], mixtures[2], mixtures[3]), (mixtures[1], mixtures[4], mixtures[5]))
    ):
        rows = slice(family * rank, (family + 1) * rank)
        expected = compose_basis_ref(index, value, bank, phi, torch.float32)
        assert_close(pool[[2, 0], rows], expected[[3, 0]], rms=limit, peak=limit)
    assert (pool[[1, 3]] == 7).all()
    before = pool.clone()
    compose(*worklist(), pool, mixtures, phi)
    assert torch.equal(pool, before)


@pytest.mark.parametrize("implementation", ["reference", pytest.param("kernel", marks=needs_kernels)])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("routing", list(ROUTINGS))
def test_low_rank_in_from_a_pool(routing, dtype, implementation):
    index, config = ROUTINGS[routing].to(DEVICE), GemmConfig(16, 16, group_m=2, num_warps=4, num_stages=2)
    generator = torch.Generator().manual_seed(1)
    plan = routing_plan_ref(index, E, 16)
    x = torch.randn(index.shape[0], 24, generator=generator).to(DEVICE, dtype)
    pool = torch.randn(9, 6, 24, generator=generator).to(DEVICE, dtype)
    slots = torch.tensor([8, 0, -1, 3, 5], dtype=torch.int32, device=DEVICE)
    others = torch.tensor([-1, -1, 1, -1, -1], dtype=torch.int32, device=DEVICE)
    run = low_rank_in_ref if implementation == "reference" else launch_low_rank_in
    arguments = () if implementation == "reference" else (config,)
    h = run(x, plan, pool, *arguments, slots=slots)
    assert run(x, plan, pool, *arguments, slots=others, out=h) is h
    gathered = pool[torch.where(slots >= 0, slots, others).long()]
    used = slice(int(plan.starts[-1]))
    expected = low_rank_in_ref(x.double(), plan, gathered.double())[used]
    limit = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    assert_close(h[used], expected, rms=limit, peak=2 * limit)


def test_opcheck_and_one_graph():
    pool = torch.randn(4, 6, 10, device=DEVICE)

    def arguments():
        return *worklist((3, 2)), pool.clone(), list(random_mixtures()), "tanh"

    torch.library.opcheck(compose_slots, arguments())
    compiled = torch.compile(lambda *args: compose_slots(*args), fullgraph=True, backend="aot_eager")
    ours, theirs = arguments(), arguments()
    compiled(*ours)
    compose_slots(*theirs)
    assert torch.equal(ours[2], theirs[2]) and not torch.equal(ours[2], pool)
