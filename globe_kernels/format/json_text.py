"""Write JSON that every reader takes."""

import json
from typing import Any

from globe_kernels.errors import GlobeError


def to_json(value: Any, indent: int | None = None) -> str:
    """Return `value` as JSON. Raises GlobeError for NaN and infinity, which are no JSON though Python writes them."""
    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except ValueError as error:
        raise GlobeError(
            f"A result is NaN or infinite, which JSON cannot hold ({error}); look for NaN in the model and in the text."
        ) from error
