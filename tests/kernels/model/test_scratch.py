"""Composing one layer ahead on a side stream: whatever order a GPU takes within what its streams and events allow.

A GPU is simulated. Composing and reading a buffer take a beginning and an end, between which other streams may go on.
"""

import copy
import random
from types import SimpleNamespace

import pytest
import torch

from globe_kernels.model import scratch
from globe_kernels.model.scratch import ScratchBuffers
from tests.kernels.simulated_gpu import Gpu
from tests.threads import together


@pytest.fixture
def gpu(monkeypatch):
    simulated = Gpu()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: simulated.current)
    monkeypatch.setattr(torch.cuda, "stream", simulated.on)
    monkeypatch.setattr(scratch, "_side_stream", lambda device: simulated.side)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: simulated.recorded.append(stream))
    return simulated


class Layer:
    """Bases of one value each; its experts note what they read."""

    def __init__(self, gpu: Gpu, layer: int, experts: int = 2, composes_ahead: bool = True):
        self.gpu, self.layer, self.takes_bases = gpu, layer, composes_ahead
        self.basis_shape = (experts, 2, 1)
        self.composed = 0

    def composes_ahead(self, tokens: int) -> bool:
        return self.takes_bases

    def compose_into(self, out: torch.Tensor) -> None:
        assert tuple(out.shape) == self.basis_shape
        self.composed += 1
        for text, value in (("compose", float("nan")), ("composed", self.layer)):
            self.gpu.current.launch(self._doing(f"{text} {self.layer}", lambda value=value: out.fill_(value)))

    def _doing(self, text: str, run):
        return lambda: (run(), self.gpu.log.append(text))

    def experts(self, read: list[tuple[int, float]]):
        """A function of bases that reads them at two times."""

        def run(basis: torch.Tensor) -> torch.Tensor:
            for text in (f"experts {self.layer}", f"experts {self.layer} done"):
                note = self._doing(text, lambda: read.append((self.layer, basis.sum().item() / basis.numel())))
                self.gpu.current.launch(note)
            return basis

        return run


def buffers(layers: list[Layer]) -> ScratchBuffers:
    return ScratchBuffers(layers, lambda layer, out: layer.compose_into(out))


def forward(ahead: ScratchBuffers, layers: list[Layer], read: list[tuple[int, float]]) -> None:
    for layer in layers:
        layer.gpu.current.launch(lambda: None)  # attention
        ahead.run(layer, torch.zeros(3, 1), layer.experts(read))


def wrong(read: list[tuple[int, float]]) -> list[tuple[int, float]]:
    return [(layer, value) for layer, value in read if layer != value]


@pytest.mark.parametrize("seed", range(40))
def test_every_layer_reads_its_own_bases(gpu, seed):
    layers = [Layer(gpu, number, experts=2 + number % 3) for number in range(6)]
    ahead, read = buffers(layers), []
    for _ in range(2):
        forward(ahead, layers, read)
    gpu.run(seed)
    assert len(read) == 2 * 2 * 6 and not wrong(read)
    assert [layer.composed for layer in layers] == [2] * 6, "each is composed once in a forward"
    assert not ahead._ahead, "nothing is kept after a forward"


def test_the_simulation_would_show_a_race(gpu):
    gpu.ignores_events = True
    layers = [Layer(gpu, number) for number in range(6)]
    forward(buffers(layers), layers, read := [])
    gpu.run(seed=0)
    assert wrong(read)


def test_a_layer_is_composed_while_the_one_before_it_runs(gpu):
    """Some order that is allowed composes layer 1 within the experts of layer 0; none composes into what they read."""
    layers = [Layer(gpu, number) for number in range(3)]
    forward(buffers(layers), layers, [])
    orders = []
    for seed in range(40):
        gpu.log.clear()
        gpu.run(seed)
        orders.append(list(gpu.log))
    assert any(order.index("experts 0") < order.index("compose 1") < order.index("experts 0 done") for order in orders)
    assert all(order.index("experts 0 done") < order.index("compose 2") for order in orders)
    assert any(order.index("compose 2") < order.index("experts 1") for order in orders), "beside attention too"


