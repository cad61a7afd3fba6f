"""Every kind of cache, listed once: what is added here is put to the same tests as all others."""

from collections.abc import Callable
from dataclasses import dataclass

from foveal.kv.cache import CacheShape, KVCache, Window
from foveal.kv.contiguous import ContiguousCache
from foveal.kv.dynamic import DynamicCache
from foveal.kv.paged import PagedCache
from foveal.kv.quantised import QuantisedCache
from foveal.kv.ring import RingCache
from foveal.kv.store import PageStore
from foveal.kv.tiered import TieredCache
from foveal.kv.tiers import TierConfig, Tiers


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


def _paged(page_size: int, window: Window | None = None, format: str = "float32") -> CacheKind:
    def make(shape: CacheShape, tokens: int) -> PagedCache:
        num_pages = 2 * shape.batch * -(-tokens // page_size)  # as many again for a fork
        store = PageStore(shape, num_pages, page_size, key_format=format, value_format=format)
        return PagedCache(store, window=window)

    name = f"pages of {page_size}, {format}"
    if window is not None:
        name += f", window of {window.size} and {window.sinks} sinks"
    error = {"float32": 0.0, "bfloat16": 2**-9, "int8": 1 / 254}[format]
    return CacheKind(name=name, make=make, window=window, error=error)


def _quantised(
    key_format: str, value_format: str, error: float, window: Window | None = None
) -> CacheKind:
    def make(shape: CacheShape, tokens: int) -> QuantisedCache:
        recent = PageStore(shape, 2 * shape.batch * tokens // 4, 4)
        old = PageStore(shape, tokens, 4, key_format=key_format, value_format=value_format)
        return QuantisedCache(PagedCache(recent, window=window), old, num_recent=6)

    name = f"pages of 4, all but 6 tokens in {key_format} and {value_format}"
    if window is not None:
        name += f", window of {window.size} and {window.sinks} sinks"
    return CacheKind(name=name, make=make, window=window, error=error)


def _dynamic(page_size: int, window: Window) -> CacheKind:
    """Reaches that hold all of the attention: a fixed window, by another way."""

    def make(shape: CacheShape, tokens: int) -> DynamicCache:
        pages = _paged(page_size, window).make(shape, tokens)
        assert isinstance(pages, PagedCache)
        return DynamicCache(pages, minimum=window.sinks or 1, mass=1.0, every=2)

    name = f"pages of {page_size} within reach, window of {window.size} and {window.sinks} sinks"
    return CacheKind(name=name, make=make, window=window)


def _tiered(format: str, error: float, tiers: dict[str, int], window: Window | None) -> CacheKind:
    """Tiers with room for so many tokens; the last of them takes what is left."""
    *upper, last = tiers

    def make(shape: CacheShape, tokens: int) -> TieredCache:
        hot = PagedCache(PageStore(shape, 2 * shape.batch * tokens // 4, 4), window=window)
        room = {**tiers, last: 2 * shape.batch * tokens}  # as many again for a fork
        configs = [TierConfig(name=name, tokens=size) for name, size in room.items()]
        kept = Tiers(shape, 4, configs, key_format=format, value_format=format)
        return TieredCache(hot, kept, num_hot=5)

    sizes = ", ".join([*(f"{tiers[name]} {name}" for name in upper), f"the rest {last}"])
    name = f"pages of 4, 5 tokens hot, {sizes} in {format}"
    if window is not None:
        name += f", window of {window.size} and {window.sinks} sinks"
    return CacheKind(name=name, make=make, window=window, error=error)


CACHES: tuple[CacheKind, ...] = (
    CacheKind(name="contiguous", make=lambda shape, tokens: ContiguousCache(shape)),
    CacheKind(
        name="contiguous, fixed",
        make=lambda shape, tokens: ContiguousCache(shape, capacity=tokens),
    ),
    _ring(1, 0),
    _ring(6, 0),
    _ring(5, 3),
    _paged(1),
    _paged(4),
    _paged(16),
    _paged(4, Window(6)),
    _paged(3, Window(7, 4)),
    _paged(4, format="bfloat16"),
    _paged(4, format="int8"),
    _quantised("int8", "int8", 1 / 254),
    _quantised("int8-channel", "int8", 1 / 254, Window(12, 2)),
    _quantised("int4-channel", "int4", 1 / 15),
    _quantised("float32", "float32", 0.0, Window(12, 2)),
    _dynamic(3, Window(7, 4)),
    _dynamic(1, Window(20)),
    _tiered("int8", 1 / 254, {"warm": 0}, None),
    _tiered("float32", 0.0, {"cold": 0}, None),
    _tiered("float32", 0.0, {"warm": 4, "cold": 8, "frozen": 0}, None),
    _tiered("int4", 1 / 15, {"cold": 8, "frozen": 0}, Window(12, 2)),
)
