"""Show a person the progress of a command on stderr, and its tables on stdout."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBars
from rich.table import Table

from globe_fit.run.progress import Progress

_PLAIN_LINES = 10  # progress lines per stage where there is no terminal
_WIDEST = 240


def say(sentence: str) -> None:
    """Print a sentence about the work to stderr."""
    print(f"globe: {sentence}", file=sys.stderr)


@contextmanager
def progress(quiet: bool) -> Iterator[Progress]:
    """Show progress bars on a terminal, a few plain lines elsewhere, nothing when `quiet`; sentences always."""
    if quiet:
        yield Progress(say=say)
    elif sys.stderr.isatty():
        columns = (TextColumn("{task.description:8}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        with ProgressBars(*columns, console=Console(stderr=True)) as bars:

            def begin(name: str, total: float) -> None:
                bars.add_task(name, total=total)

            yield Progress(begin, lambda done: bars.update(bars.task_ids[-1], completed=done), say)
    else:
        lines = _PlainLines()
        yield Progress(lines.begin, lines.advance, say)


class _PlainLines:
    def __init__(self) -> None:
        self.name, self.total, self.shown = "", 1.0, 0

    def begin(self, name: str, total: float) -> None:
        self.name, self.total, self.shown = name, total, 0

    def advance(self, done: float) -> None:
        tenths = int(_PLAIN_LINES * done / self.total)
        if tenths > self.shown:
            self.shown = tenths
            print(f"{self.name}: {100 * tenths // _PLAIN_LINES} %", file=sys.stderr, flush=True)


def print_table(title: str, header: list[str], rows: list[list[str]]) -> None:
    """Print a table to stdout; the first column is text, the others are numbers."""
    table = Table(title=title, title_justify="left")
    for number, name in enumerate(header):
        table.add_column(name, justify="left" if number == 0 else "right")
    for row in rows:
        table.add_row(*row)
    # a file or a pipe has no width, so there is no width to cut a table to
    Console(width=None if sys.stdout.isatty() else _WIDEST).print(table)


def megabytes(count: float) -> str:
    return f"{count / 1e6:.2f} MB"


def gigabytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB"
