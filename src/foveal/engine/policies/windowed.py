"""Window and sinks (StreamingLLM, Xiao et al. 2024), and the plain window."""

from dataclasses import dataclass
from typing import ClassVar

from foveal.core.dtypes import dtype_name
from foveal.core.errors import ArgumentError
from foveal.engine.policy import Policy, Storage
from foveal.kv.cache import ResumableCache, Window
from foveal.kv.formats import Scales, parse_format
from foveal.kv.paged import PagedCache
from foveal.kv.ring import RingCache
from foveal.kv.store import PageStore

_PAGE_SIZE = 16
"""Tokens of a page: what is kept beyond window and sinks is less than two pages."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sinks(Policy):
    """The first tokens and the last ones."""

    name: ClassVar[str] = "sinks"
    keeps: ClassVar[str] = "the first tokens (sinks) and the last ones (window)"
    costs: ClassVar[str] = "(sinks + window) keys and values; what lies between is forgotten"
    sinks: ClassVar[int] = 4

    def make(self, window: Window, storage: Storage) -> ResumableCache:
        """See `Policy.make`."""
        return windowed(window, storage)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plain(Policy):
    """The last tokens."""

    name: ClassVar[str] = "window"
    keeps: ClassVar[str] = "the last tokens (window)"
    costs: ClassVar[str] = (
        "window keys and values; many models lose their way once the first token has left it "
        "(Xiao et al. 2024)"
    )
    sinks: ClassVar[int] = 0

    def window(self, size: int, sinks: int) -> Window:
        """See `Policy.window`."""
        if sinks:
            raise ArgumentError("sinks", sinks, f"0 with policy {self.name!r}")
        return Window(size)

    def make(self, window: Window, storage: Storage) -> ResumableCache:
        """See `Policy.make`."""
        return windowed(window, storage)


def windowed(window: Window, storage: Storage) -> ResumableCache:
    """A ring where keys and values stay in the model's dtype, which moves nothing; else pages,
    just as many as window, sinks and one step can reach."""
    if storage.format == dtype_name(storage.dtype):
        return RingCache(storage.shape, window, dtype=storage.dtype, device=storage.device)
    if parse_format(storage.format).scales is Scales.CHANNEL:
        accepted = "a format with scales per token: a stream is stored token by token"
        raise ArgumentError("kv", repr(storage.format), accepted)
    reached = window.size - 1 + storage.step_tokens
    num_pages = -(-window.sinks // _PAGE_SIZE) + -(-reached // _PAGE_SIZE) + 1
    store = PageStore(
        storage.shape,
        num_pages,
        _PAGE_SIZE,
        key_format=storage.format,
        value_format=storage.format,
        device=storage.device,
    )
    return PagedCache(store, window=window, dtype=storage.dtype)
