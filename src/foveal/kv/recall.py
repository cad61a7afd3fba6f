"""`RecallCache`: old pages are retired, and the best of them fetched back for each step.

The last pages, and those of the sinks, stay hot. A page that the window has passed is retired to
`Tiers`, and a summary of its keys stays (`Summaries`). In each layer and step the queries attend to
what is hot first; then the retired pages are ranked by it, and the best of them that fit a budget
of bytes are fetched (Quest, Tang et al. 2024; InfLLM, Xiao et al. 2024). When the tiers are full,
the oldest pages are forgotten.

Distances are of two kinds. Exact: recalled keys are seen from where the queries are; if everything
is recalled this is full attention. Clamped: a page that retires is rotated to a fixed place, where
every query sees it from one distance, by the rotation with which it sees the sinks
(`Window.from_sinks`), and no distance exceeds what is hot. Nearer than right behind the window, a
small model copies what it finds much better, and very near it takes everything for what was just
said (see `docs/log.md`).

Every query of a step sees all that is hot and all that is recalled for the step. So, other than
with a plain window, which keys a query sees depends on how the text falls into steps.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

import torch

from foveal.core.errors import ArgumentError
from foveal.core.units import format_bytes
from foveal.kv.cache import CacheStats, Window
from foveal.kv.paged import PagedCache
from foveal.kv.recalled import TILE_TOKENS, RecallView, Recollection, Turn
from foveal.kv.shelf import TierStats
from foveal.kv.store import PageStore
from foveal.kv.summary import BLOCK_PAGES, RANKINGS, Summaries
from foveal.kv.tiers import Tiers

DISTANCES = ("clamped", "exact")
_STAGED_PAGES = 16
"""Pages that retire at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RecallConfig:
    """What stays, and what is fetched back. Raises `ArgumentError`."""

    window: Window
    """Last tokens that stay hot, and first ones, which are counted in whole pages."""
    budget: int
    """Bytes that one sequence may fetch in a step, in all layers: in each of them the pages whose
    bytes in all layers fit, budget // page_bytes."""
    distances: str = "clamped"
    """One of `DISTANCES`."""
    ranking: str = "spread"
    """One of `RANKINGS`."""
    behind: int | None = None
    """How far behind every query the last key of a clamped page stands: up to the window's size,
    which is right behind the window; None for half of it."""

    def __post_init__(self) -> None:
        for name, got, known in (
            ("distances", self.distances, DISTANCES),
            ("ranking", self.ranking, RANKINGS),
        ):
            if got not in known:
                raise ArgumentError(name, repr(got), ", ".join(known))
        if self.clamped and not self.window.sinks:
            accepted = "at least 1: with clamped distances recalled pages are seen as sinks are"
            raise ArgumentError("sinks", 0, accepted)
        if self.behind is not None and not 0 <= self.behind <= self.window.size:
            accepted = f"0 to the window of {self.window.size} tokens, or None for half of it"
            raise ArgumentError("behind", self.behind, accepted)

    @property
    def clamped(self) -> bool:
        """Whether distances are."""
        return self.distances == "clamped"

    def place(self, page_size: int) -> int | None:
        """At which position the first key of a clamped page stands, for queries at the last one
        that `Window.from_sinks` gives, with sinks in whole pages; None for exact distances."""
        if not self.clamped:
            return None
        behind = self.window.size // 2 if self.behind is None else self.behind
        sinks = -(-self.window.sinks // page_size) * page_size
        return sinks + self.window.size - 1 - behind - (page_size - 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class RecallStats(CacheStats):
    """What a cache holds, and what it has fetched back."""

    page_size: int
    num_retired: int
    """Pages in the tiers."""
    num_forgotten: int
    """Pages dropped because the tiers were full."""
    num_steps: int
    """Steps since this cache was made in which there was something to recall."""
    fetched_bytes: int
    """Read from the tiers for them."""
    summary_bytes: int
    """Of the allocated bytes, those of summaries."""
    tiers: tuple[TierStats, ...]

    @property
    def forgotten_tokens(self) -> int:
        """See `CacheStats`."""
        return self.num_forgotten * self.page_size

    @property
    def remarks(self) -> tuple[str, ...]:
        """Lines for a reader."""
        each = self.fetched_bytes / max(self.num_steps, 1)
        where = ", ".join(f"{tier.num_pages:,} {tier.name}" for tier in self.tiers)
        return (
            f"{self.num_retired:,} pages retired ({where}), {self.num_forgotten:,} forgotten; "
            f"summaries {format_bytes(self.summary_bytes)}",
            f"recalled {format_bytes(each)} in each of {self.num_steps:,} steps",
        )


class RecallCache:
    """A paged cache, and the retired pages behind it. Implements `ResumableCache`."""

    def __init__(
        self, cache: PagedCache, tiers: Tiers, config: RecallConfig, turn: Turn | None = None
    ) -> None:
        """`cache`, without a window of its own, and `tiers`, both empty, belong to the wrapper from
        now on. `turn` rotates the keys of a model back, which clamped distances need; None for a
        model that does not rotate any.
        """
        size = _check(cache, tiers, config)
        self.config = config
        self.window = Window(config.window.size, -(-config.window.sinks // size) * size)
        self._hot, self._tiers, self._turn = cache, tiers, turn
        device = cache.store.device
        self._summaries = Summaries(
            cache.shape, tiers.capacity // cache.shape.batch, dtype=cache.dtype, device=device
        )
        self._staging: PageStore | None = None
        if config.clamped and turn is not None:
            self._staging = _staging(cache)
        self._recollection = Recollection(
            tiers=tiers,
            summaries=self._summaries,
            window=self.window,
            num_pages=config.budget // tiers.page_bytes,
            place=config.place(size),
            ranking=config.ranking,
        )
        self._num_steps = 0

    @property
    def length(self) -> int:
        """Slots so far, forgotten ones included."""
        return self._hot.length

    @property
    def next_positions(self) -> torch.Tensor:
        """int64 [B]."""
        return self._hot.next_positions

    @property
    def nbytes(self) -> int:
        """Bytes of memory: of hot pages, tiers on device and host, summaries, and of the pages
        that are rotated back at a time."""
        staged = 0 if self._staging is None else self._staging.nbytes
        return self._hot.nbytes + self._tiers.nbytes + self._summaries.nbytes + staged

    def read_bytes(self, num_heads: int, num_tokens: int) -> int:
        """Bytes that one layer of a step of `num_tokens` takes at most, by estimate: its hot pages,
        and of retired ones

            records and decoded tensors of a tile of those that are picked
            + 4 * num_heads * num_tokens scores of a block of summaries, in 4 bytes
            + 4 times the block itself, in 4 bytes
        """
        shape, tiers = self._hot.shape, self._tiers
        num_pages = min(self._recollection.num_pages, max(1, TILE_TOKENS // tiers.page_size))
        slot_bytes = shape.slot_elements // shape.num_layers * self._hot.dtype.itemsize
        picked = num_pages * (tiers.layout.layer_bytes + 2 * tiers.page_size * slot_bytes)
        block = min(BLOCK_PAGES, self._summaries.capacity) * shape.batch
        scores = 4 * num_heads * num_tokens + 4 * shape.num_kv_heads * 2 * shape.head_dim
        return self._hot.nbytes // shape.num_layers + picked * shape.batch + 4 * block * scores

    @property
    def stats(self) -> RecallStats:
        """Counts for reports."""
        hot, told = self._hot.stats, self._recollection
        tiers = self._tiers.stats
        num_retired = len(self._tiers.keys)
        passed_by = sum(max(0, t.evicted - self.window.sinks) for t in self._hot.tables)
        in_memory = sum(tier.num_pages for tier in tiers if tier.name != "frozen")
        return RecallStats(
            length=self.length,
            capacity=hot.capacity + self._tiers.capacity * self._tiers.page_size,
            used_bytes=hot.used_bytes + in_memory * self._tiers.page_bytes,
            allocated_bytes=self.nbytes,
            num_growths=0,
            page_size=self._tiers.page_size,
            num_retired=num_retired,
            num_forgotten=passed_by // self._tiers.page_size - num_retired,
            num_steps=self._num_steps,
            fetched_bytes=told.num_fetched * self._tiers.layout.layer_bytes,
            summary_bytes=self._summaries.nbytes,
            tiers=tiers,
        )

    def append(
        self, layer: int, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor | None = None
    ) -> RecallView:
        """Store the keys and values of one layer; see `PagedCache.append`. What the last step has
        pushed out of the window retires first."""
        if layer == 0:
            self._retire()
            self._num_steps += self._summaries.num_used > 0
        hot = self._hot.append(layer, k, v, positions)
        sequences = torch.arange(self._hot.shape.batch, device=hot.table.device)
        return RecallView(hot=hot, recollection=self._recollection, sequences=sequences)

    def truncate(self, length: int) -> None:
        """Forget every slot from `length` on, if the window before it has not retired yet."""
        ends = self._hot.ends_at(length)
        for table, end in zip(self._hot.tables, ends, strict=True):
            first = max(0, end - self.window.size + 1)
            if length < self.length and first < end and table.evicted > first:
                accepted = f"the length {self.length}, or one whose window has not retired yet"
                raise ArgumentError("length", length, accepted)
        self._hot.truncate(length)

    def fork(self) -> Self:
        """A cache that shares every page, and the room for more, in hot pages and in the tiers."""
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._hot, other._tiers = self._hot.fork(), self._tiers.fork()
        other._summaries = self._summaries.copy()
        other._recollection = replace(
            self._recollection, tiers=other._tiers, summaries=other._summaries
        )
        return other

    def state(self) -> dict[str, torch.Tensor]:
        """Hot pages, retired pages and summaries; see `ResumableCache.state`."""
        return {**self._hot.state(), **self._tiers.state(), **self._summaries.state()}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Hold what `state` was taken of; see `ResumableCache.restore`. Raises `OutOfPages`, the
        cache being empty then, if there is too little room."""
        self.reset()
        try:
            self._summaries.restore(state)
            self._tiers.restore(state)
            self._hot.restore(state)
        except BaseException:
            self.reset()
            raise

    def reset(self) -> None:
        """Forget everything; memory stays allocated."""
        self._hot.reset()
        self._tiers.reset()
        self._summaries.clear()

    def close(self) -> None:
        """Give back the files and threads of the tiers."""
        self._tiers.close()

    def _retire(self) -> None:
        """Move what the window has passed by to the tiers."""
        size = self._tiers.page_size
        for row, end in enumerate(self.next_positions.tolist()):
            first, table = end - self.window.size + 1, self._hot.tables[row]
            due = [p for p in table.pages if self.window.sinks <= p * size <= first - size]
            if not due:
                continue
            due = self._make_room(row, due)
            for start in range(0, len(due), _STAGED_PAGES):
                self._move(row, due[start : start + _STAGED_PAGES])

    def _make_room(self, row: int, due: list[int]) -> list[int]:
        """Forget the oldest pages of a sequence where all would be more than its share of the
        tiers; says which of those due are left."""
        held = [key for key in self._tiers.keys if key[0] == row]
        surplus = max(0, len(held) + len(due) - self._summaries.capacity)
        self._tiers.drop(held[:surplus])
        self._summaries.forget(row, [part for _, part in held[:surplus]])
        passed_by = max(0, surplus - len(held))
        for part in due[:passed_by]:
            self._give_up(row, part)
        return due[passed_by:]

    def _move(self, row: int, parts: list[int]) -> None:
        """Move pages to the tiers, as they are or rotated to where they are to stand."""
        source = store = self._hot.store
        pages = [self._hot.tables[row].pages[part] for part in parts]
        index = torch.tensor(pages, device=source.device)
        for layer in range(self._hot.shape.num_layers):
            with source.arena.frame():
                k, v = source.read(layer, index, self._hot.dtype)
                if self._staging is not None:
                    k = self._turned(layer, k, parts)
                    staged = torch.arange(len(parts), device=source.device)
                    self._staging.write_pages(layer, staged, k, v)
                self._summaries.write(layer, row, parts, k)
        if self._staging is not None:
            store, pages = self._staging, list(range(len(parts)))
        forgotten = self._tiers.retire([(row, part) for part in parts], store, pages)
        for other, part in forgotten:
            self._summaries.forget(other, [part])
        self._summaries.hold(row, parts)
        for part in parts:
            self._give_up(row, part)

    def _turned(self, layer: int, k: torch.Tensor, parts: list[int]) -> torch.Tensor:
        """Keys [Hkv, n, S, D] of parts, rotated to the one place where they are to stand."""
        assert self._turn is not None and self._recollection.place is not None
        starts = torch.tensor(parts, device=k.device) * self._tiers.page_size
        by = starts - self._recollection.place
        return self._turn(layer, k.transpose(0, 1), by).transpose(0, 1)

    def _give_up(self, row: int, part: int) -> None:
        """Take a page from the hot ones."""
        self._hot.give_up(row, part)
        self._hot.tables[row].evicted = (part + 1) * self._tiers.page_size


def _check(cache: PagedCache, tiers: Tiers, config: RecallConfig) -> int:
    """S, if these fit together."""
    if cache.length or tiers.keys:
        got = f"length {cache.length}, {len(tiers.keys)} pages in tiers"
        raise ArgumentError("cache, tiers", got, "empty ones")
    if cache.window is not None:
        raise ArgumentError("cache", f"a cache with {cache.window}", "one without a window")
    if config.budget < tiers.page_bytes:
        accepted = f"at least a page, which takes {tiers.page_bytes:,} in all layers"
        raise ArgumentError("budget", f"{config.budget:,} bytes", accepted)
    if tiers.capacity < cache.shape.batch:
        accepted = f"room for a page of each of {cache.shape.batch} sequences"
        raise ArgumentError("tiers", f"room for {tiers.capacity} pages", accepted)
    tiers.layout.check(cache.store)
    return tiers.page_size


def _staging(cache: PagedCache) -> PageStore:
    """Where pages lie once they have been rotated back, in full precision."""
    key_format, value_format = (
        "float32" if format.quantised else format.name for format in cache.store.formats
    )
    return PageStore(
        cache.shape,
        _STAGED_PAGES,
        cache.store.page_size,
        key_format=key_format,
        value_format=value_format,
        device=cache.store.device,
    )
