"""Every kind of cache, listed once: what is added here is put to the same tests as all others."""

from collections.abc import Callable
from dataclasses import dataclass

from foveal.kv.cache import CacheShape, KVCache, Window
from foveal.kv.contiguous import ContiguousCache
from foveal.kv.ring import RingCache


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheKind:
    """One kind of cache, with settings small enough to meet their limits soon."""

    name: str
    make: Callable[[CacheShape, int], KVCache]
    """A float32 cache with room for at least this many tokens of each sequence."""
    window: Window | None = None
    """What it keeps; None for everything."""
    error: float = 0.0
    """Largest error that storing may cause, relative to the largest key or value."""


def _ring(size: int, sinks: int) -> CacheKind:
    window = Window(size, sinks)
    return CacheKind(
        name=f"ring of {size} and {sinks} sinks",
        make=lambda shape, tokens: RingCache(shape, window),
        window=window,
    )


CACHES: tuple[CacheKind, ...] = (
    CacheKind(name="contiguous", make=lambda shape, tokens: ContiguousCache(shape)),
    CacheKind(
        name="contiguous, fixed",
        make=lambda shape, tokens: ContiguousCache(shape, capacity=tokens),
    ),
    _ring(1, 0),
    _ring(6, 0),
    _ring(5, 3),
)
