"""Sizes, counts and times as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pennyweight.units import parse_bytes, parse_count, parse_rate, parse_seconds, show_bytes, show_seconds

SIZES = [
    ("0", 0),
    ("63", 63),
    ("257 B", 257),
    ("1kB", 1000),
    ("1KiB", 1024),
    ("2.3kB", 2300),  # 2.3 * 1000 is a hair under 2300 in floating point
    ("700MB", 700_000_000),
    ("3GiB", 3 * 2**30),
    ("  3 gib ", 3 * 2**30),
    ("1.5GiB", 3 * 2**29),
    ("1TB", 10**12),
    ("2TiB", 2**41),
]


@pytest.mark.parametrize(("text", "count"), SIZES)
def test_sizes_in_decimal_and_binary_units(text, count):
    assert parse_bytes(text) == count


def test_a_share_is_of_something():
    assert parse_bytes("22%", whole=1000) == 220
    assert parse_bytes(" 29 % ", whole=100) == 29  # 29 * 0.01 * 100 is a hair under 29 in floating point
    assert parse_bytes("12.5%", whole=8) == 1
    assert parse_bytes("100%", whole=257) == 257
    assert parse_bytes("3GiB", whole=5) == 3 * 2**30  # a size stays a size


def test_a_share_of_nothing_is_refused_and_the_way_out_is_named():
    with pytest.raises(ValueError, match=r"'22%'.*share of; write bytes, like 3GiB"):
        parse_bytes("22%")


@pytest.mark.parametrize(
    "text", ["", " ", "GiB", "3 giraffes", "-3GiB", "3,5GiB", "1e9", "3GiB 2", "0x10", "nan", "5tok/s"]
)
def test_what_is_no_size_is_refused_with_an_example(text):
    with pytest.raises(ValueError) as err:
        parse_bytes(text)
    assert str(err.value) == f"{text!r} is not a size; write it like 3GiB, 700MB or 12000000"


@pytest.mark.parametrize("text", ["%", "22%%", "half%", "3GiB%"])
def test_what_is_no_share_is_refused_with_an_example(text):
    with pytest.raises(ValueError) as err:
        parse_bytes(text, whole=100)
    assert str(err.value) == f"{text!r} is not a share; write it like 22%"


def test_counts_of_tokens_are_in_powers_of_two():
    assert [parse_count(text) for text in ("1", "100", "8k", "8K", "1m", "1.5k")] == [1, 100, 8192, 8192, 2**20, 1536]
    with pytest.raises(ValueError, match=r"'8 kB' is not a number of tokens; write it like 8k or 512"):
        parse_count("8 kB")


def test_times():
    assert [parse_seconds(text) for text in ("2", "1.5s", "40ms", "250us")] == pytest.approx([2.0, 1.5, 0.04, 250e-6])
    with pytest.raises(ValueError, match=r"'2 min' is not a time; write it like 40ms or 1.5s"):
        parse_seconds("2 min")


def test_rates():
    assert parse_rate("500tok/s") == parse_rate("500") == parse_rate(" 500 Tok/s ") == 500.0
    with pytest.raises(ValueError, match=r"'500/s' is not a rate; write it like 500tok/s"):
        parse_rate("500/s")


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (1023, "1023 B"),
        (1023.9, "1.00 KiB"),
        (1024, "1.00 KiB"),
        (2**20 - 1, "1.00 MiB"),
        (1536, "1.50 KiB"),
        (-1536, "-1.50 KiB"),
        (3 * 2**30, "3.00 GiB"),
        (5000 * 2**40, "5000.00 TiB"),
    ],
)
def test_showing_sizes(count, text):
    assert show_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 us"),
        (63e-6, "63 us"),
        (0.0042, "4.20 ms"),
        (0.99999, "999.99 ms"),
        (0.999999, "1.0 s"),
        (1, "1.0 s"),
        (59.9, "59.9 s"),
        (59.96, "1:00"),
        (60, "1:00"),
        (75, "1:15"),
        (3599.4, "59:59"),
        (3599.6, "1:00:00"),
        (7261, "2:01:01"),
    ],
)
def test_showing_times(seconds, text):
    assert show_seconds(seconds) == text


@settings(deadline=None, derandomize=True)
@given(st.integers(0, 2**50))
def test_a_size_that_was_shown_can_be_typed_back_in(count):
    assert parse_bytes(show_bytes(count)) == pytest.approx(count, rel=0.005)


@settings(deadline=None, derandomize=True)
@given(st.integers(0, 2**53))
def test_whole_bytes_are_kept_exactly(count):
    assert parse_bytes(f"{count}") == parse_bytes(f"{count}B") == count
