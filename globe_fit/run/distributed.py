"""A fit over several ranks, the processes that torchrun starts.

Rank k holds a contiguous part of the D columns of every W_i and of every atom. Products over the columns are sums over
the ranks: the Grams Bhat_i Bhat_i^T (R, R), the products W_i Bhat_i^T (P, R), norms, errors and the gradient of the
codes. So adapters and codes are bitwise the same on every rank, and no message of a step has the size of a bank. Work
on whole experts is dealt out by experts. A calibrated fit mixes columns, so its ranks also send each other the columns
of a block (`globe_fit.data.stream`).
"""

import os
import re
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed

from globe_fit.run import display
from globe_fit.run.stopping import interrupt
from globe_kernels.errors import GlobeError, RequestError

# A rank that dies is noticed at once; the timeout ends a fit of which a rank hangs. The longest work between two
# messages is the snapshot of a rank or the decomposition of its share of the experts.
_TIMEOUT = timedelta(minutes=30)
_TO_SPEAK = timedelta(seconds=5)
_SPOKEN = "globe/spoken"
_MOST_SECONDS = 20  # between two messages after SIGTERM; torchrun kills after 30

Result = TypeVar("Result")

_terminated = threading.Event()
_messages = 0  # of this rank


class RankLost(GlobeError):
    """Another rank of this fit is gone, so this rank cannot continue."""

    def __init__(self, reason: str):
        super().__init__(
            f"Another rank of the fit stopped ({reason}); run the same command again: it continues from the last "
            "snapshot in OUT/.snapshot."
        )


