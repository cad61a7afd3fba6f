"""`DynamicCache`: a window of its own for each layer and KV head, as long as its attention is.

Wraps a paged cache with a window, the maximum, and sinks. A head sees the sinks and the pages
within its reach, counted from the page of the step's first query: every query sees at least that
much, and at most the maximum. Reaches follow the attention that is observed (`reach.py`): on every
n-th step all heads see all that is held, stride by stride. Only queries with the whole maximum
behind them count; before there are any, every head reaches the maximum.

A page holds all layers and heads. It is given up when no head reaches it any more: that is the
memory saved, and what is given up does not come back. A reach can grow up to what is held, and
beyond as tokens arrive, up to the maximum. What is held beyond a head's own reach costs that head
no time. Sinks stand right before the current maximum whatever a head's reach (`Window.from_sinks`),
so no distance is longer than in the window that the cache was made with.
"""

from collections.abc import Mapping
from copy import copy, deepcopy
from dataclasses import dataclass, fields, replace
from typing import Self

import torch

from foveal.core.errors import ArgumentError
from foveal.core.units import format_bytes
from foveal.kv.cache import CacheStats, Window
from foveal.kv.pace import Pace, Target
from foveal.kv.paged import PagedCache
from foveal.kv.reach import Reaches
from foveal.kv.runs import RunView, columns, each_stride, lay_out, within_reach
from foveal.kv.store import PagedView

_STRIDES = 16
"""Distances that are told apart up to the maximum, at most: a stride is the pages this makes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DynamicStats(CacheStats):
    """What a dynamic cache has found out."""

    maximum: int
    """Tokens that no reach exceeds now."""
    reaches: tuple[tuple[int, ...], ...]
    """Tokens, of each layer and KV head."""
    saved_bytes: int
    """Of the pages that a fixed window, as long as this cache's at first, would hold besides."""

    @property
    def mean_reach(self) -> float:
        """Tokens, over layers and heads."""
        every = [reach for layer in self.reaches for reach in layer]
        return sum(every) / len(every)

    @property
    def longest_reach(self) -> int:
        """Tokens."""
        return max(max(layer) for layer in self.reaches)

    @property
    def remarks(self) -> tuple[str, ...]:
        """See `CacheStats.remarks`."""
        return (
            f"reach: mean {self.mean_reach:.0f}, longest {self.longest_reach}, at most "
            f"{self.maximum} tokens; {format_bytes(self.saved_bytes)} less held than by a fixed "
            "window",
        )


