"""Quantities for people: bytes, seconds and large counts, read and written."""

import re

from foveal.core.errors import ArgumentError

_BINARY = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*$", re.IGNORECASE)


_TIME = re.compile(r"^\s*(\d+(?:\.\d+)?(?:e-?\d+)?)\s*(s|ms|us|µs)?\s*$", re.IGNORECASE)
_SECONDS = {"": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6}


def parse_s(text: str, argument: str = "time") -> float:
    """`20ms` -> 0.02; a bare number is seconds."""
    match = _TIME.match(text)
    if match is None:
        raise ArgumentError(argument, repr(text), "a number, of seconds if no unit such as ms says")
    number, unit = match.groups(default="")
    return float(number) * _SECONDS[unit.lower()]


def parse_bytes(text: str, argument: str = "size") -> int:
    """`200MiB` -> 209715200; `1.5GB` -> 1500000000; a bare number is bytes.

    `KiB` and its kin are powers of 1024, `KB` powers of 1000, and `200M` means MiB.
    """
    match = _SIZE.match(text)
    if match is None:
        raise ArgumentError(argument, repr(text), "a size such as 200MiB, 1.5GB or 4096")
    number, prefix, binary = match.groups()
    decimal = text.strip().upper().endswith("B") and not binary and prefix
    unit = 1000 ** "KMGT".index(prefix.upper()) * 1000 if decimal else _BINARY[prefix.upper()]
    return int(float(number) * unit)


def format_bytes(num_bytes: float) -> str:
    """209715200 -> `200.0 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(num_bytes) < 1024:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


def format_s(seconds: float) -> str:
    """0.0123 -> `12.3 ms`."""
    if seconds >= 120:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    for factor, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "µs")):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def format_count(number: float) -> str:
    """1234567 -> `1.23 M`; powers of 1000."""
    for factor, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= factor:
            return f"{number / factor:.3g} {unit}"
    return f"{number:.3g}"
