"""`RecallView`: what is hot in one layer, and then the retired pages that its queries pick.

A page is ranked by the largest share of attention, over heads and queries, that its best key could
have beside what is hot: by the maximum of scale * score - lse, where the score is estimated from
the page's summary and the lse is what attention has found so far. A softcap, which keeps the order
of scores, is left out of it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from foveal.kv.cache import KVView, Sight, Window
from foveal.kv.store import PagedView
from foveal.kv.summary import Summaries
from foveal.kv.tiers import Tiers

Turn = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]
"""(layer, keys [n, Hkv, S, D], positions int64 [n]) -> the keys, rotated back by so much, or forth
where that is negative."""

TILE_TOKENS = 1024
"""Tokens of each sequence that are fetched at a time."""


@dataclass(kw_only=True, slots=True, eq=False)
class Recollection:
    """The retired pages of a batch, how they are picked, and how many have been."""

    tiers: Tiers
    summaries: Summaries
    window: Window
    """Sinks in whole pages."""
    num_pages: int
    """That a sequence may pick in each layer and step."""
    place: int | None
    """At which position the first key of every page stands; None for its own."""
    ranking: str
    num_fetched: int = 0
    """Pages of one layer each."""

    def pick(self, layer: int, sight: Sight, rows: torch.Tensor) -> torch.Tensor:
        """int64 [B, n]: the best parts of the sequences `rows` [B], ascending, -1 for none."""
        parts = self._visible(sight, self.summaries.parts[rows, : self.summaries.num_used])
        num_picked = min(self.num_pages, int((parts >= 0).sum(1).amax())) if parts.numel() else 0
        if not num_picked:
            return parts[:, :0]
        unseen = (sight.positions < 0)[:, None, :, None]
        q = sight.q if self.place is None else sight.far_q
        ranks = [
            (scores * sight.scale - sight.lse.unsqueeze(-1))
            .masked_fill(unseen, -torch.inf)
            .amax((1, 2))
            for scores in self.summaries.scores(layer, q, rows, self.ranking)
        ]
        ranked = torch.cat(ranks, dim=1).masked_fill(parts < 0, -torch.inf)
        picked = parts.gather(1, ranked.topk(num_picked, dim=1).indices).sort(dim=1).values
        self.num_fetched += int((picked >= 0).sum())
        return picked

    def _visible(self, sight: Sight, parts: torch.Tensor) -> torch.Tensor:
        """-1 in place of the parts that a layer's own window hides from every query."""
        size = self.tiers.page_size
        if self.place is None:
            return parts.masked_fill((parts + 1) * size <= sight.first, -1)
        seen = sees_far(sight, self.window, self.place + size)
        return parts if seen else torch.full_like(parts, -1)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RecallView:
    """One layer of a batch."""

    hot: PagedView
    recollection: Recollection
    sequences: torch.Tensor
    """int64 [B]: which rows of the batch these are."""

    @property
    def window(self) -> None:
        """All that it yields may be seen."""

    @property
    def num_rows(self) -> int:
        """B."""
        return self.hot.num_rows

    def rows(self, index: torch.Tensor) -> "RecallView":
        """The same of some of the sequences."""
        return replace(self, hot=self.hot.rows(index), sequences=self.sequences[index])

    def tiles(self, sight: Sight) -> Iterator[KVView]:
        """What is hot, of which the sinks come first; then the pages picked, in order."""
        told, far = self.recollection, None
        if told.place is not None:
            far = told.window.from_sinks(sight.positions)
            columns = told.window.sinks // told.tiers.page_size
            if sees_far(sight, told.window, told.window.sinks):
                everything = replace(sight, first=0)
                for tile in self._columns(slice(columns)).tiles(everything):
                    yield replace(tile, q_positions=far)
            yield from self._columns(slice(columns, None)).tiles(sight)
        else:
            yield from self.hot.tiles(sight)
        yield from self._recalled(sight, far)

    def _columns(self, columns: slice) -> PagedView:
        """Some of the hot pages; those of the sinks are each sequence's first."""
        table, starts = self.hot.table[:, columns], self.hot.starts[:, columns]
        return replace(self.hot, table=table, starts=starts)

    def _recalled(self, sight: Sight, far: torch.Tensor | None) -> Iterator[KVView]:
        layer, told, arena = self.hot.layer, self.recollection, self.hot.store.arena
        size = told.tiers.page_size
        picked = told.pick(layer, sight, self.sequences)
        offsets, num_parts = torch.arange(size, device=picked.device), max(1, TILE_TOKENS // size)
        for start in range(0, picked.shape[1], num_parts):
            parts = picked[:, start : start + num_parts]
            there = (parts >= 0).unsqueeze(2)
            starts = parts.unsqueeze(2) * size if told.place is None else told.place
            places = (starts + offsets).expand(*parts.shape, size)
            keys = self._keys(parts)
            told.tiers.promote(keys)
            with arena.frame():
                k, v = (
                    x.view(len(x), self.num_rows, parts.shape[1] * size, -1).transpose(0, 1)
                    for x in told.tiers.read(layer, keys, self.hot.dtype, arena)
                )
                yield KVView(k, v, torch.where(there, places, -1).flatten(1), q_positions=far)

    def _keys(self, parts: torch.Tensor) -> list[tuple[int, int]]:
        """Of the parts [B, n], row by row; where there is none, of any that is there."""
        rows = zip(self.sequences.tolist(), parts.tolist(), strict=True)
        keys = [(row, part) for row, of_row in rows for part in of_row]
        some = next(key for key in keys if key[1] >= 0)
        return [key if key[1] >= 0 else some for key in keys]


def sees_far(sight: Sight, window: Window, num_keys: int) -> bool:
    """Whether the layer's own window reaches from where queries stand for far keys to the last of
    the first `num_keys` positions."""
    if not sight.first:
        return True
    lowest = int(sight.positions[sight.positions >= 0].min())
    return min(lowest, window.span - 1) - (num_keys - 1) <= lowest - sight.first