class DynamicCache:
    """A paged cache whose heads see as far as they look. Implements `ResumableCache`."""

    def __init__(
        self,
        cache: PagedCache,
        *,
        minimum: int,
        mass: float = 0.9,
        every: int = 16,
        target: Target | None = None,
    ) -> None:
        """`cache`, empty and with a window, belongs to the wrapper from now on. Reaches hold
        `mass` of the attention observed on every `every`-th step; they are from `minimum` tokens
        to the window, rounded up to strides. With a `target`, the maximum follows it, where steps
        are reported to `after_step`."""
        if cache.window is None or cache.length:
            got = f"length {cache.length}, window {cache.window}"
            raise ArgumentError("cache", got, "an empty cache with a window")
        if not max(1, cache.window.sinks) <= minimum <= cache.window.size:
            accepted = f"{max(1, cache.window.sinks)} to the window of {cache.window.size} tokens"
            raise ArgumentError("minimum", minimum, accepted)
        if every < 1:
            raise ArgumentError("every", every, "an integer of at least 1")
        self.minimum = minimum
        self.every = every
        self._cache, self._first_window = cache, cache.window
        self._size = cache.store.page_size
        self._stride = -(-cache.window.size // (self._size * _STRIDES))
        longest = self._strides(cache.window.size)
        self._seen = Reaches(cache.shape.num_layers, cache.shape.num_kv_heads, longest, mass)
        self._num_steps = 0
        self._pace = None
        if target is not None:
            size = cache.window.size
            self._pace = Pace(target, minimum=minimum, maximum=size, page_size=self._size)

    @property
    def length(self) -> int:
        """Slots so far, evicted ones included."""
        return self._cache.length

    @property
    def next_positions(self) -> torch.Tensor:
        """int64 [B]."""
        return self._cache.next_positions

    @property
    def window(self) -> Window:
        """The current maximum, and the sinks: no query sees more."""
        assert self._cache.window is not None
        return self._cache.window

    @property
    def maximum(self) -> int:
        """Tokens that no reach exceeds. May be set between steps, from `minimum` to the window that
        the cache was made with: a lower one gives pages up at once, with a higher one reaches may
        grow again."""
        return self.window.size

    @maximum.setter
    def maximum(self, tokens: int) -> None:
        if not self.minimum <= tokens <= self._first_window.size:
            accepted = f"{self.minimum} to {self._first_window.size} tokens"
            raise ArgumentError("maximum", tokens, accepted)
        self._cache.window = replace(self._first_window, size=tokens)
        self._give_up()

    @property
    def nbytes(self) -> int:
        """Bytes of the whole store, which other caches may share."""
        return self._cache.nbytes

    @property
    def stats(self) -> DynamicStats:
        """Counts for reports; a page that several sequences share counts once."""
        counts = self._cache.stats
        tokens = self._stride * self._size
        return DynamicStats(
            **{field.name: getattr(counts, field.name) for field in fields(CacheStats)},
            maximum=self.maximum,
            reaches=tuple(
                tuple(min(reach * tokens, self.maximum) for reach in layer)
                for layer in self._reaches()
            ),
            saved_bytes=self._num_saved() * self._cache.store.page_bytes,
        )

    def seen(self, layer: int, head: int, row: int = 0) -> list[int]:
        """Positions before the next step that a KV head sees in it, ascending. (Those of them that
        have left the window of a later query, that one does not.)"""
        self._give_up()
        end = int(self.next_positions[row])
        reach = self._seen.longest if self._samples() else self._reaches()[layer][head]
        first = max(0, end // self._size - reach * self._stride) * self._size
        pages = self._cache.tables[row].pages
        sinks = range(min(self.window.sinks, first, end))
        return [*sinks, *(p for p in range(first, end) if p // self._size in pages)]

    def append(
        self, layer: int, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor | None = None
    ) -> RunView:
        """Store the keys and values of one layer; see `PagedCache.append`."""
        if layer == 0:
            self._give_up()
            origin, samples = self.next_positions // self._size, self._samples()
            self._begin(self._cache.append(0, k, v, positions), origin, samples)
        else:
            self._cache.append(layer, k, v, positions)
        self._num_steps += layer == self._cache.shape.num_layers - 1
        view = self._view
        return replace(
            view,
            sinks=replace(view.sinks, layer=layer),
            pages=replace(view.pages, layer=layer),
            runs=self._runs[layer],
        )

    def after_step(self, num_tokens: int, seconds: float) -> None:
        """Set the maximum by what a step of so many tokens took."""
        if self._pace is None:
            return
        chosen = self._pace.next_size(
            self.maximum,
            num_tokens=num_tokens,
            seconds=seconds,
            used_bytes=self._cache.stats.used_bytes,
        )
        if chosen != self.maximum:
            self.maximum = chosen

    def truncate(self, length: int) -> None:
        """Forget every slot from `length` on, if what the reaches then need is still there."""
        ends, longest = self._cache.ends_at(length), self._longest()
        nows = self.next_positions.tolist()
        for table, end, now in zip(self._cache.tables, ends, nows, strict=True):
            first = max(0, end // self._size - longest, (end - self.maximum + 1) // self._size)
            needed = range(first, -(-end // self._size)) if end < now else ()
            if not all(part in table.pages for part in needed):
                accepted = f"the length {self.length}, or one whose window is not evicted yet"
                raise ArgumentError("length", length, accepted)
        self._cache.truncate(length)

    def fork(self) -> Self:
        """A cache that shares every page until one of the two writes to it."""
        self._seen.settle()
        other = copy(self)
        other._cache, other._seen = self._cache.fork(), self._seen.copy()
        other._pace = deepcopy(self._pace)
        return other

    def state(self) -> dict[str, torch.Tensor]:
        """Pages, tables and counts, and what was observed; see `ResumableCache.state`."""
        self._seen.settle()
        counts = torch.tensor([self.maximum, self._num_steps, self._seen.weight])
        return {**self._cache.state(), "dynamic": counts, "shares": self._seen.shares}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Hold what `state` was taken of; see `PagedCache.restore`."""
        shape = self._seen.shares.shape
        if "shares" not in state or state["shares"].shape != shape:
            got = f"shape {list(state['shares'].shape)}" if "shares" in state else "nothing"
            raise ArgumentError("state shares", got, f"{list(shape)}")
        self.reset()
        self.maximum, self._num_steps, self._seen.weight = state["dynamic"].tolist()
        self._seen.shares = state["shares"].clone()
        self._cache.restore(state)

    def reset(self) -> None:
        """Forget everything but the maximum, and give the pages back."""
        self._cache.reset()
        self._seen.forget()
        self._num_steps = 0

    def _strides(self, tokens: int) -> int:
        """As many as hold so many tokens."""
        return -(-tokens // (self._stride * self._size))

    def _reaches(self) -> list[list[int]]:
        """Strides, of each layer and KV head."""
        self._seen.settle()
        return self._seen.strides(self._strides(self.minimum), self._strides(self.maximum))

    def _longest(self) -> int:
        """Pages before that of the next query which some head reaches."""
        return self._stride * max(max(layer) for layer in self._reaches())

    def _samples(self) -> bool:
        """Whether the next step is observed: every n-th, if its queries count."""
        due = self._num_steps % self.every == 0
        return due and int(self.next_positions.max()) >= self.maximum

    def _give_up(self) -> None:
        """Give up the pages that no head reaches any more."""
        longest, num_kept = self._longest(), -(-self.window.sinks // self._size)
        for row, end in enumerate(self.next_positions.tolist()):
            parts = self._cache.tables[row].pages
            for part in [p for p in parts if num_kept <= p < end // self._size - longest]:
                self._cache.give_up(row, part)

    def _num_saved(self) -> int:
        """Pages that the first window would hold and this cache does not."""
        if not self.length:
            return 0  # nor is there a sequence to ask, where a cache is only priced
        missing = 0
        for table, end in zip(self._cache.tables, self.next_positions.tolist(), strict=True):
            first = max(0, end - self._first_window.size + 1) // self._size
            missing += sum(p not in table.pages for p in range(first, -(-end // self._size)))
        return missing

    def _begin(self, view: PagedView, origin: torch.Tensor, samples: bool) -> None:
        """Lay the step's pages out."""
        pages, first = lay_out(view, origin, self._seen.longest * self._stride)
        self._view = RunView(
            window=self.window,
            sinks=columns(view, slice(-(-self.window.sinks // self._size))),
            pages=pages,
            origin=origin,
            stride=self._stride,
            observer=self._seen if samples else None,
        )
        place = (first, pages.table.shape[1], self._stride)
        self._runs = [
            each_stride(*place) if samples else within_reach(reaches, *place)
            for reaches in self._reaches()
        ]
