"""`PageStore`: the tensors of all pages of all layers in one storage format, and their pool.

A store outlives caches and is shared by them: what a `PagedCache` holds is a table of page
numbers. Memory is allocated once; a page takes the same bytes whoever holds it. `PagedView` is such
tables together with the store, as attention takes them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from foveal.core.errors import ArgumentError
from foveal.kv.arena import Arena
from foveal.kv.cache import CacheShape, KVView, Sight, Window
from foveal.kv.formats import Format, Stored, parse_format
from foveal.kv.pages import PagePool

TILE_TOKENS = 1024
"""Tokens of each sequence that are gathered from their pages at a time."""

KeyValue = tuple[torch.Tensor, torch.Tensor]


class PageStore:
    """Keys [Hkv, pages, S, D] and values [Hkv, pages, S, Dv] of every layer, as stored.

    Heads come first so that the pages of a sequence, gathered, are the keys that attention takes
    without another copy.
    """

    def __init__(
        self,
        shape: CacheShape,
        num_pages: int,
        page_size: int,
        *,
        key_format: str = "float32",
        value_format: str = "float32",
        device: torch.device | str = "cpu",
    ) -> None:
        """Pages of `page_size` tokens for a model of this shape; its batch does not matter."""
        self.shape = shape
        self.pool = PagePool(num_pages, page_size)
        self.formats = (parse_format(key_format), parse_format(value_format))
        self.arena = Arena(device)
        """For what `read` gathers and decodes."""
        layers = range(shape.num_layers)
        self._keys = [self._empty(0, shape.head_dim, device) for _ in layers]
        self._values = [self._empty(1, shape.value_dim, device) for _ in layers]

    @property
    def page_size(self) -> int:
        """S: tokens of a page."""
        return self.pool.page_size

    @property
    def device(self) -> torch.device:
        """Where the pages are."""
        return self._keys[0].codes.device

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values, scales included."""
        return sum(stored.nbytes for stored in (*self._keys, *self._values))

    @property
    def page_bytes(self) -> int:
        """Bytes of one page in all layers."""
        return self.nbytes // self.pool.num_pages

    def write(
        self, layer: int, pages: torch.Tensor, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> None:
        """Store n tokens, k [Hkv, n, D] and v [Hkv, n, Dv], at slots [n] of pages [n].

        Not for formats with scales per channel, which store pages as a whole.
        """
        for format, stored, x in self._pairs(layer, k, v):
            token = format.encode(x.unsqueeze(2))
            stored.put((slice(None), pages, slots), Stored(*(t.squeeze(2) for t in token.tensors)))

    def write_pages(
        self, layer: int, pages: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> None:
        """Store n whole pages, k [Hkv, n, S, D] and v [Hkv, n, S, Dv]."""
        for format, stored, x in self._pairs(layer, k, v):
            stored.put((slice(None), pages), format.encode(x))

    def read(self, layer: int, pages: torch.Tensor, dtype: torch.dtype) -> KeyValue:
        """Keys [Hkv, n, S, D] and values [Hkv, n, S, Dv] of pages [n], in `dtype`.

        They lie in the arena, of which the caller has opened a frame.
        """
        k, v = (
            format.decode(stored, dtype, self.arena)
            for format, stored in zip(self.formats, self.select(layer, pages), strict=True)
        )
        return k, v

    def stored(self, layer: int) -> tuple[Stored, Stored]:
        """Keys and values of all pages as they are stored, [Hkv, pages, S, ...]."""
        return self._keys[layer], self._values[layer]

    def select(self, layer: int, pages: torch.Tensor) -> tuple[Stored, Stored]:
        """Keys and values of pages [n] as they are stored, [Hkv, n, S, ...]; in the arena, of which
        the caller has opened a frame."""
        keys, values = self._keys[layer], self._values[layer]
        return keys.select(pages, self.arena), values.select(pages, self.arena)

    def copies(self, pages: Sequence[int]) -> dict[str, torch.Tensor]:
        """These pages [n, ...] of every layer, as they are stored, by name."""
        index = torch.tensor(pages, dtype=torch.int64, device=self.device)
        return {name: tensor[index] for name, tensor in self._tensors().items()}

    def take_in(self, copies: Mapping[str, torch.Tensor]) -> list[int]:
        """Allocate pages for such copies, in their order. Raises `ArgumentError` for copies of
        another kind of page, and `OutOfPages`."""
        for name, tensor in self._tensors().items():
            given = copies[name] if name in copies else torch.empty(0)
            if given.shape[1:] != tensor.shape[1:] or given.dtype != tensor.dtype:
                got = f"{given.dtype} of shape {list(given.shape)}"
                accepted = f"{tensor.dtype} of shape [n, {str(list(tensor.shape[1:]))[1:]}"
                raise ArgumentError(f"state {name}", got, accepted)
        pages = self.pool.allocate(copies["keys.0.0"].shape[0])
        index = torch.tensor(pages, dtype=torch.int64, device=self.device)
        for name, tensor in self._tensors().items():
            tensor[index] = copies[name].to(tensor.device)
        return pages

    def copy(self, source: int, target: int) -> None:
        """Make one page equal another, in every layer."""
        for stored in (*self._keys, *self._values):
            for tensor in stored.tensors:
                tensor[:, target] = tensor[:, source]

    def _tensors(self) -> dict[str, torch.Tensor]:
        """Everything that is stored, seen page first."""
        return {
            f"{name}.{layer}.{i}": tensor.transpose(0, 1)
            for name, every in (("keys", self._keys), ("values", self._values))
            for layer, stored in enumerate(every)
            for i, tensor in enumerate(stored.tensors)
        }

    def _pairs(
        self, layer: int, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[tuple[Format, Stored, torch.Tensor], ...]:
        return (
            (self.formats[0], self._keys[layer], k),
            (self.formats[1], self._values[layer], v),
        )

    def _empty(self, which: int, size: int, device: torch.device | str) -> Stored:
        heads = self.shape.num_kv_heads
        shape = (heads, self.pool.num_pages, self.page_size, size)
        return self.formats[which].empty(shape, device)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PagedView:
    """Pages of N sequences in one layer."""

    store: PageStore
    layer: int
    dtype: torch.dtype
    """In which tiles come."""
    table: torch.Tensor
    """int64 [N, C]: page numbers in any order, -1 for none."""
    starts: torch.Tensor
    """int64 [N, C]: the position in the first slot of each page."""
    lengths: torch.Tensor
    """int64 [N]: slots of positions at or beyond this hold nothing."""
    window: Window | None = None

    def __post_init__(self) -> None:
        if self.table.ndim != 2:
            raise ArgumentError("table", f"shape {list(self.table.shape)}", "[N, C]")
        for name, x, shape in (
            ("starts", self.starts, self.table.shape),
            ("lengths", self.lengths, self.table.shape[:1]),
        ):
            if x.shape != shape:
                raise ArgumentError(name, f"shape {list(x.shape)}", f"{list(shape)}")
        if self.table.device.type == "cpu" and self.table.numel():
            low, high = (int(x) for x in self.table.aminmax())
            if low < -1 or high >= self.store.pool.num_pages:
                accepted = f"pages 0 to {self.store.pool.num_pages - 1}, or -1 for none"
                raise ArgumentError("table", f"numbers from {low} to {high}", accepted)

    @classmethod
    def of(
        cls,
        store: PageStore,
        tables: Sequence[Mapping[int, int]],
        lengths: list[int],
        dtype: torch.dtype,
        window: Window | None,
    ) -> "PagedView":
        """Layer 0 of sequences of these lengths, each of which has some parts (position // S) in
        some pages."""
        num_columns = max(len(table) for table in tables)
        pages = torch.full((len(tables), num_columns), -1)
        parts = torch.zeros_like(pages)
        for row, table in enumerate(tables):
            count = len(table)  # by way of NumPy: a tensor of many Python integers is slow to make
            pages[row, :count] = torch.from_numpy(np.fromiter(table.values(), np.int64, count))
            parts[row, :count] = torch.from_numpy(np.fromiter(table, np.int64, count))
        return cls(
            store=store,
            layer=0,
            dtype=dtype,
            table=pages.to(store.device),
            starts=(parts * store.page_size).to(store.device),
            lengths=torch.tensor(lengths, device=store.device),
            window=window,
        )

    @property
    def num_rows(self) -> int:
        """N."""
        return self.table.shape[0]

    def rows(self, index: torch.Tensor) -> "PagedView":
        """The same of some of the sequences, without the columns that these do not have."""
        table, starts = self.table[index], self.starts[index]
        used = (table >= 0).any(0)
        return replace(
            self, table=table[:, used], starts=starts[:, used], lengths=self.lengths[index]
        )

    def tiles(self, sight: Sight) -> Iterator[KVView]:
        """Some pages of each sequence at a time, gathered and decoded; columns that hold nothing
        but sinks and what no query sees are passed over."""
        size = self.store.page_size
        num_columns = max(1, TILE_TOKENS // size)
        offsets = torch.arange(size, device=self.table.device)
        all_table, all_starts = self._seen(sight.first)
        for begin in range(0, all_table.shape[1], num_columns):
            columns = slice(begin, begin + num_columns)
            table, starts = all_table[:, columns], all_starts[:, columns]
            positions = starts.unsqueeze(2) + offsets
            there = (table >= 0).unsqueeze(2) & (positions < self.lengths[:, None, None])
            with self.store.arena.frame():
                pages = table.clamp(min=0).flatten()
                k, v = (
                    x.view(len(x), self.num_rows, table.shape[1] * size, -1).transpose(0, 1)
                    for x in self.store.read(self.layer, pages, self.dtype)
                )
                yield KVView(k, v, torch.where(there, positions, -1).flatten(1))

    def _seen(self, first: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tables and starts without the columns that hold only positions below `first` and no
        sinks."""
        sinks = 0 if self.window is None else self.window.sinks
        seen = (self.starts + self.store.page_size > first) | (self.starts < sinks)
        used = (seen & (self.table >= 0)).any(0)
        return self.table[:, used], self.starts[:, used]
