"""Options that hold lists, and options that need an extra, for commands that start fast."""

import importlib.util
from pathlib import Path

from foveal.core.errors import ArgumentError, ConfigError


def words(text: str | None) -> tuple[str, ...]:
    """`a, b` -> ("a", "b"); nothing -> ()."""
    return tuple(word.strip() for word in text.split(",")) if text else ()


def integers(option: str, text: str | None) -> tuple[int, ...]:
    """`1, 2` -> (1, 2); nothing -> (). Raises `ArgumentError`."""
    for word in words(text):
        if not word.isdecimal():
            raise ArgumentError(option, repr(word), "whole numbers, separated by commas")
    return tuple(map(int, words(text)))


def require_matplotlib(target: Path | None) -> None:
    """Before anything is measured, not after. Raises `ConfigError`."""
    if target is not None and importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(f"{target} needs matplotlib: pip install 'foveal[plots]'")
