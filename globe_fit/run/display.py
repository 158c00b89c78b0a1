"""Show a person sentences, and the progress of long work: a live bar, or a few lines where there is no terminal."""

import shutil
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from typing import Any, TextIO

from globe_fit.run.progress import Progress
from globe_kernels.errors import printable
from globe_kernels.table import WIDTH

_SECONDS = 10  # between two lines of progress in a pipe
_MINUTE = 60  # seconds, and minutes of an hour


def write(text: str, stream: TextIO | None = None) -> None:
    """Print a text, to stdout by default, wrapped at words: to the width of a terminal, stdout elsewhere to WIDTH.

    A line of stderr that is no terminal stays whole, for a log.
    """
    text = printable(text)
    where = sys.stdout if stream is None else _Lasting(stream)
    if where.isatty() or stream is None:
        width = shutil.get_terminal_size().columns if where.isatty() else WIDTH
        words = textwrap.TextWrapper(width, break_long_words=False, break_on_hyphens=False)
        text = "\n".join(words.fill(line) for line in text.split("\n"))
    print(text, file=where, flush=True)


class _Lasting:
    """A stream that drops the text that nobody can read any more: its terminal or its pipe went away, its disk is full.

    Work that lasts hours does not end because of a line about it.
    """

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError, AttributeError):  # ValueError: a closed file, AttributeError: None
            try:
                self._stream.write(text)
            except UnicodeEncodeError as error:
                self._stream.write(text.encode(error.encoding, "backslashreplace").decode(error.encoding))
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError, AttributeError):
            self._stream.flush()

    def isatty(self) -> bool:
        with suppress(ValueError, AttributeError):
            return self._stream.isatty()
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def say(sentence: str) -> None:
    """Print a sentence about the work to stderr."""
    write(f"globe: {sentence}", sys.stderr)


@contextmanager
def show_progress(quiet: bool = False) -> Iterator[Progress]:
    """Show a live bar on a terminal and in a notebook, lines elsewhere, nothing when `quiet`; sentences always."""
    if quiet:
        yield Progress(say=say)
        return
    display = _Bar() if _has_live_output() else _Lines()
    try:
        yield Progress(display.begin, display.advance, say, display.note, display.tell)
    finally:
        display.close()


def _has_live_output() -> bool:
    if _Lasting(sys.stderr).isatty():
        return True
    from rich.console import Console

    return Console().is_jupyter and find_spec("ipywidgets") is not None  # rich draws a live bar with a widget


class _Stages:
    """The stage under way, in words."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._name, self._total, self._note = "", 1.0, ""
        self._done: float | None = None  # None before the first step
        self._first, self._first_at = 0.0, 0.0

    def begin(self, name: str, total: float) -> None:
        self._name, self._total, self._note, self._done = name, total, "", None

    def advance(self, done: float) -> None:
        if self._done is None:
            self._first, self._first_at = done, time.monotonic()
        self._done = done

    def note(self, text: str) -> None:
        self._note = text

    def _elapsed(self) -> str:
        return _clock(time.monotonic() - self._began)

    def _steps(self) -> str:
        """Say the steps that are done, or the share of a stage of one step."""
        done = self._done or 0
        return f"{100 * done:.0f} %" if self._total == 1 else f"step {done:.0f} of {self._total:.0f}"

    def _left(self) -> str:
        """Say how long the rest of the stage takes if its steps stay as fast; empty before the second step."""
        done, rest = (self._done or 0) - self._first, self._total - (self._done or 0)
        seconds = time.monotonic() - self._first_at
        return f"{_clock(seconds * rest / done)} left" if done > 0 and rest > 0 else ""

    def _line(self) -> str:
        parts = (f"{self._elapsed()} {self._name} {self._steps()}", self._note, self._left())
        return ", ".join(part for part in parts if part)


class _Lines(_Stages):
    """A line of progress per change, at most one in `_SECONDS`; the first and the last line of a stage always."""

    def __init__(self) -> None:
        super().__init__()
        self._shown_at, self._is_shown = self._began, True

    def begin(self, name: str, total: float) -> None:
        self.close()
        super().begin(name, total)
        self.tell(name)

    def advance(self, done: float) -> None:
        super().advance(done)
        self._is_shown = False
        if done >= self._total or time.monotonic() - self._shown_at >= _SECONDS:
            self._show()

    def tell(self, sentence: str) -> None:
        write(f"{self._elapsed()} {sentence}", sys.stderr)

    def close(self) -> None:
        """Show the last step of a stage that did not reach its total."""
        if not self._is_shown:
            self._show()

    def _show(self) -> None:
        self._is_shown, self._shown_at = True, time.monotonic()
        write(self._line(), sys.stderr)


class _Bar(_Stages):
    """A live bar of the stage under way; a stage that ended leaves its last line above the bar."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bars

        super().__init__()
        fields = (TextColumn(f"{{task.fields[{name}]}}") for name in ("steps", "note", "left"))
        columns = (TextColumn("{task.description}"), BarColumn(None), *fields, TimeElapsedColumn())
        # a notebook has no terminal, and rich draws there without the stream
        stream: Any = _Lasting(sys.stderr)
        console = Console(file=stream) if stream.isatty() else Console(stderr=True)
        # stdout may be a file: its lines do not go through the console
        self._bars = Bars(*columns, console=console, expand=True, redirect_stdout=False)
        self._bars.start()

    def begin(self, name: str, total: float) -> None:
        self._end()
        super().begin(name, total)
        self._bars.add_task(name, total=total, steps=self._steps(), note="", left="")

    def advance(self, done: float) -> None:
        super().advance(done)
        for task in self._bars.task_ids:
            self._bars.update(task, completed=done, steps=self._steps(), note=self._note, left=self._left())

    def tell(self, sentence: str) -> None:
        if self._done is not None and self._done >= self._total:
            self._end()
        self._print(sentence)

    def close(self) -> None:
        self._end()
        self._bars.stop()

    def _end(self) -> None:
        if self._done is not None:
            self._print(self._line())
            self._done = None
        for task in self._bars.task_ids:
            self._bars.remove_task(task)

    def _print(self, line: str) -> None:
        self._bars.console.print(line, highlight=False, markup=False)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), _MINUTE)
    if minutes < _MINUTE:
        return f"{minutes:02}:{rest:02}"
    return f"{minutes // _MINUTE}:{minutes % _MINUTE:02}:{rest:02}"
