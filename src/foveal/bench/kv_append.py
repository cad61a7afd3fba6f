"""What appending one token costs, by how full the memory is.

A ring and pages copy nothing of what is there, so the time must not depend on the fill; a cache
that is one growing tensor does. Every kind is filled anew for each fill and all fills of a kind are
timed in turn (`hardware.timer`). An append is what a decode step of a model does to its cache: one
token in every layer, the view that attention takes included, attention not.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from foveal.bench.attention import thinned
from foveal.bench.finding import BUSY, Check, Finding, of_samples
from foveal.bench.record import Run
from foveal.hardware.timer import WARM_UP_CALLS, Samples, interleave
from foveal.kv.cache import CacheShape, KVCache, Window
from foveal.kv.contiguous import ContiguousCache
from foveal.kv.paged import PagedCache
from foveal.kv.ring import RingBuffer, RingCache
from foveal.kv.store import PageStore

SHAPE = CacheShape(num_layers=4, batch=1, num_kv_heads=2, head_dim=64, value_dim=64)
"""That of the bundled model."""
DTYPE = torch.bfloat16
PAGE_SIZE = 64
FILLS = {"1 %": 0.01, "50 %": 0.5, "99 %": 0.99, "wrapped": 1.5}
APPENDS = 4
"""In a sample."""
RATIO = 1.2
"""Of the median times at the slowest fill and at the emptiest: more is a dependence."""

Append = Callable[[int], None]
"""Append so many tokens, one after the other."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """One way to keep the past."""

    name: str
    make: Callable[[int, int], Append]
    """(capacity, tokens that are there) -> what appends."""
    promised: bool = True
    """Whether its time must not depend on the fill."""


def measure(capacity: int, num_samples: int, run: Run) -> Iterator[Finding]:
    """Every kind at every fill; the last fill of each carries the ratio over all of them."""
    for kind in KINDS:
        appends = {}
        for name, share in FILLS.items():
            length = int(capacity * share)
            if share < 1:
                length = min(length, capacity - (num_samples + WARM_UP_CALLS) * APPENDS)
            appends[name] = partial(kind.make(capacity, max(1, length)), APPENDS)
        samples = interleave(appends, budget_s=0.0, min_samples=num_samples)
        medians = [one.median_s for one in samples.values()]
        busy = any(one.disturbed for one in samples.values())
        for name, found in samples.items():
            last = name == list(samples)[-1] and kind.promised
            check = Check(
                what="time of an append at the slowest fill over that at 1 %",
                value=None if busy else max(medians) / medians[0],
                at_most=RATIO,
                unless=BUSY,
            )
            yield _finding(kind, name, found, (check,) if last else (), capacity, run)


def _finding(
    kind: Kind, fill: str, samples: Samples, checks: tuple[Check, ...], capacity: int, run: Run
) -> Finding:
    shape = f"{SHAPE.num_layers} layers, {SHAPE.num_kv_heads} heads of {SHAPE.head_dim}"
    return Finding(
        benchmark="kv",
        part="append",
        title=f"Appending one token to {capacity:,} ({shape}, bfloat16, pages of {PAGE_SIZE})",
        subject={"cache": kind.name, "fill": fill},
        values={
            "append_s": samples.median_s / APPENDS,
            "best_s": samples.best_s / APPENDS,
            "quartiles_s": samples.spread_s / APPENDS,
            "longest_s": max(samples.counted) / APPENDS,
        },
        checks=checks,
        curve=of_samples(thinned(samples)),
        run=run,
    )


def _appending(cache: KVCache, length: int) -> Append:
    """A cache that is filled with so many tokens, and then appended to."""
    k, v = (torch.randn(1, SHAPE.num_kv_heads, 1024, SHAPE.head_dim).to(DTYPE) for _ in "kv")

    def append(num_tokens: int, at_once: int = 1) -> None:
        for start in range(0, num_tokens, at_once):
            size = min(at_once, num_tokens - start)
            for layer in range(SHAPE.num_layers):
                cache.append(layer, k[:, :, :size], v[:, :, :size])

    append(length, 1024)
    return append


def _ring(capacity: int, length: int) -> Append:
    return _appending(RingCache(SHAPE, Window(capacity), dtype=DTYPE), length)


def _paged(format: str, capacity: int, length: int) -> Append:
    num_pages = -(-capacity // PAGE_SIZE) + 2 + 1024 // PAGE_SIZE
    store = PageStore(SHAPE, num_pages, PAGE_SIZE, key_format=format, value_format=format)
    return _appending(PagedCache(store, window=Window(capacity), dtype=DTYPE), length)


def _growing(capacity: int, length: int) -> Append:
    return _appending(ContiguousCache(SHAPE, dtype=DTYPE), length)


def _buffer(capacity: int, length: int) -> Append:
    """Rings of plain rows: those of a token in each layer, keys and values side by side."""
    row = (2 * SHAPE.num_kv_heads, SHAPE.head_dim)
    buffers = [RingBuffer(capacity, row, dtype=DTYPE) for _ in range(SHAPE.num_layers)]
    rows = torch.randn(1, *row).to(DTYPE)
    for buffer in buffers:
        buffer.append(rows.expand(length, *row))

    def append(num_tokens: int) -> None:
        for _ in range(num_tokens):
            for buffer in buffers:
                buffer.append(rows)

    return append


def _concatenated(capacity: int, length: int) -> Append:
    """One tensor a layer that every token makes anew, as the simplest cache does."""
    shape = (1, SHAPE.num_kv_heads, length, SHAPE.head_dim)
    pairs = [[torch.randn(shape).to(DTYPE) for _ in "kv"] for _ in range(SHAPE.num_layers)]
    token = torch.randn(1, SHAPE.num_kv_heads, 1, SHAPE.head_dim).to(DTYPE)

    def append(num_tokens: int) -> None:
        for _ in range(num_tokens):
            for pair in pairs:
                pair[:] = [torch.cat([x, token], 2) for x in pair]

    return append


KINDS: tuple[Kind, ...] = (
    Kind(name="ring buffer", make=_buffer),
    Kind(name="ring", make=_ring),
    *(
        Kind(name=f"pages, {format}", make=partial(_paged, format))
        for format in ("bfloat16", "int8", "int4")
    ),
    Kind(name="contiguous, doubling", make=_growing, promised=False),
    Kind(name="contiguous, torch.cat", make=_concatenated, promised=False),
)
