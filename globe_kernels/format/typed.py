"""Check the types and ranges of JSON values, before the values are used.

A kind is a type: int, float (finite), str, bool, dict, None, list[K], tuple[K, V] of a fixed length, dict[K, V] with
text or whole numbers as keys, K | V, Literal["k", "v"], a TypedDict, a dataclass, and Annotated[K, range or Above(0)]
for the values that lie in it.
"""

import math
import reprlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NotRequired, Union, get_args, get_origin, get_type_hints, is_typeddict

from globe_kernels.errors import LONGEST, GlobeError, one_line


@dataclass(frozen=True)
class Above:
    """The numbers above a number."""

    low: float

    def __contains__(self, value: float) -> bool:
        return value > self.low

    def __str__(self) -> str:
        return f"a number above {self.low:g}"


# Of the sizes of a tensor: a kernel holds each of them in 32 bits.
Size = Annotated[int, range(1, 2**31)]
Bytes = Annotated[int, range(2**60)]

_NAMES = {int: "a whole number", float: "a finite number", str: "text", bool: "true or false", dict: "an object"}
_NAMES |= {list: "a list", NoneType: "null"}


class _Unfit(Exception):
    """A value of another kind: its place, the value, and the kind that is expected there."""

    def __init__(self, place: str, value: Any, expected: str):
        super().__init__(place)
        self.place, self.value, self.expected = place, value, expected


def checked(kind: Any, value: Any, where: str, remedy: str) -> Any:
    """Return `value`, parsed from JSON, as a `kind`.

    Numbers that are keys become int, lists that are tuples become tuples, objects that are dataclasses become
    instances, and text becomes one line that a terminal can show. A TypedDict keeps keys that it does not know. Raises
    GlobeError, which begins with `where` and ends in `remedy`, for the first value that does not fit.
    """
    try:
        return _convert(kind, value, "")
    except _Unfit as unfit:
        found = "nothing" if unfit.value is MISSING else reprlib.repr(unfit.value)
        raise GlobeError(
            f"{where} has {found} as {unfit.place or 'its content'}, where GloBE expects {unfit.expected}; {remedy}."
        ) from None


def _convert(kind: Any, value: Any, place: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin is Annotated:
        whole, allowed = arguments
        if _convert(whole, value, place) not in allowed:
            expected = f"a whole number from {allowed[0]} to {allowed[-1]}" if isinstance(allowed, range) else allowed
            raise _Unfit(place, value, str(expected))
        return value
    if origin is Literal:
        if value not in arguments:
            raise _Unfit(place, value, " or ".join(arguments))
        return value
    if origin in (Union, UnionType):
        *others, last = (argument for argument in arguments if argument is not NoneType or value is None)
        for other in others:
            with suppress(_Unfit):
                return _convert(other, value, place)
        return _convert(last, value, place)
    if is_typeddict(kind) or is_dataclass(kind):
        return _fields(kind, _plain(dict, value, place), place)
    items = _plain({dict: dict, list: list, tuple: list}.get(origin, kind), value, place)
    if origin is dict:
        key_kind, of_value = arguments
        return {
            _key(key_kind, key, place): _convert(of_value, item, _inside(place, key)) for key, item in items.items()
        }
    if origin is list:
        return [_convert(arguments[0], item, _inside(place, number)) for number, item in enumerate(items)]
    if origin is tuple:
        if len(items) != len(arguments):
            raise _Unfit(place, value, f"a list of {len(arguments)}")
        pairs = enumerate(zip(arguments, items, strict=True))
        return tuple(_convert(inner, item, _inside(place, number)) for number, (inner, item) in pairs)
    return one_line(items) if isinstance(items, str) and not _is_plain_text(items) else items


def _is_plain_text(text: str) -> bool:
    return text.isprintable() and len(text) <= LONGEST


def _plain(kind: type, value: Any, place: str) -> Any:
    fits = isinstance(value, (int, float) if kind is float else kind)
    if not fits or (isinstance(value, bool) and kind is not bool):
        raise _Unfit(place, value, _NAMES[kind])
    if kind is float:
        try:
            finite = math.isfinite(value)
        except OverflowError:  # a whole number beyond every float
            finite = False
        if not finite:
            raise _Unfit(place, value, _NAMES[kind])
    return value


def _key(kind: type, key: str, place: str) -> Any:
    if kind is str:
        return key
    # one spelling of a number, so that no number comes twice
    if not (key.isascii() and key.isdigit() and len(key) < 10 and str(int(key)) == key):
        raise _Unfit(_inside(place, key), key, "a whole number as the key")
    return int(key)


@cache
def _hints(kind: Any) -> dict[str, Any]:
    hints = get_type_hints(kind, include_extras=True)
    return {name: get_args(hint)[0] if get_origin(hint) is NotRequired else hint for name, hint in hints.items()}


def _fields(kind: Any, value: Mapping[str, Any], place: str) -> Any:
    hints = _hints(kind)
    if is_dataclass(kind):
        needed = {f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING}
        if unknown := value.keys() - hints.keys():
            raise _Unfit(_inside(place, min(unknown)), value[min(unknown)], "nothing")
    else:
        needed = kind.__required_keys__
    for name in sorted(needed - value.keys()):
        raise _Unfit(_inside(place, name), MISSING, _expected(hints[name]))
    found = {name: _convert(hints[name], value[name], _inside(place, name)) for name in hints if name in value}
    return kind(**found) if is_dataclass(kind) else {**value, **found}  # pyright: ignore[reportCallIssue]


def _expected(kind: Any) -> str:
    origin = get_origin(kind)
    if origin is Annotated:
        return _expected(get_args(kind)[0])
    return _NAMES.get(list if origin is tuple else origin or kind, "an object")


def _inside(place: str, key: object) -> str:
    return f"{place}.{key}".lstrip(".") if isinstance(key, str) else f"{place}[{key}]"
