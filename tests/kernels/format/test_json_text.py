import json

import pytest

from globe_kernels.errors import GlobeError
from globe_kernels.format.json_text import to_json


def test_strict_json():
    value = {"a": [1.5, None], "b\x1b\u202e": "c\n"}
    assert json.loads(to_json(value, indent=2)) == value and to_json(value).isprintable()
    for number in (float("nan"), float("inf")):
        with pytest.raises(GlobeError, match="NaN or infinite, which JSON cannot hold"):
            to_json({"a": [number]})