@dataclass(frozen=True)
class Ranks:
    """This process among the processes of a fit; all ranks call the same methods in the same order.

    By default it is the only process: it sends nothing and does not touch torch.distributed.
    """

    rank: int = 0
    world: int = 1
    device: str = "cpu"  # of the messages

    @property
    def leads(self) -> bool:
        """Whether this rank prints, logs and writes the result."""
        return self.rank == 0

    def part(self, total: int) -> slice:
        """Return the items of this rank among `total` items: parts as equal as possible."""
        return slice(total * self.rank // self.world, total * (self.rank + 1) // self.world)

    def all_sum(self, *tensors: torch.Tensor) -> None:
        """Replace each tensor by its sum over the ranks, bitwise the same on all; one message, so one dtype."""
        if self.world == 1:
            return
        message = torch.cat([tensor.detach().flatten() for tensor in tensors])
        _collective(distributed.all_reduce, message)
        with torch.no_grad():
            for tensor, summed in zip(tensors, message.split([tensor.numel() for tensor in tensors]), strict=True):
                tensor.copy_(summed.view_as(tensor))

    def every(self, *values: float) -> list[list[float]]:
        """Return the values of every rank, in the order of the ranks."""
        if self.world == 1:
            return [list(values)]
        table = torch.zeros(self.world, len(values), dtype=torch.float64, device=self.device)
        table[self.rank] = torch.tensor(values, dtype=torch.float64)
        self.all_sum(table)
        return table.tolist()

    def sums(self, *values: float) -> list[float]:
        """Return the sum of each value over the ranks, added in the order of the ranks."""
        return [sum(column) for column in zip(*self.every(*values), strict=True)]

    def whole(self, part: torch.Tensor, width: int) -> torch.Tensor:
        """Join the columns of all ranks: (..., D) from the part of each rank. A message has the bytes of a part."""
        if self.world == 1:
            return part
        spans = [replace(self, rank=rank).part(width) for rank in range(self.world)]
        widths = [span.stop - span.start for span in spans]
        message = part.new_zeros(*part.shape[:-1], max(widths))  # parts may differ by a column, messages may not
        message[..., : part.shape[-1]] = part
        parts = [torch.empty_like(message) for _ in spans]
        _collective(distributed.all_gather, parts, message)
        return torch.cat([found[..., :size] for found, size in zip(parts, widths, strict=True)], dim=-1)

    def on_first(self, work: Callable[[Callable[[], object]], Result]) -> Result | None:
        """Return the result of `work` on the first rank, and None on the others, which wait.

        `work` gets a function that it calls from time to time, within the timeout of a message. That call raises
        KeyboardInterrupt on all ranks once torchrun has sent SIGTERM to one of them.
        """
        if self.world == 1:
            return work(lambda: None)
        if self.leads:
            result = work(lambda: self._meet(False))
            self._meet(True)
            return result
        while not self._meet(False):
            pass
        return None

    def _meet(self, done: bool) -> bool:
        """Wait for all ranks; whether the first of them is done."""
        found = self.every(done, was_terminated())
        if any(terminated for _, terminated in found):
            raise interrupt(signal.SIGTERM)
        return bool(found[0][0])

    def from_first(self, tensor: torch.Tensor) -> None:
        """Give `tensor`, on any device, the values that it has on the first rank, in one message."""
        if self.world == 1:
            return
        message = tensor.to(self.device)
        _collective(distributed.broadcast, message, src=0)
        tensor.copy_(message)


ALONE = Ranks()


def ranks_in_all() -> int:
    """Return the number of processes that torchrun started; 1 without torchrun."""
    return int(os.environ["WORLD_SIZE"]) if distributed.is_torchelastic_launched() else 1


def leads() -> bool:
    """Whether this process is the first that torchrun started; True without torchrun."""
    return ranks_in_all() == 1 or os.environ["RANK"] == "0"


def join(device: str) -> Ranks:
    """Join the ranks of torchrun, which send each other tensors on `device`.

    Raises RequestError when there is no GPU for each rank.
    """
    world = ranks_in_all()
    if world == 1:
        return ALONE
    if device.startswith("cuda:"):
        raise RequestError(f"device is {device} and each rank needs another GPU; give --device cuda.")
    if device == "cuda":
        local, found = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= found:
            raise RequestError(
                f"torchrun started {os.environ['LOCAL_WORLD_SIZE']} ranks on a machine with {found} GPU(s); start one "
                "rank per GPU, or give --device cpu."
            )
        torch.cuda.set_device(local)
    _collective(distributed.init_process_group, "nccl" if device == "cuda" else "gloo", timeout=_TIMEOUT)
    return Ranks(distributed.get_rank(), world, device)


def leave() -> None:
    """Leave the ranks at the end of a fit that succeeded; after a failure the other ranks may be gone."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def say(message: str) -> None:
    """Print why the command ends; of several ranks only the first that calls this prints."""
    if _first_to_speak():
        display.say(message)


def _first_to_speak() -> bool:
    if ranks_in_all() == 1:
        return True
    try:  # a counter that torchrun keeps: it outlives every rank
        store = distributed.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=_TO_SPEAK
        )
        return store.add(f"{_SPOKEN}/{os.environ['TORCHELASTIC_RESTART_COUNT']}", 1) == 1
    except RuntimeError:
        return True


def end_with_the_others() -> None:
    """Let SIGTERM end a rank: torchrun sends it when another rank has died, and when a scheduler ends the job.

    Where all ranks are alive, they take a common snapshot and stop. A rank that gets no message meanwhile ends with a
    sentence, also while it hangs in a message to a dead rank, which no handler in Python interrupts.
    """
    if ranks_in_all() == 1:
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    signal.signal(signal.SIGTERM, lambda *_: None)  # with a handler, the signal reaches the pipe

    def watch() -> None:
        while os.read(reader, 1) != bytes([signal.SIGTERM]):
            pass
        _terminated.set()
        if leads():
            display.say("the fit stops when all ranks have taken a snapshot; the last snapshot stands until then.")
        seen, quiet = _messages, 0
        while quiet < _MOST_SECONDS:
            time.sleep(1)
            seen, quiet = _messages, quiet + 1 if seen == _messages else 0
        lost = RankLost("SIGTERM from torchrun")
        say(str(lost))
        os._exit(lost.exit_code)

    threading.Thread(target=watch, name="end with the others", daemon=True).start()


def was_terminated() -> bool:
    """Whether torchrun has sent SIGTERM to this rank."""
    return _terminated.is_set()


def _collective(function: Callable, *args: Any, **options: Any) -> None:
    global _messages
    _messages += 1
    try:
        function(*args, **options)
    except RuntimeError as error:
        reason = re.sub(r"^\[\S+:\d+\] ", "", str(error).splitlines()[0])  # without the source line of gloo
        raise RankLost(reason.split(". ")[0].rstrip(".")) from error
