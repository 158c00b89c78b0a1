"""Sizes, durations and counts as text: read from a person, written for a person.

One system of units: 1 kB is 1000 bytes, 1 GB is 1e9 bytes. Binary units (GiB) are read and never written.
"""

import re
from collections.abc import Sequence

from globe_kernels.errors import RequestError

_PREFIXES = "kMGTP"
_FACTORS = {"b": 1, **{f"{p}b".lower(): 1000**i for i, p in enumerate(_PREFIXES, 1)}}
_FACTORS |= {f"{p}ib".lower(): 1024**i for i, p in enumerate(_PREFIXES, 1)}
_MINUTE, _HOUR, _DAY = 60, 3600, 86400


def parse_bytes(size: str | float) -> int:
    """Return the bytes that a text such as "20GB", "1.5 TB" or "512 MiB" stands for; a number is bytes already.

    Raises RequestError for a text without a unit: nobody means 20 bytes by "20".
    """
    if isinstance(size, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", size.lower())
        if match and not match[2]:
            raise RequestError(f"{size!r} is a size without a unit; give for example {match[1]}GB or {match[1]}MB.")
        if match and match[2] in _FACTORS:
            return int(float(match[1]) * _FACTORS[match[2]])
    elif not isinstance(size, bool) and 0 <= size < float("inf"):
        return int(size)
    raise RequestError(f"{size!r} is no size; give a number with a unit, such as 20GB or 800MB.")


def format_bytes(size: float) -> str:
    """Write bytes in the unit that leaves three digits, such as 5.90 MB."""
    if size < 999.5:
        return f"{size:.0f} B"
    power = 1
    while size / 1000**power >= 999.5 and power < len(_PREFIXES):
        power += 1
    return f"{three_digits(size / 1000**power, '')} {_PREFIXES[power - 1]}B"


def in_one_unit(sizes: Sequence[float]) -> tuple[str, list[str]]:
    """Write bytes in the unit of the largest size: (unit, numbers)."""
    unit = format_bytes(max(sizes)).split()[1]
    return unit, [three_digits(size / _FACTORS[unit.lower()]) if size else "0" for size in sizes]


def three_digits(value: float, separator: str = ",") -> str:
    """Write a number with three digits, or with all digits before its point, such as 1.50 or 12,345."""
    return f"{value:{separator}.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}"


def format_seconds(seconds: float) -> str:
    """Write a duration in words, such as 45 s, 12 minutes, 3.2 hours or 7.9 days."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 2 * _MINUTE:
        return f"{seconds:.0f} s"
    if seconds < 2 * _HOUR:
        return f"{seconds / _MINUTE:.0f} minutes"
    return f"{seconds / _HOUR:.1f} hours" if seconds < 2 * _DAY else f"{seconds / _DAY:,.1f} days"


def format_count(count: float) -> str:
    """Write a whole number with separators, such as 12,345."""
    return f"{count:,.0f}"
