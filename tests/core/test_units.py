"""Quantities read and written."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foveal.core.errors import ArgumentError
from foveal.core.units import format_bytes, format_count, format_s, parse_bytes, parse_s


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("0", 0),
        ("4096", 4096),
        ("4096B", 4096),
        ("1K", 1024),
        ("1KB", 1000),
        ("1KiB", 1024),
        ("200MiB", 200 * 2**20),
        ("200 mib", 200 * 2**20),
        ("1.5GB", 1_500_000_000),
        ("1.5G", 3 * 2**29),
        ("2TiB", 2**41),
    ],
)
def test_parse_bytes(text: str, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["", "MiB", "-1", "1 PiB", "1..5K", "one", "1iB2"])
def test_parse_bytes_refuses(text: str) -> None:
    with pytest.raises(ArgumentError, match=r"--memory: got .*200MiB"):
        parse_bytes(text, "--memory")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("20ms", 0.02), ("1.5 s", 1.5), ("0.99", 0.99), ("3e-4", 3e-4), ("7us", 7e-6), ("7 µs", 7e-6)],
)
def test_parse_s(text: str, seconds: float) -> None:
    assert parse_s(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "ms", "-1", "1 min", "1..5s", "nan"])
def test_parse_s_refuses(text: str) -> None:
    with pytest.raises(ArgumentError, match=r"time: got .*a number, of seconds if no unit"):
        parse_s(text)


@given(st.integers(0, 2**45))
def test_bytes_survive_a_round_trip_to_the_printed_digit(num_bytes: int) -> None:
    shown = format_bytes(num_bytes)
    assert parse_bytes(shown) == pytest.approx(num_bytes, rel=0.06)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(3e-9, "3 ns"), (4.2e-5, "42 µs"), (0.0123, "12.3 ms"), (1.5, "1.5 s"), (125, "2 min 5 s")],
)
def test_format_s(seconds: float, text: str) -> None:
    assert format_s(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"), [(7, "7"), (1234, "1.23 k"), (2.5e6, "2.5 M"), (4e9, "4 G"), (1e12, "1 T")]
)
def test_format_count(number: float, text: str) -> None:
    assert format_count(number) == text
