"""A fit over several ranks, the processes that torchrun starts.

Rank k holds a contiguous part of the D columns of every W_i and of every atom. What mixes columns are products over
them, and these are sums over the ranks: the Grams Bhat_i Bhat_i^T (R, R), the products W_i Bhat_i^T (P, R), norms,
errors and the gradient of the codes. Adapters and codes are so the same on every rank, bitwise, and nothing of the size
of a bank crosses between ranks while steps are taken. What needs whole experts, each once, is dealt out by experts.
"""

import os
import re
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

from globe_kernels.errors import GlobeError, RequestError

# A rank that dies is noticed at once; this ends a fit of which one hangs. Between two messages lie at most the
# snapshot of a rank or the decomposition of its share of the experts.
_TIMEOUT = timedelta(minutes=30)
_TO_SPEAK = timedelta(seconds=5)
_SAID = "globe/said"


class RankLost(GlobeError):
    """Another rank of this fit is gone, so there is nothing left to compute."""

    def __init__(self, reason: str):
        super().__init__(
            f"Another rank of the fit stopped ({reason}); run the same command again, it goes on from the last "
            "snapshot in OUT/.snapshot."
        )


@dataclass(frozen=True)
class Ranks:
    """This process among those of a fit; by default the only one, which sends nothing and never touches
    torch.distributed. All ranks call the same methods in the same order."""

    rank: int = 0
    world: int = 1
    device: str = "cpu"  # that messages are on

    @property
    def leads(self) -> bool:
        """Whether this is the rank that prints, logs and writes the result."""
        return self.rank == 0

    def part(self, total: int) -> slice:
        """Which of `total` things in a row are this rank's: as equal as possible."""
        return slice(total * self.rank // self.world, total * (self.rank + 1) // self.world)

    def all_sum(self, *tensors: torch.Tensor) -> None:
        """Each becomes its sum over the ranks, in place and bitwise the same on all; one message for tensors of one
        dtype."""
        if self.world == 1:
            return
        message = torch.cat([tensor.detach().flatten() for tensor in tensors])
        _collective(distributed.all_reduce, message)
        with torch.no_grad():
            for tensor, summed in zip(tensors, message.split([one.numel() for one in tensors]), strict=True):
                tensor.copy_(summed.view_as(tensor))

    def every(self, *values: float) -> list[list[float]]:
        """The values of each rank, in the order of the ranks."""
        if self.world == 1:
            return [list(values)]
        table = torch.zeros(self.world, len(values), dtype=torch.float64, device=self.device)
        table[self.rank] = torch.tensor(values, dtype=torch.float64)
        self.all_sum(table)
        return table.tolist()

    def sums(self, *values: float) -> list[float]:
        """The sum of each value over the ranks, whatever the order in which messages are added."""
        return [sum(column) for column in zip(*self.every(*values), strict=True)]

    def whole(self, part: torch.Tensor, width: int) -> torch.Tensor:
        """(..., D) from the columns (..., own) of all ranks."""
        if self.world == 1:
            return part
        full = part.new_zeros(*part.shape[:-1], width)
        full[..., self.part(width)] = part
        self.all_sum(full)
        return full


ALONE = Ranks()


def ranks_in_all() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if distributed.is_torchelastic_launched() else 1


def join(device: str) -> Ranks:
    """This process among the ranks of torchrun, which send each other tensors on `device`.

    Raises RequestError when there is no GPU for each of them.
    """
    world = ranks_in_all()
    if world == 1:
        return ALONE
    if device.startswith("cuda:"):
        raise RequestError(f"device is {device} and each rank takes a GPU of its own; give --device cuda.")
    if device == "cuda":
        local, found = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= found:
            raise RequestError(
                f"torchrun started {os.environ['LOCAL_WORLD_SIZE']} ranks on a machine with {found} GPU(s); start one "
                "per GPU, or give --device cpu."
            )
        torch.cuda.set_device(local)
    _collective(distributed.init_process_group, "nccl" if device == "cuda" else "gloo", timeout=_TIMEOUT)
    return Ranks(distributed.get_rank(), world, device)


def leave() -> None:
    """The end of a fit that succeeded; after one that failed there may be nobody to take leave of."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def say(message: str) -> None:
    """Print why the command ends; of several ranks the first that has something to say does."""
    if _first_to_speak():
        print(f"globe: {message}", file=sys.stderr, flush=True)


def _first_to_speak() -> bool:
    if ranks_in_all() == 1:
        return True
    try:  # a counter that torchrun keeps: it outlives every rank
        store = distributed.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=_TO_SPEAK
        )
        return store.add(f"{_SAID}/{os.environ['TORCHELASTIC_RESTART_COUNT']}", 1) == 1
    except RuntimeError:
        return True


def end_with_the_others() -> None:
    """From now on SIGTERM, which torchrun sends when another rank has died, ends this process with a sentence.

    Also where it hangs in a message to that rank, which no handler in Python would interrupt.
    """
    if ranks_in_all() == 1:
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    signal.signal(signal.SIGTERM, lambda *_: None)  # so that it reaches the pipe

    def watch() -> None:
        while os.read(reader, 1) != bytes([signal.SIGTERM]):
            pass
        lost = RankLost("SIGTERM from torchrun")
        say(str(lost))
        os._exit(lost.exit_code)

    threading.Thread(target=watch, name="end with the others", daemon=True).start()


def _collective(function: Callable, *args: Any, **options: Any) -> None:
    try:
        function(*args, **options)
    except RuntimeError as error:
        what = re.sub(r"^\[\S+:\d+\] ", "", str(error).splitlines()[0])  # without the place in the source of gloo
        raise RankLost(what.split(". ")[0].rstrip(".")) from error
