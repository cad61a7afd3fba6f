"""`TieredCache`: the last tokens in hot pages, all older ones in tiers, and every one visible.

Wraps a paged cache. Once every token of a page lies further back than the hot part, the page is
retired into the tiers, and attention reads it there: exactly, if the tiers keep full precision.
A step attends to the hot pages first and then scans the retired ones tile by tile, while the next
tile is read ahead. So it costs what attention over everything costs, and the bytes of all retired
pages through the slowest tier that they reach. Sinks of a window stay hot.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Self

import torch

from foveal.core.errors import ArgumentError, FovealError, OutOfPages
from foveal.kv.age import old_parts, passed_parts
from foveal.kv.cache import CacheShape, CacheStats, KVView, Sight, Window
from foveal.kv.layout import Key
from foveal.kv.paged import PagedCache
from foveal.kv.slots import Slots
from foveal.kv.store import TILE_TOKENS, PagedView
from foveal.kv.tiers import Tiers


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TieredView:
    """Hot pages and retired ones of N sequences in one layer."""

    hot: PagedView
    tiers: Tiers
    keys: tuple[tuple[Key, ...], ...]
    """Of the retired pages of each sequence."""
    layer: int

    @property
    def window(self) -> Window | None:
        """Of the hot part."""
        return self.hot.window

    @property
    def num_rows(self) -> int:
        """N."""
        return len(self.keys)

    def rows(self, index: torch.Tensor) -> "TieredView":
        """The same of some of the sequences."""
        keys = tuple(self.keys[row] for row in index.tolist())
        return replace(self, hot=self.hot.rows(index), keys=keys)

    def tiles(self, sight: Sight) -> Iterator[KVView]:
        """The hot tiles, then the retired pages that are in sight, some of each sequence at a
        time."""
        columns = self._columns(sight.first)
        if columns:
            self.tiers.prefetch(self.layer, _named(columns[0]))
        yield from self.hot.tiles(sight)
        for i, column in enumerate(columns):
            if i + 1 < len(columns):
                self.tiers.prefetch(self.layer, _named(columns[i + 1]))
            with self.tiers.arena.frame():
                yield self._tile(column)

    def _columns(self, first: int) -> list[list[list[Key | None]]]:
        """Keys of each tile, row by row; None where a sequence has fewer than another."""
        size = self.tiers.page_size
        seen = [[key for key in row if (key[1] + 1) * size > first] for row in self.keys]
        most, step = max(len(row) for row in seen), max(1, TILE_TOKENS // size)
        columns: list[list[list[Key | None]]] = []
        for start in range(0, most, step):
            width = min(step, most - start)
            rows = [row[start : start + width] for row in seen]
            columns.append([[*row, *[None] * (width - len(row))] for row in rows])
        return columns

    def _tile(self, column: list[list[Key | None]]) -> KVView:
        named = _named(column)
        size, device = self.tiers.page_size, self.hot.table.device
        k, v = (
            x.view(len(x), self.num_rows, len(column[0]) * size, -1).transpose(0, 1)
            for x in self.tiers.read(self.layer, named, self.hot.dtype, self.tiers.arena)
        )
        starts = [[-size if key is None else key[1] * size for key in row] for row in column]
        positions = torch.tensor(starts, device=device).unsqueeze(2) + torch.arange(
            size, device=device
        )
        return KVView(k, v, positions.clamp(min=-1).flatten(1))


class TieredCache:
    """A paged cache whose old pages are in tiers. Implements `ResumableCache`."""

    def __init__(self, cache: PagedCache, tiers: Tiers, *, num_hot: int) -> None:
        """`cache` and `tiers`, both empty, belong to the wrapper from now on. The last `num_hot`
        tokens of each sequence stay in the cache; older full pages go to the tiers."""
        if num_hot < 0:
            raise ArgumentError("num_hot", num_hot, "an integer of at least 0")
        if cache.length:
            raise ArgumentError("cache", f"length {cache.length}", "an empty cache")
        if tiers.forgets:
            raise ArgumentError("tiers", "tiers that forget", "tiers that keep all they are given")
        if tiers.keys:
            got = f"{len(tiers.keys)} pages"
            raise ArgumentError("tiers", got, "empty tiers (reset() gives up what a file holds)")
        tiers.layout.check(cache.store)
        self.tiers = tiers
        self.num_hot = num_hot
        self._hot = cache
        self._full: OutOfPages | None = None
        """Why the tiers took no more, last time."""

    @property
    def length(self) -> int:
        """Slots so far, evicted ones included."""
        return self._hot.length

    @property
    def next_positions(self) -> torch.Tensor:
        """int64 [B]."""
        return self._hot.next_positions

    @property
    def window(self) -> Window | None:
        """What the wrapped cache keeps."""
        return self._hot.window

    @property
    def shape(self) -> CacheShape:
        """Of the wrapped cache."""
        return self._hot.shape

    @property
    def slots(self) -> Slots:
        """Its counts."""
        return self._hot.slots

    @property
    def nbytes(self) -> int:
        """Bytes of memory of the hot store and of the tiers, which other caches may share; what
        is frozen takes none."""
        return self._hot.nbytes + self.tiers.nbytes

    @property
    def stats(self) -> CacheStats:
        """Counts for reports; capacity counts every tier, bytes those in memory."""
        hot = self._hot.stats
        return replace(
            hot,
            capacity=hot.capacity + self.tiers.capacity * self.tiers.page_size,
            used_bytes=hot.used_bytes + self.tiers.used_bytes,
            allocated_bytes=self.nbytes,
        )

    def append(
        self, layer: int, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor | None = None
    ) -> TieredView:
        """Store the keys and values of one layer; see `PagedCache.append`. When the tiers are full,
        or the disk is, pages stay hot until there is no room either; `OutOfPages` says why."""
        if layer == 0:
            # Not with the last layer: attention was yet to read what is given up.
            self.tiers.drop(passed_parts(self._hot, self.tiers.keys))
        try:
            hot = self._hot.append(layer, k, v, positions)
        except OutOfPages as error:
            if self._full is None:
                raise
            raise OutOfPages(f"{error}; older ones stay: {self._full}") from self._full
        if layer == 0:
            self._keys = self._keys_by_row()
        view = TieredView(hot=hot, tiers=self.tiers, keys=self._keys, layer=layer)
        if layer == self.shape.num_layers - 1:
            self._retire()
        return view

    def view(self, layer: int) -> TieredView:
        """What one layer holds between two steps."""
        keys = self._keys_by_row()
        return TieredView(hot=self._hot.view(layer), tiers=self.tiers, keys=keys, layer=layer)

    def leap(self, slots: Slots) -> None:
        """Go on from these counts; see `PagedCache.leap`."""
        self._hot.leap(slots)

    def truncate(self, length: int) -> None:
        """Forget every slot from `length` on. A page that ends in the middle becomes hot again."""
        ends, size = self._hot.ends_at(length), self.tiers.page_size
        for key in self.tiers.keys:
            row, part = key
            if part * size < ends[row] < (part + 1) * size:
                self._warm_up(key)
            elif part * size >= ends[row]:
                self.tiers.drop([key])
        self._hot.truncate(length)

    def fork(self) -> Self:
        """A cache that shares every page until one of the two writes to it."""
        return type(self)._of(self._hot.fork(), self.tiers.fork(), self.num_hot)

    def state(self) -> dict[str, torch.Tensor]:
        """That of the hot part, and the pages of every tier; see `ResumableCache.state`. Raises
        `LoadError` where a frozen page is lost."""
        return {**self._hot.state(), **self.tiers.state()}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Hold what `state` was taken of; see `PagedCache.restore`."""
        self.reset()
        try:
            self._hot.restore(state)
            self.tiers.restore(state)
        except FovealError:
            self.reset()
            raise

    def reset(self) -> None:
        """Forget everything and give the pages back."""
        self.tiers.reset()
        self._hot.reset()
        self._full = None

    def close(self) -> None:
        """Let go of the tiers; see `Tiers.close`."""
        self.tiers.close()

    @classmethod
    def _of(cls, hot: PagedCache, tiers: Tiers, num_hot: int) -> Self:
        other = cls.__new__(cls)
        other._hot, other.tiers, other.num_hot, other._full = hot, tiers, num_hot, None
        return other

    def _keys_by_row(self) -> tuple[tuple[Key, ...], ...]:
        rows: list[list[Key]] = [[] for _ in range(self.shape.batch)]
        for key in self.tiers.keys:
            rows[key[0]].append(key)
        return tuple(tuple(row) for row in rows)

    def _retire(self) -> None:
        """Move every page that has become old, as long as there is room."""
        self._full = None
        for row, part in old_parts(self._hot, self.num_hot):
            try:
                self.tiers.retire(
                    [(row, part)], self._hot.store, [self._hot.tables[row].pages[part]]
                )
            except OutOfPages as error:
                self._full = error
                return
            self._hot.give_up(row, part)

    def _warm_up(self, key: Key) -> None:
        """Move a page back to the hot part."""
        hot = self._hot.store
        page = torch.tensor([self._hot.take_back(*key)], device=hot.device)
        for layer in range(self.shape.num_layers):
            with self.tiers.arena.frame():
                k, v = self.tiers.read(layer, [key], self._hot.dtype, self.tiers.arena)
                hot.write_pages(layer, page, k, v)
        self.tiers.drop([key])


def _named(column: list[list[Key | None]]) -> list[Key]:
    """The keys of a tile, with another one in place of those that are not there: what is read
    there is not looked at."""
    other = next(key for row in column for key in row if key is not None)
    return [key or other for row in column for key in row]
