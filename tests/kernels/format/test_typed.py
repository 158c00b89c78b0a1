"""Values of JSON against their kinds: the value as it is used, or a sentence that names its place."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import pytest

from globe_kernels.errors import GlobeError
from globe_kernels.format.typed import Above, Size, checked


class Part(TypedDict):
    rate: float
    note: NotRequired[str | None]


@dataclass(frozen=True)
class Whole:
    sizes: dict[int, Size]
    shape: tuple[Size, Size]
    parts: list[Part] = field(default_factory=list)
    name: str | None = None


GOOD = {"sizes": {"0": 3, "12": 1}, "shape": [2, 4], "parts": [{"rate": 1, "note": None, "more": [None]}]}


def test_a_whole():
    found = checked(Whole, GOOD, "x.json", "restore it")
    assert found == Whole({0: 3, 12: 1}, (2, 4), [{"rate": 1, "note": None, "more": [None]}])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"sizes": {"0": 0}}, "has 0 as sizes.0, where GloBE expects a whole number from 1 to 2147483647"),
        ({"sizes": {"00": 1}}, "has '00' as sizes.00, where GloBE expects a whole number as the key"),
        ({"sizes": {"-1": 1}}, "a whole number as the key"),
        ({"sizes": {"\u0661": 1}}, "a whole number as the key"),
        ({"sizes": {"0": True}}, "has True as sizes.0, where GloBE expects a whole number"),
        ({"sizes": {"0": 1.0}}, "has 1.0 as sizes.0"),
        ({"sizes": []}, r"has \[\] as sizes, where GloBE expects an object"),
        ({"shape": [2]}, "as shape, where GloBE expects a list of 2"),
        ({"shape": "24"}, "has '24' as shape, where GloBE expects a list"),
        ({"parts": [{}]}, r"has nothing as parts\[0\].rate, where GloBE expects a finite number"),
        ({"parts": [{"rate": float("nan")}]}, "has nan as parts"),
        ({"parts": [{"rate": float("inf")}]}, "has inf as parts"),
        ({"parts": [{"rate": 10**400}]}, "where GloBE expects a finite number"),
        ({"parts": [{"rate": 1, "note": 2}]}, "has 2 as parts.*note, where GloBE expects text"),
        ({"parts": [None]}, "has None as parts"),
        ({"name": 3}, "has 3 as name, where GloBE expects text"),
        ({"other": 3}, "has 3 as other, where GloBE expects nothing"),
        ({"name": ["x" * 10_000]}, r"^x.json has \['x+\.\.\.x+'\] as name"),
    ],
    ids=str,
)
def test_values_that_do_not_fit(change, sentence):
    with pytest.raises(GlobeError, match=sentence) as raised:
        checked(Whole, GOOD | change, "x.json", "restore it")
    assert str(raised.value).startswith("x.json has ") and str(raised.value).endswith("; restore it.")


@pytest.mark.parametrize(
    ("kind", "fits", "unfit"),
    [
        (Annotated[float, Above(0)], [1, 1e-9], [0, -1.0, "1", None]),
        (Literal["gate", "up"], ["gate"], ["down", None, ["gate"]]),
        (int | list[int] | None, [3, [3], None], ["3", [None], {}]),
        (Any, [None, [float("nan")]], []),
        (dict, [{}, {"a": None}], [[], None]),
        (bool, [True], [1, "true"]),
    ],
    ids=str,
)
def test_kinds(kind, fits, unfit):
    for value in fits:
        assert checked(kind, value, "x", "y") is value or checked(kind, value, "x", "y") == value
    for value in unfit:
        with pytest.raises(GlobeError, match="where GloBE expects"):
            checked(kind, value, "x", "y")
