"""A simulated GPU: work that is launched is put down with what it must wait for, and carried out later.

The order is random, within what streams and events allow. The current stream is that of the thread, as torch has it.
"""

import random
import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Work:
    run: Callable[[], object]
    after: list["Work"]


@dataclass(eq=False)
class Stream:
    """As torch.cuda.Stream, of a device that only takes notes."""

    gpu: "Gpu"
    cuda_stream: int = 0
    last: list[Work] = field(default_factory=list)

    def launch(self, run) -> None:
        with self.gpu.lock:
            work = Work(run, self.last)
            self.last = [work]
            self.gpu.launched.append(work)

    def record_event(self, _=None) -> list[Work]:
        return self.last

    def wait_event(self, event: list[Work]) -> None:
        if not self.gpu.ignores_events:
            with self.gpu.lock:
                self.last = [*self.last, *event]


class Gpu:
    def __init__(self):
        self.launched: list[Work] = []
        self.log: list[str] = []
        self.recorded: list[Stream] = []
        self.ignores_events = False
        self.capturing = False
        self.lock = threading.Lock()  # torch and the driver launch one after the other
        self.main, self.side, self.other = Stream(self), Stream(self), Stream(self)
        self._threads = threading.local()

    @property
    def current(self) -> Stream:
        return getattr(self._threads, "current", self.main)

    @contextmanager
    def on(self, stream: Stream):
        before, self._threads.current = self.current, stream
        try:
            yield
        finally:
            self._threads.current = before

    def run(self, seed: int) -> None:
        """All work that was launched, in a random order that the streams and events allow."""
        order, done = random.Random(seed), set()
        waiting = list(self.launched)
        while waiting:
            work = order.choice([one for one in waiting if all(id(before) in done for before in one.after)])
            work.run()
            done.add(id(work))
            waiting.remove(work)
