"""Users of one cache follow each other: threads on a CPU, streams on a simulated GPU, whatever fails under way."""

import copy
import pickle
import random
import threading

import pytest
import torch

from globe_kernels.functional import moe_ffn_cached
from globe_kernels.ops import moe_ffn_cached as op
from globe_kernels.ops.cache_turns import LastUse, turn_of
from globe_kernels.testing import assert_close
from tests.kernels.cases import DEVICE, E
from tests.kernels.model.test_cached import LAYERS, cache, consistent, inputs, layers
from tests.kernels.simulated_gpu import Gpu
from tests.threads import together

CUDA = torch.device("cuda", 0)
INDICES = [torch.tensor([[a, b]]) for a in range(E) for b in range(a)]


def call(cached, weights, layer: int, index: torch.Tensor) -> torch.Tensor:
    first = cached.first_expert(layer)
    return moe_ffn_cached(*inputs(index), weights[layer], cached, first, "tanh", "silu")


def agrees(cached, weights) -> None:
    """Every call gives the result that it has in a cache of its own; compared exactly."""
    for layer in LAYERS:
        for index in INDICES:
            assert torch.equal(call(cached, weights, layer, index), call(cache(2), weights, layer, index))
    consistent(cached)


@pytest.mark.skipif(DEVICE == "cuda", reason="of the reference")
@pytest.mark.parametrize("slots", [1, 2, 7])
@pytest.mark.parametrize("compiles", [False, True])
def test_threads_share_a_cache(slots, compiles):
    """A compiler that gives every op copies of the tensors that it writes, as this backend does, changes nothing."""
    cached, weights = cache(slots), layers()

    def both(hidden, index, scale):
        for number, layer in enumerate(LAYERS):
            hidden = hidden + moe_ffn_cached(hidden, index, scale, weights[layer], cached, number * E, "tanh", "silu")
        return hidden

    run = torch.compile(both, fullgraph=True, backend="aot_eager") if compiles else both
    expected = [run(*inputs(index)) for index in INDICES]
    assert not torch.equal(expected[0], expected[1])

    def serve(number: int) -> None:
        for turn in random.Random(number).choices(range(len(INDICES)), k=25):
            assert torch.equal(run(*inputs(INDICES[turn])), expected[turn])

    together(serve, 4)
    agrees(cached, weights)
    assert cached.stats().hits + cached.stats().misses == 2 * 2 * (len(INDICES) + 4 * 25 + len(INDICES))


STEPS = ("cache_lookup_ref", "compose_slots_ref", "low_rank_in_ref")


@pytest.mark.skipif(DEVICE == "cuda", reason="of the reference")
@pytest.mark.parametrize("stops", [KeyboardInterrupt, torch.OutOfMemoryError, SystemExit])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("step", STEPS)
def test_a_call_that_stops_under_way_leaves_no_wrong_basis(step, after, stops, monkeypatch):
    cached, weights = cache(3), layers()
    call(cached, weights, 3, torch.tensor([[0, 1]]))
    before, real = cached.stats(), getattr(op, step)

    def stopping(*args):
        if after:
            real(*args)
        raise stops

    for _ in range(2):
        with monkeypatch.context() as patched, pytest.raises(stops):
            patched.setattr(op, step, stopping)
            call(cached, weights, 8, torch.tensor([[2, 3]]))
    agrees(cached, weights)
    assert cached.stats().misses > before.misses, "statistics go on"


@pytest.mark.skipif(DEVICE == "cuda", reason="of the reference")
def test_a_call_that_stops_between_gate_and_up(monkeypatch):
    from globe_kernels.ops import compose_slots

    cached, weights, real, count = cache(3), layers(), compose_slots.compose_basis_ref, iter(range(99))

    def stopping(*args):
        if next(count) == 1:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(compose_slots, "compose_basis_ref", stopping)
        call(cached, weights, 3, torch.tensor([[2, 3]]))
    agrees(cached, weights)


def test_a_clear_and_a_warm_up_that_stop_leave_no_wrong_basis(monkeypatch):
    cached, weights = cache(3), layers()
    call(cached, weights, 3, torch.tensor([[2, 3]]))

    def stopping(self):
        self.slot_of[:] = 0
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(type(cached), "_clear", stopping)
        cached.clear()
    agrees(cached, weights)
    del weights[8]
    with pytest.raises(KeyError):
        cached.warm(weights, {8: torch.ones(E)}, "tanh")
    agrees(cached, layers())


def test_a_turn_that_another_thread_has_is_waited_for():
    cached, order, inside, leave = cache(3), [], threading.Event(), threading.Event()

    def holding(number: int) -> None:
        if number == 0:
            with cached.turn():
                inside.set()
                assert not leave.wait(0.1)
                order.append("holder")
        else:
            inside.wait()
            (cached.stats, cached.clear, cached.reset_stats)[number - 1]()
            order.append("other")

    together(holding, 4)
    assert order == ["holder", "other", "other", "other"]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cached: pickle.loads(pickle.dumps(cached))])
