"""The one parser of JSON that others wrote."""

import pytest

from globe_kernels.errors import GlobeError
from globe_kernels.format.files import parse_json, read_json


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 101 + "]" * 101, "nested deeper than 100 levels"),
        ("[" * 100_000, "nested too deep"),
        ('{"tokens": 1' + "0" * 300 + "}", "an integer has 301 digits"),
        ("-" + "9" * 5000, "an integer has 5001 digits"),
        ("{", "Expecting property name"),
    ],
)
def test_values_that_are_refused(tmp_path, text, reason):
    with pytest.raises(ValueError, match=reason):
        parse_json(text)
    file = tmp_path / "a.json"
    file.write_text(text)
    with pytest.raises(GlobeError, match=rf"a.json is not valid JSON \(.*{reason}.*\); restore the file"):
        read_json(file, "restore the file")


def test_values_within_the_limits():
    assert parse_json("[" * 100 + "]" * 100)
    assert float(parse_json("1" + "0" * 299)) == 1e299
    assert parse_json("[NaN, 1e999]")[1] == float("inf")
    for text in ("NaN", "[-Infinity]", '{"a": [1e999]}'):
        with pytest.raises(ValueError, match="a number is NaN or infinite"):
            parse_json(text, finite=True)
