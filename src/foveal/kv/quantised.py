"""`QuantisedCache`: what is recent in full precision, what is old in few bits.

Wraps a paged cache. Once every token of a page lies further back than the recent part, the page is
encoded into a second store, scales and all, and the paged cache gives its page up; nothing is ever
encoded twice. The sinks of a window stay in full precision: every query reads them, and they hold
the largest keys (Xiao et al. 2024; the recent part is as in KIVI, Liu et al. 2024). When the second
store is full, pages stay where they are until the first is full, too.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Self

import torch

from foveal.core.errors import ArgumentError, FovealError
from foveal.kv.age import old_parts, passed_parts
from foveal.kv.cache import CacheShape, CacheStats, JoinedView, Window
from foveal.kv.paged import PagedCache, keep, put_back
from foveal.kv.slots import Slots
from foveal.kv.store import PagedView, PageStore


class QuantisedCache:
    """A paged cache whose old pages are in another store. Implements `KVCache`."""

    def __init__(self, cache: PagedCache, store: PageStore, *, num_recent: int) -> None:
        """`cache`, empty, belongs to the wrapper from now on. Its last `num_recent` tokens of each
        sequence stay as they are; older pages go to `store`, in the formats of that."""
        if num_recent < 0:
            raise ArgumentError("num_recent", num_recent, "an integer of at least 0")
        if store.page_size != cache.store.page_size:
            accepted = f"pages of {cache.store.page_size} tokens, as in the cache"
            raise ArgumentError("store", f"pages of {store.page_size}", accepted)
        if cache.salt is not None:
            accepted = (
                "a cache without a salt: what a coded page holds depends on when the pages before "
                "it were coded, so equal tokens do not mean equal pages, and none are shared"
            )
            raise ArgumentError("cache", "one that shares prefixes", accepted)
        if cache.length:
            raise ArgumentError("cache", f"length {cache.length}", "an empty cache")
        self.store = store
        self.num_recent = num_recent
        self._recent = cache
        self._old: list[dict[int, int]] = [{} for _ in cache.tables]
        """Of each sequence, which part is in which page of `store`."""

    @property
    def length(self) -> int:
        """Slots so far, evicted ones included."""
        return self._recent.length

    @property
    def next_positions(self) -> torch.Tensor:
        """int64 [B]."""
        return self._recent.next_positions

    @property
    def window(self) -> Window | None:
        """What the wrapped cache keeps."""
        return self._recent.window

    @property
    def shape(self) -> CacheShape:
        """Of the wrapped cache."""
        return self._recent.shape

    @property
    def slots(self) -> Slots:
        """Its counts."""
        return self._recent.slots

    @property
    def nbytes(self) -> int:
        """Bytes of both stores, which other caches may share."""
        return self._recent.nbytes + self.store.nbytes

    @property
    def stats(self) -> CacheStats:
        """Counts for reports; a page that several sequences share counts once."""
        recent, pool = self._recent.stats, self.store.pool
        held = {page for pages in self._old for page in pages.values()}
        return replace(
            recent,
            capacity=recent.capacity + pool.num_pages * pool.page_size,
            used_bytes=recent.used_bytes + len(held) * self.store.page_bytes,
            allocated_bytes=self.nbytes,
        )

    def append(
        self, layer: int, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor | None = None
    ) -> JoinedView:
        """Store the keys and values of one layer; see `PagedCache.append`."""
        recent = self._recent.append(layer, k, v, positions)
        if layer == 0:
            ends = recent.lengths.tolist()
            self._view = PagedView.of(self.store, self._old, ends, recent.dtype, self.window)
        if layer == recent.store.shape.num_layers - 1:
            self._encode()
            self._evict()  # after it, because attention is yet to read what is evicted
        return JoinedView(self.window, (replace(self._view, layer=layer), recent))

    def view(self, layer: int) -> JoinedView:
        """What one layer holds between two steps."""
        ends = self.next_positions.tolist()
        old = PagedView.of(self.store, self._old, ends, self._recent.dtype, self.window)
        return JoinedView(self.window, (replace(old, layer=layer), self._recent.view(layer)))

    def leap(self, slots: Slots) -> None:
        """Go on from these counts; see `PagedCache.leap`."""
        self._recent.leap(slots)

    def truncate(self, length: int) -> None:
        """Forget every slot from `length` on. A page that ends in the middle is decoded."""
        ends, size = self._recent.ends_at(length), self.store.page_size
        for row, (pages, end) in enumerate(zip(self._old, ends, strict=True)):
            if end % size and end // size in pages:
                self._decode(row, end // size)
            gone = [part for part in pages if part * size >= end]
            self.store.pool.release([pages.pop(part) for part in gone])
        self._recent.truncate(length)

    def fork(self) -> Self:
        """A cache that shares every page until one of the two writes to it."""
        other = type(self).__new__(type(self))
        other.store, other.num_recent = self.store, self.num_recent
        other._recent = self._recent.fork()
        for pages in self._old:
            self.store.pool.share(pages.values())
        other._old = [dict(pages) for pages in self._old]
        return other

    def state(self) -> dict[str, torch.Tensor]:
        """That of the recent part, and old pages as they are stored; see `ResumableCache.state`."""
        old = {f"old.{name}": tensor for name, tensor in keep(self.store, self._old).items()}
        return {**self._recent.state(), **old}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Hold what `state` was taken of; see `PagedCache.restore`."""
        self.reset()
        old = {name[4:]: state[name] for name in state if name.startswith("old.")}
        try:
            self._recent.restore(state)
            self._old = put_back(self.store, old, self.next_positions.tolist())
        except FovealError:
            self._recent.reset()
            raise

    def reset(self) -> None:
        """Forget everything and give the pages back."""
        for pages in self._old:
            self.store.pool.release(list(pages.values()))
            pages.clear()
        self._recent.reset()

    def _encode(self) -> None:
        """Move every page that has become old."""
        size, source = self.store.page_size, self._recent.store
        due = old_parts(self._recent, self.num_recent)[: self.store.pool.num_available]
        if not due:
            return
        wide = torch.tensor([self._recent.tables[row].pages[part] for row, part in due])
        coded = self.store.pool.allocate(len(due))
        for layer in range(source.shape.num_layers):
            with source.arena.frame():
                k, v = source.read(layer, wide.to(source.device), self._recent.dtype)
                self.store.write_pages(layer, torch.tensor(coded, device=self.store.device), k, v)
        for (row, part), page in zip(due, coded, strict=True):
            self.store.pool.fill(page, size)
            self._recent.give_up(row, part)
            self._old[row][part] = page

    def _evict(self) -> None:
        """Give up pages that the window has passed."""
        keys = [(row, part) for row, pages in enumerate(self._old) for part in pages]
        for row, part in passed_parts(self._recent, keys):
            self.store.pool.release([self._old[row].pop(part)])

    def _decode(self, row: int, part: int) -> None:
        """Move a page back to the recent part, rounded as it is."""
        coded = torch.tensor([self._old[row][part]], device=self.store.device)
        target = self._recent.store
        wide = torch.tensor([self._recent.take_back(row, part)], device=target.device)
        for layer in range(target.shape.num_layers):
            with self.store.arena.frame():
                pages = self.store.read(layer, coded, self._recent.dtype)
                target.write_pages(layer, wide, *pages)
        self.store.pool.release([self._old[row].pop(part)])
