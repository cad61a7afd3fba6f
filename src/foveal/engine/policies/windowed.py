"""Window and sinks (StreamingLLM, Xiao et al. 2024), and the plain window."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from foveal.core.dtypes import dtype_name
from foveal.core.errors import ArgumentError
from foveal.engine.policy import Policy, Storage
from foveal.kv.cache import Window
from foveal.kv.formats import parse_format
from foveal.kv.paged import PagedCache
from foveal.kv.pour import Pourable
from foveal.kv.quantised import QuantisedCache
from foveal.kv.ring import RingCache
from foveal.kv.store import PageStore

_PAGE_SIZE = 16
"""Tokens of a page: what is kept beyond window and sinks is less than two pages."""
_CODED_PAGE_SIZES = (16, 32, 64)
_RECENT_TOKENS, _RECENT_PART = 64, 8
"""Last tokens that stay uncoded: so many, but no more than this part of the window."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sinks(Policy):
    """The first tokens and the last ones."""

    name: ClassVar[str] = "sinks"
    keeps: ClassVar[str] = "the first tokens (sinks) and the last ones (window)"
    costs: ClassVar[str] = "(sinks + window) keys and values; what lies between is forgotten"
    sinks: ClassVar[int] = 4

    def make(self, window: Window, storage: Storage) -> Pourable:
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

    def make(self, window: Window, storage: Storage) -> Pourable:
        """See `Policy.make`."""
        return windowed(window, storage)


def windowed(window: Window, storage: Storage) -> Pourable:
    """A cache of window and sinks: a ring where keys and values stay in the model's dtype, which
    moves nothing; pages in another floating-point format; and in a format of few bits, coded pages
    behind a recent part and sinks in the model's dtype."""
    if storage.format == dtype_name(storage.dtype):
        return RingCache(storage.shape, window, dtype=storage.dtype, device=storage.device)
    if parse_format(storage.format).quantised:
        return _quantised(window, storage)
    return paged(window, storage)


def paged(window: Window, storage: Storage) -> PagedCache:
    """Pages in the stream's format, just as many as window, sinks and one step can reach."""
    num_pages = _pages_of(window.sinks) + _pages_reached(window.size - 1 + storage.step_tokens)
    store = _store(storage, storage.format, num_pages, _PAGE_SIZE)
    return PagedCache(store, window=window, dtype=storage.dtype)


def _quantised(window: Window, storage: Storage) -> QuantisedCache:
    """Pages of the size that takes the fewest bytes: larger ones share their scales between more
    tokens, smaller ones leave fewer tokens uncoded."""
    meta = replace(storage, device=torch.device("meta"))
    size = min(_CODED_PAGE_SIZES, key=lambda size: _coded(window, meta, size).nbytes)
    return _coded(window, storage, size)


def _coded(window: Window, storage: Storage, page_size: int) -> QuantisedCache:
    """Just as many pages as a stream can reach, its steps falling on pages as they may. While the
    last layer still reads all that a step began with, what the step has made old is coded."""
    recent = min(_RECENT_TOKENS, window.size // _RECENT_PART)
    exact = _pages_of(window.sinks, page_size)
    exact += _pages_reached(recent + storage.step_tokens, page_size)
    old = max(1, window.size - 1 - recent)
    coded = min(_pages_of(old + storage.step_tokens, page_size), 2 * _pages_of(old, page_size))
    wide = _store(storage, dtype_name(storage.dtype), exact, page_size)
    few = _store(storage, storage.format, coded, page_size)
    cache = PagedCache(wide, window=window, dtype=storage.dtype)
    return QuantisedCache(cache, few, num_recent=recent)


def _store(storage: Storage, format: str, num_pages: int, page_size: int) -> PageStore:
    return PageStore(
        storage.shape,
        num_pages,
        page_size,
        key_format=format,
        value_format=format,
        device=storage.device,
    )


def _pages_of(num_tokens: int, page_size: int = _PAGE_SIZE) -> int:
    """Pages that these many tokens fill, from the beginning of a page."""
    return -(-num_tokens // page_size)


def _pages_reached(num_tokens: int, page_size: int = _PAGE_SIZE) -> int:
    """Pages in which these many tokens in a row may lie, wherever they begin."""
    return _pages_of(num_tokens - 1, page_size) + 1