@pytest.mark.parametrize("seed", range(20))
def test_a_forward_that_stopped_half_way_spoils_nothing(gpu, seed):
    layers = [Layer(gpu, number) for number in range(5)]
    ahead, read = buffers(layers), []
    forward(ahead, layers[:3], read)
    forward(ahead, layers, read)
    gpu.run(seed)
    assert not wrong(read) and not ahead._ahead


@pytest.mark.parametrize("seed", range(40))
def test_two_streams_may_take_turns(gpu, seed):
    """What one stream had composed for a layer, the other may take."""
    layers = [Layer(gpu, number) for number in range(6)]
    ahead, read, turns = buffers(layers), [], random.Random(seed)
    places = {gpu.main: 0, gpu.other: 0}
    while any(place < len(layers) for place in places.values()):
        stream = turns.choice([stream for stream, place in places.items() if place < len(layers)])
        with gpu.on(stream):
            forward(ahead, [layers[places[stream]]], read)
        places[stream] += 1
    gpu.run(seed)
    assert len(read) == 2 * 2 * 6 and not wrong(read)


@pytest.mark.parametrize("seed", range(20))
def test_threads_on_streams_of_their_own_or_on_one(gpu, seed):
    layers = [Layer(gpu, number) for number in range(6)]
    ahead, read = buffers(layers), []

    def serve(number: int) -> None:
        with gpu.on((gpu.main, gpu.other, gpu.main)[number]):
            for _ in range(3):
                forward(ahead, layers, read)

    together(serve, 3)
    gpu.run(seed)
    assert len(read) == 3 * 3 * 2 * 6 and not wrong(read)


def test_a_layer_that_runs_by_another_strategy_is_not_composed(gpu):
    layers = [Layer(gpu, 0), Layer(gpu, 1, composes_ahead=False), Layer(gpu, 2)]
    ahead = buffers(layers)
    for layer in (layers[0], layers[2]):
        ahead.run(layer, torch.zeros(3, 1), layer.experts(read := []))
    gpu.run(0)
    assert layers[1].composed == 0 and not wrong(read)


def test_memory_that_the_side_stream_may_still_write_is_not_given_away(gpu):
    """And only that: what a stream waited for can be used again at once, though the host is far ahead."""
    layers = [Layer(gpu, 0), Layer(gpu, 1)]
    ahead = buffers(layers)
    forward(ahead, layers, [])
    assert gpu.recorded == [gpu.main] * 2, "both buffers, by the stream that took them"
    forward(ahead, layers[:1], [])
    assert list(ahead._ahead) == [1] and gpu.side not in gpu.recorded
    ahead.forget()
    assert not ahead._ahead and gpu.recorded.count(gpu.side) == 2


def test_a_copy_starts_with_nothing_composed(gpu):
    layers = [Layer(gpu, 0), Layer(gpu, 1)]
    ahead = buffers(layers)
    forward(ahead, layers[:1], [])
    assert list(ahead._ahead) == [1] and not copy.copy(ahead)._ahead


def test_what_fails_half_way_is_not_given_away_either(gpu):
    layers = [Layer(gpu, 0), Layer(gpu, 1)]
    layers[1].compose_into = lambda out: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        forward(buffers(layers), layers[:1], [])
    assert gpu.recorded == [gpu.side] * 2


def test_nothing_is_composed_ahead_where_a_compiler_or_a_graph_looks(gpu, monkeypatch):
    ahead, on_card = buffers([Layer(gpu, 0)]), SimpleNamespace(is_cuda=True)
    for capturing, compiling in ((False, False), (True, False), (False, True)):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda c=capturing: c)
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda c=compiling: c)
        assert ahead.can_run(on_card) == (not capturing and not compiling)


def test_a_cpu_composes_when_a_layer_is_called(gpu):
    assert not buffers([Layer(gpu, 0)]).can_run(torch.zeros(3, 1))
