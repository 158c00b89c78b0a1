"""Report the progress of long work to a caller."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """The functions that receive progress; by default they do nothing."""

    begin: Callable[[str, float], None] = lambda name, total: None  # a stage begins: its name, its number of steps
    advance: Callable[[float], None] = lambda done: None  # steps of the stage that are done
    say: Callable[[str], None] = lambda sentence: None  # a sentence for the person who waits


SILENT = Progress()
