"""The errors that a user can meet: a sentence names the fault, the expected value and the next step.

A failure beside the work, such as a logger or a plot, is a warning: it never ends work that succeeds without it.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

LONGEST = 2000  # characters of a sentence


class GlobeError(ValueError):
    """Data or a resource failed under way: a damaged file, NaN in a weight, a full disk."""

    exit_code = 1

    def __init__(self, sentence: str):
        super().__init__(one_line(sentence))


class RequestError(GlobeError):
    """The request cannot be carried out as asked: an option, a path or a model that does not fit."""

    exit_code = 2


class GlobeWarning(UserWarning):
    """A sentence about work that goes on: a part beside it failed, or is left out."""


def one_line(text: str) -> str:
    """Return `text` for a terminal: names out of a file may hold line breaks, escape codes, or a megabyte."""
    line = printable(" ".join(text.split()))
    return line if len(line) <= LONGEST else f"{line[: LONGEST * 3 // 4]} ... {line[-LONGEST // 5 :]}"


def printable(text: str) -> str:
    """Spell out the characters that could move the cursor of a terminal, colour it or turn a line, but line breaks."""
    return "".join(letter if letter.isprintable() or letter == "\n" else repr(letter)[1:-1] for letter in text)


def warn(sentence: str, stacklevel: int = 2) -> None:
    """Warn the caller of the caller; the `globe` command prints the sentence as its own."""
    warnings.warn(one_line(sentence), GlobeWarning, stacklevel=stacklevel + 1)


@contextmanager
def explaining(failure: str, remedy: str) -> Iterator[None]:
    """Let an error of any library inside be a GlobeError: `failure`, the error, `remedy`."""
    try:
        yield
    except GlobeError:
        raise
    except Exception as error:
        raise GlobeError(f"{failure} ({type(error).__name__}: {error}); {remedy}.") from error


@contextmanager
def tolerating(step: str, instead: str) -> Iterator[None]:
    """Let a failure of `step` inside be a warning, which ends with the state of the work, `instead`."""
    try:
        yield
    except Exception as error:  # of any library that the step uses
        text = str(error) if isinstance(error, GlobeError) else f"{type(error).__name__}: {error}"
        reason = " ".join(text.split()).rstrip(".")
        warn(f"{step} failed ({reason}); {instead}.", stacklevel=4)
