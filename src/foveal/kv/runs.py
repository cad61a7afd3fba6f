"""`RunView`: pages laid out by their distance, of which each KV head sees those within its reach.

Heads that see as far see the same run of pages, so a layer is at most one tile for each different
reach, and the sinks, which all heads see. To observe attention, runs of one stride each are shown
to all heads, and the log-sum-exp of each says what share of its attention a query gave it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from foveal.kv.cache import KVView, Sight, Window
from foveal.kv.reach import Reaches
from foveal.kv.store import PagedView


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """Columns of pages that the same heads see."""

    columns: slice
    strides: int
    """From its first page to the step's first query, rounded up."""
    heads: torch.Tensor | None = None
    """int64 [n]: KV heads; None for all."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RunView:
    """One layer of the pages of N sequences."""

    window: Window
    sinks: PagedView
    """The pages with the sinks."""
    pages: PagedView
    """Column j of each sequence is the same number of pages away from its `origin`."""
    origin: torch.Tensor
    """int64 [N]: the part (position // S) of the step's first query."""
    stride: int
    """Pages."""
    runs: tuple[Run, ...] = ()
    observer: Reaches | None = None
    """Where to note what is observed, if anything is."""

    @property
    def num_rows(self) -> int:
        """N."""
        return self.pages.num_rows

    def rows(self, index: torch.Tensor) -> "RunView":
        """The same of some of the sequences."""
        sinks, pages = (
            replace(
                view,
                table=view.table[index],
                starts=view.starts[index],
                lengths=view.lengths[index],
            )
            for view in (self.sinks, self.pages)
        )
        return replace(self, sinks=sinks, pages=pages, origin=self.origin[index])

    def tiles(self, sight: Sight) -> Iterator[KVView]:
        """The sinks, far for all heads, and each run for its heads."""
        yield from self._sinks(sight)
        found: list[tuple[int, torch.Tensor]] = []
        for run in self.runs:
            for tile in columns(self.pages, run.columns).tiles(sight):
                yield self._beside_sinks(tile, run.heads)
                assert sight.tile_lse is not None
                found.append((run.strides, sight.tile_lse))
        if self.observer is not None and found:
            self._note(self.observer, sight, found)

    def _sinks(self, sight: Sight) -> Iterator[KVView]:
        num = self.window.sinks
        for tile in self.sinks.tiles(sight):
            assert tile.positions is not None
            positions = tile.positions.masked_fill(tile.positions >= num, -1)[:, :num]
            keys, values = tile.keys[:, :, :num], tile.values[:, :, :num]
            yield KVView(keys, values, positions, self.window.from_sinks(sight.positions))

    def _beside_sinks(self, tile: KVView, heads: torch.Tensor | None) -> KVView:
        assert tile.positions is not None
        rest = tile.positions.masked_fill(tile.positions < self.window.sinks, -1)
        if heads is None:
            return replace(tile, positions=rest)
        return KVView(tile.keys[:, heads], tile.values[:, heads], rest, heads=heads)

    def _note(
        self, observer: Reaches, sight: Sight, found: Sequence[tuple[int, torch.Tensor]]
    ) -> None:
        """Tell what each run got of the queries that have the whole window behind them."""
        counted = sight.positions >= self.window.size
        if not counted.any():
            return
        store = self.pages.store
        ahead = sight.positions // store.page_size - self.origin.unsqueeze(1)
        ahead = -(-ahead // self.stride)[counted]  # strides on from the step's first query
        distances = torch.stack([ahead + strides for strides, _ in found])
        lse = torch.stack([lse for _, lse in found])  # [R, N, H, T]
        shares = torch.exp(lse - sight.lse).nan_to_num(0.0)
        num_runs, num_rows, _, num_queries = shares.shape
        grouped = shares.view(num_runs, num_rows, store.shape.num_kv_heads, -1, num_queries)
        given = grouped.mean(3).transpose(1, 2)[:, :, counted]  # [R, Hkv, n]
        observer.note(self.pages.layer, distances, given)


def columns(view: PagedView, which: slice) -> PagedView:
    """The view of some of its columns."""
    return replace(view, table=view.table[:, which], starts=view.starts[:, which])


def lay_out(view: PagedView, origin: torch.Tensor, num_before: int) -> tuple[PagedView, int]:
    """The view's pages from `num_before` before each sequence's `origin` on, each in the column of
    its distance, and the distance of the first column, in pages."""
    offsets = view.starts // view.store.page_size - origin.unsqueeze(1)
    near = (view.table >= 0) & (offsets >= -num_before)
    first, last = (int(x) for x in offsets[near].aminmax()) if near.any() else (0, -1)
    table = view.table.new_full((len(origin), last - first + 1), -1)
    table[near.nonzero()[:, 0], offsets[near] - first] = view.table[near]
    parts = origin.unsqueeze(1) + torch.arange(first, last + 1, device=origin.device)
    return replace(view, table=table, starts=parts * view.store.page_size, window=None), first


def each_stride(first: int, num_columns: int, stride: int) -> tuple[Run, ...]:
    """A run for each stride of columns that begin at the distance `first`, for all heads."""
    farthest, nearest = -(first // stride), -((first + num_columns - 1) // stride)
    levels = [(strides, None) for strides in range(farthest, nearest - 1, -1)]
    return _runs(levels, first, num_columns, stride)


def within_reach(
    reaches: Sequence[int], first: int, num_columns: int, stride: int
) -> tuple[Run, ...]:
    """A run for each different reach, in strides, for the heads that reach it."""
    levels = []
    for level in sorted(set(reaches), reverse=True):
        heads = [head for head, reach in enumerate(reaches) if reach >= level]
        levels.append((level, None if len(heads) == len(reaches) else torch.tensor(heads)))
    return _runs(levels, first, num_columns, stride)


def _runs(
    levels: Sequence[tuple[int, torch.Tensor | None]], first: int, num_columns: int, stride: int
) -> tuple[Run, ...]:
    """Runs of which each ends where the next one begins; empty ones are left out."""
    begins = [max(0, -strides * stride - first) for strides, _ in levels]
    spans = zip(begins, [*begins[1:], num_columns], levels, strict=True)
    return tuple(Run(slice(begin, end), *level) for begin, end, level in spans if begin < end)
