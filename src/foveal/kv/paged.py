"""`PagedCache`: each sequence is a table of pages that lie anywhere in a store.

Nothing is ever moved: growing takes a page, forking shares all pages and copies one when it is
written, forgetting (by truncation, or because the window has passed) gives pages back, and a
prompt that begins like an earlier one takes up that one's pages (PagedAttention, Kwon et al. 2023).
At most one page per sequence is partly empty. Pads are not stored: the token at position p is in
slot p mod S of the sequence's page p // S.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Self

import torch

from foveal.core.errors import ArgumentError, OutOfPages
from foveal.kv.cache import CacheStats, Window, check_append
from foveal.kv.formats import Scales
from foveal.kv.prefix import Salt, chain
from foveal.kv.slots import Slots
from foveal.kv.store import PagedView, PageStore


@dataclass(slots=True)
class PageTable:
    """The pages of one sequence."""

    pages: dict[int, int] = field(default_factory=dict)
    """Which part of the sequence (position // S), ascending, is in which page."""
    digests: list[bytes] = field(default_factory=list)
    """Hashes of the first parts, as far as they have been published or taken up."""
    evicted: int = 0
    """Positions below this, other than sinks, have been given up to the window."""


class PagedCache:
    """A batch of sequences over a store of pages. Implements `KVCache`.

    `reset` gives the pages back; a cache that is thrown away without it keeps them from others.
    """

    def __init__(
        self,
        store: PageStore,
        *,
        batch: int | None = None,
        window: Window | None = None,
        dtype: torch.dtype = torch.float32,
        salt: Salt | None = None,
    ) -> None:
        """`dtype` is that of the keys and values that come and go, whatever the store's format.
        `salt` says what they depend on beside tokens, window and format; None shares no prefix.
        """
        if any(format.scales is Scales.CHANNEL for format in store.formats):
            accepted = "formats that take token by token; wrap a cache in QuantisedCache instead"
            raise ArgumentError("store", "scales per channel, which take whole pages", accepted)
        self.store = store
        self.shape = replace(store.shape, batch=batch or store.shape.batch)
        self.window = window
        self.dtype = dtype
        self.tables = [PageTable() for _ in range(self.shape.batch)]
        self.salt = salt
        self._like = torch.empty(0, dtype=dtype, device=store.device)
        self._slots = Slots(self.shape.batch, store.device)
        self._written = 0
        self._step = torch.empty(self.shape.batch, 0, dtype=torch.int64, device=store.device)
        """[B, T]: positions of the step under way."""

    @property
    def length(self) -> int:
        """Slots so far, evicted ones included."""
        return self._slots.length

    @property
    def next_positions(self) -> torch.Tensor:
        """int64 [B]."""
        return self._slots.next

    @property
    def slots(self) -> Slots:
        """Its counts."""
        return self._slots

    @property
    def nbytes(self) -> int:
        """Bytes of the whole store, which other caches may share."""
        return self.store.nbytes

    @property
    def stats(self) -> CacheStats:
        """Counts for reports; a page that several sequences share counts once."""
        held = {page for table in self.tables for page in table.pages.values()}
        return CacheStats(
            length=self.length,
            capacity=self.store.pool.num_pages * self.store.page_size,
            used_bytes=len(held) * self.store.page_bytes,
            allocated_bytes=self.nbytes,
            num_growths=0,
        )

    def append(
        self, layer: int, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor | None = None
    ) -> PagedView:
        """Store the keys and values of one layer; see `KVCache.append`.

        Positions, if given, go on from `next_positions` without a gap. Raises `OutOfPages`, at
        layer 0 and without a trace, if the store cannot hold the step.
        """
        slots = self._step.shape[1]
        check_append(self.shape, self._like, layer, k, v, written=self._written, slots=slots)
        if layer == 0:
            self._begin(positions, k.shape[2])
        real = self._step >= 0
        k, v = k.transpose(0, 1)[:, real], v.transpose(0, 1)[:, real]
        self.store.write(layer, self._pages, self._step[real] % self.store.page_size, k, v)
        view = replace(self._view, layer=layer)
        self._written = layer + 1
        if self._written == self.shape.num_layers:
            self._finish()
        return view

    def view(self, layer: int) -> PagedView:
        """What one layer holds between two steps."""
        self._release_beyond()
        return replace(self._view_up_to(self._slots.next.tolist()), layer=layer)

    def leap(self, slots: Slots) -> None:
        """Go on from these counts, as if the tokens in between had come and been forgotten.

        Of a page in which a sequence goes on, the slots before are zero.
        """
        for table, start, end in zip(
            self.tables, self._slots.next.tolist(), slots.next.tolist(), strict=True
        ):
            if start < end:
                self._skip(table, start, end)
        self._slots = slots.copy()

    def truncate(self, length: int) -> None:
        """Forget every slot from `length` on, if the window before it is still there."""
        ends = self.ends_at(length)
        self._slots.truncate(length)
        self._written = 0
        self._release_beyond()
        for table, end in zip(self.tables, ends, strict=True):
            del table.digests[end // self.store.page_size :]
            table.evicted = min(table.evicted, end)

    def ends_at(self, length: int) -> list[int]:
        """Where each sequence ends once truncated to `length` slots; raises as `truncate`."""
        if not 0 <= length <= self.length:
            raise ArgumentError("length", length, f"0 to the cache's length {self.length}")
        tokens: list[int] = self._slots.tokens_before(length).tolist()
        for table, end, now in zip(self.tables, tokens, self._slots.next.tolist(), strict=True):
            if self.window is not None and end < now:
                first = max(0, end - self.window.size + 1)
                if first < end and table.evicted > first:
                    accepted = f"the length {self.length}, or one whose window is not evicted yet"
                    raise ArgumentError("length", length, accepted)
        return tokens

    def give_up(self, row: int, part: int) -> None:
        """Give the page of one part of a sequence back; whoever calls keeps what it holds."""
        self.store.pool.release([self.tables[row].pages.pop(part)])

    def take_back(self, row: int, part: int) -> int:
        """A full page for a part that had been given up; whoever calls writes it."""
        (page,) = self.store.pool.allocate()
        self.store.pool.fill(page, self.store.page_size)
        table = self.tables[row]
        table.pages = dict(sorted([*table.pages.items(), (part, page)]))
        return page

    def fork(self) -> Self:
        """A cache that shares every page until one of the two writes to it."""
        self._release_beyond()
        other = type(self)(
            self.store,
            batch=self.shape.batch,
            window=self.window,
            dtype=self.dtype,
            salt=self.salt,
        )
        other._slots = self._slots.copy()
        for mine in self.tables:
            self.store.pool.share(mine.pages.values())
        other.tables = [
            PageTable(dict(mine.pages), list(mine.digests), mine.evicted) for mine in self.tables
        ]
        return other

    def state(self) -> dict[str, torch.Tensor]:
        """Pages as they are stored, tables and counts; see `ResumableCache.state`. What has been
        published is not part of it."""
        self._release_beyond()
        state = {**self._slots.state(), **keep(self.store, [table.pages for table in self.tables])}
        for row, table in enumerate(self.tables):
            state[f"evicted.{row}"] = torch.tensor(table.evicted)
        return state

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Hold what `state` was taken of; see `ResumableCache.restore`. Raises `OutOfPages`, the
        cache being empty then, if the store has too little room."""
        self.reset()
        ends = state["next"].tolist() if "next" in state else []
        tables = put_back(self.store, state, ends)
        self._slots.restore(state)
        for row, (table, pages) in enumerate(zip(self.tables, tables, strict=True)):
            table.pages, table.evicted = pages, int(state[f"evicted.{row}"])

    def reset(self) -> None:
        """Forget everything and give the pages back."""
        for table in self.tables:
            self.store.pool.release(list(table.pages.values()))
        self.tables = [PageTable() for _ in self.tables]
        self._slots = Slots(self.shape.batch, self.store.device)
        self._written = 0

    def reuse(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        """Take up the pages that the store knows of each prompt's beginning, into an empty cache.

        Returns how many tokens of each prompt need not be computed any more: whole pages, and
        never the last token. Shorter beginnings count as padded on the left.
        """
        if self.length or len(prompts) != self.shape.batch:
            accepted = f"{self.shape.batch} prompts and an empty cache"
            raise ArgumentError("prompts", f"{len(prompts)}, length {self.length}", accepted)
        size, start = self.store.page_size, self._start()
        counts = []
        for table, tokens in zip(self.tables, prompts, strict=True):
            digests = chain(start, tokens[:-1], size)
            pages = self.store.pool.match(digests)
            table.pages, table.digests = dict(enumerate(pages)), digests[: len(pages)]
            counts.append(len(pages) * size)
        taken = torch.tensor(counts, device=self.store.device).unsqueeze(1)
        longest = max(counts)
        positions = torch.arange(longest, device=self.store.device) - longest + taken
        self._slots.advance(positions.clamp(min=-1))
        return counts

    def publish(self, tokens: Sequence[Sequence[int]]) -> None:
        """Let others take up the full pages of these sequences, given all their tokens so far.

        Pages computed after an eviction are never shared.
        """
        size, start = self.store.page_size, self._start()
        for table, given, length in zip(
            self.tables, tokens, self._slots.next.tolist(), strict=True
        ):
            if len(given) < length:
                raise ArgumentError("tokens", f"{len(given)} of a sequence", f"all {length}")
            if table.evicted:
                continue
            known = len(table.digests)
            last = table.digests[-1] if known else start
            fresh = chain(last, given[known * size : length], size)
            for part, digest in enumerate(fresh, start=known):
                self.store.pool.publish(table.pages[part], digest)
            table.digests += fresh

    def _start(self) -> bytes:
        if self.salt is None:
            raise ArgumentError("salt", None, "a Salt, given to the cache, to share prefixes by")
        key_format, value_format = (format.name for format in self.store.formats)
        window = "" if self.window is None else f"{self.window.size}+{self.window.sinks}"
        whole = replace(
            self.salt,
            key_format=key_format,
            value_format=value_format,
            window=f"{self.salt.window} {window}",
        )
        return whole.digest()

    def _begin(self, positions: torch.Tensor | None, num_slots: int) -> None:
        """Secure the step's pages in every sequence, or in none."""
        self._written = 0
        step = self._slots.place(positions, num_slots)
        self._release_beyond()
        ends = (self._slots.next + (step >= 0).sum(1)).tolist()
        try:
            for table, start, end in zip(self.tables, self._slots.next.tolist(), ends, strict=True):
                self._secure(table, start, end)
        except OutOfPages:
            self._release_beyond()
            raise
        self._step, size = step, self.store.page_size
        rows = zip(self.tables, step.tolist(), strict=True)
        pages = [table.pages[p // size] for table, row in rows for p in row if p >= 0]
        self._pages = torch.tensor(pages, dtype=torch.int64, device=self.store.device)
        self._view = self._view_up_to(ends)

    def _view_up_to(self, ends: list[int]) -> PagedView:
        """Layer 0 of all pages, each sequence up to its end."""
        pages = [table.pages for table in self.tables]
        return PagedView.of(self.store, pages, ends, self.dtype, self.window)

    def _skip(self, table: PageTable, start: int, end: int) -> None:
        """Let positions start .. end - 1 of one sequence be forgotten before they came."""
        part, slot = divmod(end, self.store.page_size)
        if slot:
            if part not in table.pages:
                (table.pages[part],) = self.store.pool.allocate()
            page = table.pages[part]
            skipped = torch.arange(max(0, slot - (end - start)), slot, device=self.store.device)
            for layer in range(self.shape.num_layers):
                zeros = (
                    self._like.new_zeros(self.shape.num_kv_heads, len(skipped), size)
                    for size in (self.shape.head_dim, self.shape.value_dim)
                )
                self.store.write(layer, torch.full_like(skipped, page), skipped, *zeros)
            self.store.pool.fill(page, slot)
        table.evicted = end

    def _secure(self, table: PageTable, start: int, end: int) -> None:
        """Make positions start .. end - 1 of one sequence writable."""
        pool, size = self.store.pool, self.store.page_size
        part, slot = divmod(start, size)
        if slot and start < end:
            page = table.pages[part]
            fresh = table.pages[part] = pool.writable(page, slot)
            if fresh != page:
                self.store.copy(page, fresh)
        parts = range(-(-start // size), -(-end // size))
        table.pages.update(zip(parts, pool.allocate(len(parts)), strict=True))

    def _finish(self) -> None:
        """Count the step, and give up the pages that no later query may see."""
        before = self._slots.next.tolist()
        self._slots.advance(self._step)
        self._written = 0
        size = self.store.page_size
        for table, start, end in zip(self.tables, before, self._slots.next.tolist(), strict=True):
            for part in range(start // size, -(-end // size)) if start < end else ():
                self.store.pool.fill(table.pages[part], min(size, end - part * size))
            if self.window is not None:
                self._evict(table, end - self.window.size + 1)

    def _evict(self, table: PageTable, first: int) -> None:
        """Give up pages of nothing but positions below `first` that are no sinks."""
        assert self.window is not None
        size = self.store.page_size
        passed = takewhile(lambda part: (part + 1) * size <= first, table.pages)
        for part in list(passed):
            if part * size >= self.window.sinks:
                self.store.pool.release([table.pages.pop(part)])
                table.evicted = (part + 1) * size

    def _release_beyond(self) -> None:
        """Give back pages that hold no token of a finished step."""
        size = self.store.page_size
        for table, end in zip(self.tables, self._slots.next.tolist(), strict=True):
            while table.pages and next(reversed(table.pages)) * size >= end:
                self.store.pool.release([table.pages.popitem()[1]])


def keep(store: PageStore, tables: Sequence[Mapping[int, int]]) -> dict[str, torch.Tensor]:
    """Pages of a store that these tables hold, as they are stored, and the tables, by name."""
    held = sorted({page for pages in tables for page in pages.values()})
    state = store.copies(held)
    for row, pages in enumerate(tables):
        places = [[part, held.index(page)] for part, page in pages.items()]
        state[f"table.{row}"] = torch.tensor(places, dtype=torch.int64).reshape(-1, 2)
    return state


def put_back(
    store: PageStore, state: Mapping[str, torch.Tensor], ends: list[int]
) -> list[dict[int, int]]:
    """Tables of sequences that end at `ends`, over pages allocated for what `keep` gave. Raises
    `ArgumentError` for another kind of page, and `OutOfPages`."""
    pages = store.take_in(state)
    size, untaken = store.page_size, set(pages)
    tables: list[dict[int, int]] = [{} for _ in ends]
    for row, (table, end) in enumerate(zip(tables, ends, strict=True)):
        for part, place in state[f"table.{row}"].tolist():
            page = table[part] = pages[place]
            if page in untaken:
                untaken.remove(page)
                store.pool.fill(page, min(size, end - part * size))
            else:
                store.pool.share([page])
    return tables
