"""Sizes, durations and counts as text."""

import pytest

from globe_kernels import RequestError
from globe_kernels.units import format_bytes, format_count, format_seconds, parse_bytes


def test_sizes_are_read():
    sizes = {"20GiB": 20 * 2**30, "1.5 gb": 1_500_000_000, "800MB": 800_000_000, "12 B": 12, 34: 34, "1 TiB": 2**40}
    assert {size: parse_bytes(size) for size in sizes} == sizes
    for wrong in ("20 parsecs", "-1GB", "", "GiB", "1e9", -1, float("nan"), True):
        with pytest.raises(RequestError, match="is no size; give a number with a unit, such as 20GB"):
            parse_bytes(wrong)


def test_a_size_without_a_unit_is_refused():
    with pytest.raises(RequestError, match=r"'20' is a size without a unit; give for example 20GB or 20MB\."):
        parse_bytes("20")


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (5_898_240, "5.90 MB"),
        (9_996_000, "10.0 MB"),
        (99_960_000, "100 MB"),
        (999_600_000, "1.00 GB"),
        (61_100_000_000, "61.1 GB"),
        (1_342_000_000_000, "1.34 TB"),
        (5e18, "5000 PB"),
    ],
)
def test_sizes_have_three_digits(size, text):
    assert format_bytes(size) == text
    assert parse_bytes(text) == pytest.approx(size, rel=6e-3)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.42, "0.4 s"),
        (45, "45 s"),
        (119, "119 s"),
        (720, "12 minutes"),
        (11_500, "3.2 hours"),
        (682_560, "7.9 days"),
        (1e9, "11,574.1 days"),
    ],
)
def test_durations_are_words(seconds, text):
    assert format_seconds(seconds) == text


def test_counts_have_separators():
    assert format_count(1234567) == "1,234,567"
