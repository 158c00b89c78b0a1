"""The errors that a user can meet: a sentence says what was found, what was expected and what to do next."""


class GlobeError(ValueError):
    """Data or a resource failed under way: a damaged file, NaN in a weight, a full disk."""

    exit_code = 1


class RequestError(GlobeError):
    """The request cannot be carried out as asked: an option, a path or a model that does not fit."""

    exit_code = 2
