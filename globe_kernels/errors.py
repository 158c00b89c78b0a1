"""The errors that a user can meet: a sentence says what was found, what was expected and what to do next.

A failure beside the work, such as a logger or a plot, is a warning: it never ends work that succeeds without it.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


class GlobeError(ValueError):
    """Data or a resource failed under way: a damaged file, NaN in a weight, a full disk."""

    exit_code = 1


class RequestError(GlobeError):
    """The request cannot be carried out as asked: an option, a path or a model that does not fit."""

    exit_code = 2


class GlobeWarning(UserWarning):
    """A sentence about work that goes on: a part beside it failed, or is left out."""


def warn(sentence: str, stacklevel: int = 2) -> None:
    """Warn the caller of the caller; the `globe` command prints the sentence as its own."""
    warnings.warn(sentence, GlobeWarning, stacklevel=stacklevel + 1)


@contextmanager
def tolerating(step: str, instead: str) -> Iterator[None]:
    """Let a failure of `step` inside be a warning, which ends with the state of the work, `instead`."""
    try:
        yield
    except Exception as error:  # of any library that the step uses
        text = str(error) if isinstance(error, GlobeError) else f"{type(error).__name__}: {error}"
        reason = " ".join(text.split()).rstrip(".")
        warn(f"{step} failed ({reason}); {instead}.", stacklevel=4)