def test_a_copy_has_a_lock_and_a_number_of_its_own_and_no_bases(copied):
    cached, weights = cache(3), layers()
    call(cached, weights, 3, torch.tensor([[2, 3]]))
    with cached.turn():
        twin = copied(cached)
        assert twin.number != cached.number and twin.stats().misses == cached.registers[3]
        assert not (twin.slot_of >= 0).any() and (cached.slot_of >= 0).any()
        call(twin, weights, 3, torch.tensor([[0, 1]]))
    agrees(twin, weights)
    agrees(cached, weights)


def test_the_number_of_a_cache_that_is_gone():
    number = cache(3).number
    with pytest.raises(RuntimeError, match=r"Cache \d+ of composed bases is gone"):
        turn_of(number)


@pytest.mark.parametrize("made", [torch.inference_mode, torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("used", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_a_cache_of_one_mode_serves_in_another(made, used):
    weights = layers()
    with made():
        cached = copy.deepcopy(cache(3)).half().float()
        call(cached, weights, 3, torch.tensor([[2, 3]]))
    with used():
        cached.warm(weights, cached.stats().uses, "tanh")
        agrees(cached, weights)
        cached.clear()
        assert_close(call(cached, weights, 3, INDICES[1]), call(cache(2), weights, 3, INDICES[1]), rms=0, peak=0)


@pytest.fixture
def gpu(monkeypatch):
    simulated = Gpu()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: simulated.current)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: simulated.capturing)
    return simulated


class Slot:
    """A cache of one basis: a use looks it up, composes it and reads it, each in work of its own."""

    def __init__(self, gpu: Gpu):
        self.gpu, self.last_use, self.lock = gpu, LastUse(), threading.Lock()
        self.holds, self.read = None, []

    def use(self, basis: int, stops: bool = False) -> None:
        with self.lock, self.last_use.before(CUDA):
            for work in (lambda: None, lambda: setattr(self, "holds", basis), lambda: None):
                self.gpu.current.launch(work)
            if stops:
                raise KeyboardInterrupt
            for _ in range(2):
                self.gpu.current.launch(lambda: self.read.append((basis, self.holds)))

    def wrong(self) -> list[tuple[int, int]]:
        return [(basis, held) for basis, held in self.read if basis != held]


@pytest.mark.parametrize("seed", range(30))
def test_streams_wait_for_the_last_use(gpu, seed):
    slot, turns = Slot(gpu), random.Random(seed)
    for basis in range(12):
        with gpu.on(turns.choice([gpu.main, gpu.side, gpu.other])):
            gpu.current.launch(lambda: None)  # attention
            slot.use(basis)
    gpu.run(seed)
    assert len(slot.read) == 24 and not slot.wrong()


@pytest.mark.parametrize("seed", range(10))
def test_threads_on_streams_of_their_own(gpu, seed):
    slot = Slot(gpu)

    def serve(number: int) -> None:
        with gpu.on((gpu.main, gpu.side, gpu.other, gpu.side)[number]):
            for step in range(5):
                slot.use(10 * number + step)

    together(serve, 4)
    gpu.run(seed)
    assert len(slot.read) == 4 * 5 * 2 and not slot.wrong()


def test_the_simulation_would_show_a_race(gpu):
    gpu.ignores_events, slot = True, Slot(gpu)
    for basis in range(12):
        with gpu.on((gpu.main, gpu.side)[basis % 2]):
            slot.use(basis)
    gpu.run(0)
    assert slot.wrong()


@pytest.mark.parametrize("seed", range(10))
def test_a_use_that_stops_is_waited_for_too(gpu, seed):
    """Its kernels may be running when the next user clears the cache."""
    slot = Slot(gpu)
    with gpu.on(gpu.side), pytest.raises(KeyboardInterrupt):
        slot.use(1, stops=True)
    slot.use(2)
    gpu.run(seed)
    assert slot.read == [(2, 2), (2, 2)]


def test_work_beside_the_cache_is_not_waited_for(gpu):
    """Attention of one stream runs while the other uses the cache."""
    slot, log = Slot(gpu), []
    slot.use(0)
    with gpu.on(gpu.other):
        gpu.current.launch(lambda: log.append("attention"))
        slot.use(1)
    slot.read = log
    gpu.run(3)
    orders = set()
    for seed in range(20):
        log.clear()
        gpu.run(seed)
        orders.add(log.index("attention"))
    assert len(orders) > 1


def test_a_capture_neither_waits_for_nor_is_waited_for_by_work_outside_of_it(gpu):
    slot = Slot(gpu)
    slot.use(0)
    gpu.capturing, before = True, slot.last_use._event
    with gpu.on(gpu.side):
        slot.use(1)
        assert gpu.launched[3 + 2].after == [], "the first work of the capture"
    assert slot.last_use._event is before


def test_a_capture_does_not_mend_a_cache(monkeypatch):
    """Work that is captured runs later: a call outside of the capture clears the cache by itself."""
    cached, weights = cache(3), layers()
    with pytest.raises(KeyboardInterrupt), cached.turn():
        cached.slot_of.fill_(0)
        raise KeyboardInterrupt
    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "is_cuda", True)
        patched.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        patched.setattr(type(cached), "_clear", lambda self: None)
        with cached.turn():
            pass
    agrees(cached, weights)
