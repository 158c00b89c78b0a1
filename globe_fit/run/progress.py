"""Report the progress of long work to a caller."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from globe_kernels.format.names import FAMILIES


@dataclass(frozen=True)
class Progress:
    """The functions that receive progress; by default they do nothing."""

    begin: Callable[[str, float], None] = lambda name, total: None  # a stage begins: its name, its number of steps
    advance: Callable[[float], None] = lambda done: None  # steps of the stage that are done; of 1 step, the share
    say: Callable[[str], None] = lambda sentence: None  # a sentence that the person must read
    note: Callable[[str], None] = lambda text: None  # beside the steps of the stage from now on, such as its error
    tell: Callable[[str], None] = lambda sentence: None  # a sentence about the stages, such as where a fit goes on


SILENT = Progress()


class FitStages:
    """Reports the records of a fit: a stage per family, its steps and its error.

    `reached`: {family: the step from which its fit goes on, infinite when it is finished}; records before it were
    reported in an earlier run.
    """

    def __init__(self, progress: Progress, reached: Mapping[str, float], steps: int):
        self._progress, self._reached, self._steps = progress, reached, steps
        self._family = ""

    def begin(self) -> None:
        """Say from where the fit goes on, and begin the stage of the first family that is not finished."""
        for family, step in self._reached.items():
            end = "is finished" if step == math.inf else f"goes on from step {step} of {self._steps}"
            self._progress.tell(f"{family} {end}")
        left = [family for family in FAMILIES if self._reached.get(family) != math.inf]
        if left:
            self._begin(left[0])

    def _begin(self, family: str) -> None:
        self._family = family
        self._progress.begin(f"fit {family}", self._steps)

    def advance(self, record: dict) -> None:
        """Report a record of globe_fit.run.metrics."""
        family, step = record["family"], record["step"]
        if step < self._reached.get(family, 0):
            return
        if family != self._family:
            self._begin(family)
        self._progress.note(f"error {record['relative_error']:.4f}")
        self._progress.advance(step)
